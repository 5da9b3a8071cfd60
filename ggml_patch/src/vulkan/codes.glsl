// How matrix × vector reads the codes of a block in data_a.

// Eight codes in the bytes of two words. TQ1_25: weights 32k to 32k + 31 of a block. STQ1_0: places 8k to 8k + 7 of the block's four
// times 16, in all four lanes.
uvec2 sherry_codes(const uint ib, const uint k) {
    const uint slots = pack32(u16vec2(data_a[ib].qs[2 * k], data_a[ib].qs[2 * k + 1]));
    const uint signs = (uint(data_a[ib].sign[k >> 1]) >> ((k & 1) * 8));
#if defined(DATA_A_STQ1_0)
    const uvec2 parts = uvec2(sherry_slots(slots & 0xffffu), sherry_slots(slots >> 16));
#else
    const uvec2 parts = uvec2(slots, slots >> 4) & 0x0f0f0f0fu;
#endif
    return parts | uvec2(sherry_signs(signs & 15u), sherry_signs((signs >> 4) & 15u));
}

// What the table says about byte i of `codes`.
uint sherry_look_up(const uint codes, const uint i) {
    return sherry_table[bitfieldExtract(codes, int(8 * i), 8)];
}

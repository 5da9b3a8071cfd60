// Products decode the codes of a block in data_a with a table of the 32 codes in shared memory. One read replaces about 15 operations.

#if defined(SHERRY_INTEGERS)
shared uint sherry_table[32]; // four bytes each, in 32 banks: no two codes collide
#else
// Four halves each. AMD's GPUs multiply halves by floats without converting them first; bytes would take two instructions a weight.
shared uvec2 sherry_table[32];
#endif

#define NEEDS_INIT_IQ_SHMEM // upstream's name: its shaders call this before anything else
void init_iq_shmem(const uvec3 size) {
    for (uint code = gl_LocalInvocationIndex.x; code < 32; code += size.x) {
        const uint lanes = sherry_lanes(code);
#if defined(SHERRY_INTEGERS)
        sherry_table[code] = lanes;
#else
        const vec4 v = vec4(unpack8(int32_t(lanes)));
        sherry_table[code] = uvec2(packHalf2x16(v.xy), packHalf2x16(v.zw));
#endif
    }
#if defined(SHERRY_CLEAR)
    SHERRY_CLEAR
#endif
    barrier();
}

// Codes 8k to 8k + 7 of block ib in the bytes of two words; sherry_code knows their order.
uvec2 sherry_codes(const uint ib, const uint k) {
    const uint slots = pack32(u16vec2(data_a_packed16[ib].qs[2 * k], data_a_packed16[ib].qs[2 * k + 1]));
    uint signs = uint(data_a[ib].sign[k]);
#if defined(DATA_A_STQ1_0)
    signs |= signs << 6; // signs 2i and 2i + 1 as bits 0 and 1 of byte i
    signs |= signs << 12;
    return (uvec2(slots, slots >> 4) & 0x0f0f0f0fu) | (uvec2(signs << 4, signs << 3) & 0x10101010u);
#else
    signs |= signs << 7; // signs i and 4 + i as bits 0 and 4 of byte i
    signs |= signs << 14;
    return (uvec2(slots, slots >> 4) & 0x0f0f0f0fu) | (uvec2(signs << 4, signs) & 0x10101010u);
#endif
}

// Code i of the eight.
uint sherry_code(const uvec2 codes, const uint i) {
#if defined(DATA_A_STQ1_0)
    return bitfieldExtract(codes[i & 1], int(8 * (i >> 1)), 8);
#else
    return bitfieldExtract(codes[i >> 2], int(8 * (i & 3)), 8);
#endif
}

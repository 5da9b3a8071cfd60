// Single weights, for GET_ROWS and CPY. Upstream's dequant_funcs.glsl includes this file.

#if defined(SHERRY_LANES)
// Weights i to i + 3 of a block without their scale; i is a multiple of four.
vec4 dequantize4(const uint ib, const uint i, const uint a_offset) {
    return vec4(unpack8(int32_t(SHERRY_LANES(data_a[a_offset + ib], i / 4))));
}

// Weights i and i + 1; i is even.
vec2 dequantize(const uint ib, const uint i, const uint a_offset) {
    const vec4 four = dequantize4(ib, i & ~3u, a_offset);
    return (i & 2u) == 0 ? four.xy : four.zw;
}

vec2 get_dm(const uint ib, const uint a_offset) {
    return vec2(float(data_a[a_offset + ib].d), 0);
}
#endif

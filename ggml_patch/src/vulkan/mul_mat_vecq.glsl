// Matrix × vectors of Q8_1: integer products. Upstream's mul_mat_vecq_funcs.glsl includes this file.

#if defined(SHERRY_LANES)
#include "codes.glsl"

// 32 weights times 32 activations in cache_b_qs; `ib_a` counts groups of 32 weights.
FLOAT_TYPE mmvq_dot_product(const uint ib_a, const uint iqs) {
    const uint ib = ib_a / (QUANT_K / 32), k = ib_a % (QUANT_K / 32);
    int32_t sum = 0;
#if defined(DATA_A_STQ1_0)
    // Two lanes of 16 codes. The compiler takes the activations' new order out of the loop over rows.
    const uint shift = (k & 1) * 16;
    [[unroll]] for (uint eight = 0; eight < 2; ++eight) {
        const uvec2 codes = sherry_codes(ib, (k & ~1u) + eight);
        [[unroll]] for (uint i = 0; i < 8; i += 2) {
            const uint four = codes[i / 4], low = sherry_look_up(four, i % 4) >> shift, high = sherry_look_up(four, i % 4 + 1) >> shift;
            const i8vec4 x = unpack8(cache_b_qs[2 * eight + i / 4]), y = unpack8(cache_b_qs[4 + 2 * eight + i / 4]);
            const i8vec4 pairs = (i & 2) == 0 ? i8vec4(x.x, y.x, x.y, y.y) : i8vec4(x.z, y.z, x.w, y.w);
            sum += dotPacked4x8EXT(int32_t((low & 0xffffu) | high << 16), pack32(pairs));
        }
    }
#else
    const uvec2 codes = sherry_codes(ib, k);
    [[unroll]] for (uint i = 0; i < 8; ++i) {
        sum += dotPacked4x8EXT(int32_t(sherry_look_up(codes[i / 4], i % 4)), cache_b_qs[i]);
    }
#endif
    return FLOAT_TYPE(float(data_a[ib].d) * float(cache_b_ds.x) * float(sum));
}
#endif

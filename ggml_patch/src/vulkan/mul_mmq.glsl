// Matrix × matrix of Q8_1: integer products. Upstream's mul_mmq_funcs.glsl includes this file, and mul_mmq_shmem_types.glsl expands
// SHERRY_CACHE.

#if defined(SHERRY_LANES)
#define SHERRY_INTEGERS
// Rows that end before the tile does leave blocks unloaded. Their activations are zero; a scale that happens to be NaN must not meet them.
#define SHERRY_CLEAR                                                                    \
    for (uint i = gl_LocalInvocationIndex.x; i < BM * BK_STEP; i += size.x) {           \
        buf_a[i].d = FLOAT_TYPE(0);                                                     \
    }
#include "codes.glsl"

// Words iqs and iqs + 4 of 32 weights; `ib` counts groups of 32 weights.
void block_a_to_shmem(const uint buf_ib, const uint ib, const uint iqs) {
    const uint block = ib / (QUANT_K / 32), k = ib % (QUANT_K / 32);
#if defined(DATA_A_STQ1_0)
    // Two lanes of four codes: one half of their words in the table.
    const uint codes = STQ1_0_CODES(data_a[block], (k >> 1) * 16 + iqs), shift = (k & 1) * 16;
    uvec4 lanes;
    [[unroll]] for (uint i = 0; i < 4; ++i) {
        lanes[i] = bitfieldExtract(sherry_table[bitfieldExtract(codes, int(8 * i), 8)], int(shift), 16);
    }
    const uvec2 pairs = lanes.xy | lanes.zw << 16;
    buf_a[buf_ib].qs[iqs] = int32_t((pairs.x & 0x00ff00ffu) | (pairs.y & 0x00ff00ffu) << 8);
    buf_a[buf_ib].qs[iqs + 4] = int32_t(((pairs.x >> 8) & 0x00ff00ffu) | (pairs.y & 0xff00ff00u));
#else
    const uint slots = uint(data_a[block].qs[4 * k + iqs]), signs = uint(data_a[block].sign[k]) >> iqs;
    buf_a[buf_ib].qs[iqs] = int32_t(sherry_table[(slots & 15u) | (signs & 1u) << 4]);
    buf_a[buf_ib].qs[iqs + 4] = int32_t(sherry_table[slots >> 4 | (signs & 16u)]);
#endif
    if (iqs == 0) {
        buf_a[buf_ib].d = FLOAT_TYPE(data_a[block].d);
    }
}

void block_a_to_registers(const uint reg_ib, const uint buf_ib) {
    cache_a[reg_ib] = buf_a[buf_ib];
}

ACC_TYPE mmq_dot_product(const uint ib_a) {
    int32_t sum = 0;
    [[unroll]] for (uint i = 0; i < 8; ++i) {
        sum += dotPacked4x8EXT(cache_a[ib_a].qs[i], cache_b.qs[i]);
    }
    return ACC_TYPE(float(cache_a[ib_a].d) * float(cache_b.ds.x) * float(sum));
}
#endif

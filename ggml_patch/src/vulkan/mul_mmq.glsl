// Matrix × matrix of Q8_1: integer products. Upstream's mul_mmq_funcs.glsl includes this file, and mul_mmq_shmem_types.glsl expands
// SHERRY_CACHE.

#if defined(SHERRY_LANES)
// Word iqs of 32 weights; `ib` counts groups of 32 weights.
void block_a_to_shmem(const uint buf_ib, const uint ib, const uint iqs) {
    const uint block = ib / (QUANT_K / 32);
    buf_a[buf_ib].qs[iqs] = int32_t(SHERRY_LANES(data_a[block], ib % (QUANT_K / 32) * 8 + iqs));
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

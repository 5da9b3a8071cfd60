// Matrix × matrix in floats: four weights a thread. Upstream's mul_mm.comp includes this file; its mul_mm_funcs.glsl expands SHERRY_LOAD_A.

layout (binding = 0) readonly buffer BUF_TQ1_25    { block_tq1_25 data[];    } a_tq1_25;
layout (binding = 0) readonly buffer BUF_TQ1_25_64 { block_tq1_25_64 data[]; } a_tq1_25_64;
layout (binding = 0) readonly buffer BUF_STQ1_0    { block_stq1_0 data[];    } a_stq1_0;

#define SHERRY_LOAD_A_OF(TYPE, a)                                                                 \
    else if (MmTypeA == GGML_TYPE_##TYPE) {                                                       \
        const uint i = pos_a + col * p.stride_a / 4 + row;                                        \
        const uint ib = i / (QUANT_K_##TYPE / 4);                                                 \
        const uint lanes = TYPE##_LANES(a.data[ib], i % (QUANT_K_##TYPE / 4));                    \
        const FLOAT_TYPEV4 v = FLOAT_TYPEV4(vec4(unpack8(int32_t(lanes))) * float(a.data[ib].d)); \
        store_a(col, row * 2, v.xy);                                                              \
        store_a(col, row * 2 + 1, v.zw);                                                          \
    }
#define SHERRY_LOAD_A SHERRY_LOAD_A_OF(TQ1_25, a_tq1_25) SHERRY_LOAD_A_OF(TQ1_25_64, a_tq1_25_64) SHERRY_LOAD_A_OF(STQ1_0, a_stq1_0)

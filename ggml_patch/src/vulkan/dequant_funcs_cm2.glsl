// Weights for cooperative matrices 2. Upstream's dequant_funcs_cm2.glsl includes this file.

#define SHERRY_DECODE(Type, block_type, LANES)                                                                                   \
    layout(buffer_reference, std430, buffer_reference_align = 2) buffer decodeBuf##Type {                                        \
        block_type block;                                                                                                        \
    };                                                                                                                           \
    float16_t dequantFunc##Type(const in decodeBuf##Type bl, const in uint blockCoords[2], const in uint coordInBlock[2]) {      \
        const uint i = coordInBlock[1];                                                                                          \
        const uint lanes = LANES(bl.block, i / 4);                                                                               \
        return bl.block.d * float16_t(bitfieldExtract(int(lanes), int(i & 3u) * 8, 8));                                          \
    }                                                                                                                            \
    f16vec4 dequantFunc##Type##_v(const in decodeBuf##Type bl, const in uint blockCoords[2], const in uint coordInBlock[2]) {    \
        return bl.block.d * f16vec4(unpack8(int32_t(LANES(bl.block, coordInBlock[1] / 4))));                                     \
    }

SHERRY_DECODE(TQ1_25, block_tq1_25, TQ1_25_LANES)
SHERRY_DECODE(TQ1_25_64, block_tq1_25_64, TQ1_25_64_LANES)
SHERRY_DECODE(STQ1_0, block_stq1_0, STQ1_0_LANES)

// mul_mm_cm2.comp: the cases of our types in its switches.
#define SHERRY_DECODE_CASE(TYPE, function) case GGML_TYPE_##TYPE: return function(decodeBuf##TYPE(bl_in), blockCoords, coordInBlock);
#define SHERRY_DECODE_CASES                                      \
    SHERRY_DECODE_CASE(TQ1_25, dequantFuncTQ1_25)                \
    SHERRY_DECODE_CASE(TQ1_25_64, dequantFuncTQ1_25_64)          \
    SHERRY_DECODE_CASE(STQ1_0, dequantFuncSTQ1_0)
#define SHERRY_DECODE_CASES_V                                    \
    SHERRY_DECODE_CASE(TQ1_25, dequantFuncTQ1_25_v)              \
    SHERRY_DECODE_CASE(TQ1_25_64, dequantFuncTQ1_25_64_v)        \
    SHERRY_DECODE_CASE(STQ1_0, dequantFuncSTQ1_0_v)

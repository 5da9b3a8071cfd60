// The blocks of TQ1_25, TQ1_25_64 and STQ1_0 (docs/format.md), and how to decode them. Upstream's types.glsl includes this file.

#define GGML_TYPE_STQ1_0    43u
#define GGML_TYPE_TQ1_25    125u
#define GGML_TYPE_TQ1_25_64 126u

// Cases of upstream's switches over types.
#define SHERRY_CASES case GGML_TYPE_TQ1_25: case GGML_TYPE_TQ1_25_64: case GGML_TYPE_STQ1_0:
#define SHERRY_QUANT_K case GGML_TYPE_TQ1_25: return QUANT_K_TQ1_25; case GGML_TYPE_TQ1_25_64: return QUANT_K_TQ1_25_64;

#define QUANT_K_TQ1_25 128
#define QUANT_K_TQ1_25_64 64
#define QUANT_K_STQ1_0 256

// Blocks have 22, 12 or 42 bytes, so nothing in an array of them is aligned to more than two bytes.
struct block_tq1_25
{
    uint8_t qs[16];
    uint8_t sign[4];
    float16_t d;
};

struct block_tq1_25_packed16
{
    uint16_t qs[8];
    uint16_t sign[2];
    float16_t d;
};

struct block_tq1_25_64
{
    uint8_t qs[8];
    uint8_t sign[2];
    float16_t d;
};

struct block_tq1_25_64_packed16
{
    uint16_t qs[4];
    uint16_t sign[1];
    float16_t d;
};

struct block_stq1_0
{
    uint8_t qs[32];
    uint8_t sign[8];
    float16_t d;
};

struct block_stq1_0_packed16
{
    uint16_t qs[16];
    uint16_t sign[4];
    float16_t d;
};

// The four weights -1, 0 or 1 of a code (sign << 4 | slot), one in each byte.
uint sherry_lanes(const uint code) {
    const uint negative = ((code & 3u) << 1) ^ (7u * (code >> 4));              // bit i: the i-th weight that is not 0
    const uint kept = 0x010101u + ((negative * 0x4081u) & 0x010101u) * 0xfeu;   // one byte each
    const uint above = kept & (0xffffffu << ((code & 12u) << 1));               // those above the zero move up by one lane
    return kept + above * 0xffu;
}

// Bit i of `bits` as bit 4 of byte i: where the sign is in a code.
uint sherry_signs(const uint bits) {
    return (bits * 0x02040810u) & 0x10101010u;
}

// The four slots of two bytes, one in each byte.
uint sherry_slots(const uint low, const uint high) {
    const uint pairs = low | high << 16;
    return (pairs | pairs << 4) & 0x0f0f0f0fu;
}

// Lane `lane` of four codes, one code in each byte: four weights -1, 0 or 1, one in each byte.
uint sherry_lane(const uint codes, const uint lane) {
    const uint ones = 0x01010101u;
    const uint other = ((codes >> 2) & 0x03030303u) ^ (lane * ones);
    const uint kept = (other | other >> 1) & ones;
    const uint high = (codes >> 3) & ones; // the zero is lane 2 or 3
    const uint second = codes & ones, third = (codes >> 1) & ones;
    const uint flipped = lane == 0 ? 0 : lane == 1 ? second & high : lane == 2 ? second ^ ((second ^ third) & high) : third;
    return ((((codes >> 4) ^ flipped) & kept) * 0xffu) | kept;
}

// Group g of a block, as sherry_lanes gives it. Macros, since a function would load the whole block.
#define TQ1_25_CODE(block, g)                                                      \
    (((uint((block).qs[((g) >> 3) * 4 + ((g) & 3)]) >> ((g) & 4)) & 15u) |         \
     (((uint((block).sign[(g) >> 3]) >> ((g) & 7)) & 1u) << 4))
#define TQ1_25_LANES(block, g) sherry_lanes(TQ1_25_CODE(block, g))
#define TQ1_25_64_LANES(block, g) TQ1_25_LANES(block, g)

// Weights 4i to 4i + 3 of a block: a lane of four groups.
#define STQ1_0_CODES(block, i)                                                                                             \
    (sherry_slots((block).qs[((i) >> 4) * 8 + ((i) & 3) * 2], (block).qs[((i) >> 4) * 8 + ((i) & 3) * 2 + 1]) |            \
     sherry_signs((uint((block).sign[((i) >> 4) * 2 + (((i) >> 1) & 1)]) >> (((i) & 1) * 4)) & 15u))
#define STQ1_0_LANES(block, i) sherry_lane(STQ1_0_CODES(block, i), ((i) >> 2) & 3)

#if defined(DATA_A_TQ1_25)
#define QUANT_K QUANT_K_TQ1_25
#define A_TYPE block_tq1_25
#define A_TYPE_PACKED16 block_tq1_25_packed16
#define SHERRY_LANES TQ1_25_LANES
#elif defined(DATA_A_TQ1_25_64)
#define QUANT_K QUANT_K_TQ1_25_64
#define A_TYPE block_tq1_25_64
#define A_TYPE_PACKED16 block_tq1_25_64_packed16
#define SHERRY_LANES TQ1_25_64_LANES
#elif defined(DATA_A_STQ1_0)
#define QUANT_K QUANT_K_STQ1_0
#define A_TYPE block_stq1_0
#define A_TYPE_PACKED16 block_stq1_0_packed16
#define SHERRY_LANES STQ1_0_LANES
#endif

#if defined(SHERRY_LANES)
#define QUANT_R 1

// mul_mmq.comp: 32 weights in shared memory and registers; a thread loads two words of them.
#define QUANT_R_MMQ 2
#define SHERRY_CACHE struct block_a_cache { int32_t qs[8]; FLOAT_TYPE d; };
#endif

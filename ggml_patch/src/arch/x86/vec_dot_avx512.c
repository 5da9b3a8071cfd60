// Dot products for AVX-512 (F, DQ, BW, VL), without and with VNNI.

#include "x86.h"

#ifdef TQ1_25_X86

#include <string.h>

// The four weights of a code plus one, 0 to 2, since the multiplications want them unsigned; lane 0 in the low byte.
// clang-format off
#define W(z, a, b, c) ( (z) == 0 ? 0x1u       | (a) << 8 | (b) << 16 | (c) << 24 \
                      : (z) == 1 ? 0x100u     | (a)      | (b) << 16 | (c) << 24 \
                      : (z) == 2 ? 0x10000u   | (a)      | (b) << 8  | (c) << 24 \
                      :            0x1000000u | (a)      | (b) << 8  | (c) << 16 )
// clang-format on
#define SLOTS(z, p, m) W(z, p, p, p), W(z, p, m, p), W(z, p, p, m), W(z, p, m, m)
static const uint32_t codes[2][16] = {
    { SLOTS(0, 2u, 0u), SLOTS(1, 2u, 0u), SLOTS(2, 2u, 0u), SLOTS(3, 2u, 0u) }, // positive sign
    { SLOTS(0, 0u, 2u), SLOTS(1, 0u, 2u), SLOTS(2, 0u, 2u), SLOTS(3, 0u, 2u) },
};

// Byte 4k+i of qs, widened to dword 4k+i, holds groups 8k+i (low) and 8k+4+i (high). Rotating the sign word right by this many bits puts
// the low group's sign into bit 4, above the slot. Together they index the 32 codes.
static const int32_t turn[16] = { 28, 29, 30, 31, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23 };

// The fp16 scales of four Q8_0 blocks within two 64-byte loads, each for the four dwords of its sums.
static const int16_t scales[16] = { 0, 0, 0, 0, 17, 17, 17, 17, 34, 34, 34, 34, 51, 51, 51, 51 };

// clang-format off
#define HALVES(y, at) \
    _mm512_inserti32x4(_mm512_inserti32x4(_mm512_inserti32x4(_mm512_castsi128_si512( \
        _mm_loadu_si128((const __m128i *) ((y)[0].qs + (at)))), \
        _mm_loadu_si128((const __m128i *) ((y)[1].qs + (at))), 1), \
        _mm_loadu_si128((const __m128i *) ((y)[2].qs + (at))), 2), \
        _mm_loadu_si128((const __m128i *) ((y)[3].qs + (at))), 3)
// clang-format on

// Sums 128 weights, a block of TQ1_25 or two of TQ1_25_64, in 16 dwords: 128-bit lane j holds those of y[j].
#define BODY(DOT, TWO_SCALES)                                                                                                          \
    const __m512i codes0 = _mm512_loadu_si512(codes[0]), codes1 = _mm512_loadu_si512(codes[1]);                                        \
    const __m512i turn_low = _mm512_loadu_si512(turn);                                                                                 \
    const __m512i turn_high = _mm512_add_epi32(turn_low, _mm512_set1_epi32(4));                                                        \
    const __m256i pick = _mm256_loadu_si256((const __m256i *) scales);                                                                 \
    const __m512i slot = _mm512_set1_epi32(15);                                                                                        \
    __m512 total = _mm512_setzero_ps();                                                                                                \
    for (int64_t i = 0; i < n / QK_TQ1_25; ++i, y += PARTS) {                                                                          \
        const block_tq1_25 * one = (const block_tq1_25 *) x + i;                                                                       \
        const block_tq1_25_64 * two = (const block_tq1_25_64 *) x + 2 * i;                                                             \
        const __m512i qs = _mm512_cvtepu8_epi32(TWO_SCALES ? slots_of_two(two) : _mm_loadu_si128((const __m128i *) one->qs));          \
        int32_t signs;                                                                                                                 \
        if (TWO_SCALES) {                                                                                                              \
            signs = signs_of_two(two);                                                                                                 \
        } else {                                                                                                                       \
            memcpy(&signs, one->sign, sizeof(signs));                                                                                  \
        }                                                                                                                              \
        const __m512i sign = _mm512_set1_epi32(signs);                                                                                 \
        /* 0xca: slot ? second : third, bitwise; the lookup reads only five bits */                                                    \
        const __m512i low = _mm512_ternarylogic_epi32(slot, qs, _mm512_rorv_epi32(sign, turn_low), 0xca);                              \
        const __m512i high = _mm512_ternarylogic_epi32(slot, _mm512_srli_epi32(qs, 4), _mm512_rorv_epi32(sign, turn_high), 0xca);      \
        const __m512i w0 = _mm512_permutex2var_epi32(codes0, low, codes1);                                                             \
        const __m512i w1 = _mm512_permutex2var_epi32(codes0, high, codes1);                                                            \
        const __m512i y0 = HALVES(y, 0), y1 = HALVES(y, 16);                                                                           \
        const __m512i sums = DOT(w0, y0, w1, y1);                                                                                      \
        const __m512i dy =                                                                                                             \
            _mm512_permutex2var_epi16(_mm512_loadu_si512(y), _mm512_castsi256_si512(pick), _mm512_loadu_si512((const char *) y + 64)); \
        const __m256i dx = TWO_SCALES ? _mm256_set_m128i(_mm_set1_epi16((short) two[1].d), _mm_set1_epi16((short) two[0].d))           \
                                      : _mm256_set1_epi16((short) one->d);                                                             \
        const __m512 d = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(dy)), _mm512_cvtph_ps(dx));                              \
        total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), d, total);                                                                   \
    }                                                                                                                                  \
    return _mm512_reduce_add_ps(total);

// sum of w*y = sum of (w+1)*y - sum of y
TARGET(AVX512) INLINE __m512i dot_avx512(__m512i w0, __m512i y0, __m512i w1, __m512i y1) {
    const __m512i one = _mm512_set1_epi8(1);
    const __m512i with = _mm512_add_epi16(_mm512_maddubs_epi16(w0, y0), _mm512_maddubs_epi16(w1, y1)); // <= 4*2*128
    const __m512i less = _mm512_add_epi16(_mm512_maddubs_epi16(one, y0), _mm512_maddubs_epi16(one, y1));
    return _mm512_madd_epi16(_mm512_sub_epi16(with, less), _mm512_set1_epi16(1));
}

TARGET(AVX512VNNI) INLINE __m512i dot_avx512vnni(__m512i w0, __m512i y0, __m512i w1, __m512i y1) {
    const __m512i one = _mm512_set1_epi8(1), zero = _mm512_setzero_si512();
    const __m512i with = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, w0, y0), w1, y1);
    const __m512i less = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, one, y0), one, y1);
    return _mm512_sub_epi32(with, less);
}

// Multiplies the 64 weights of a chunk plus one, in order, one lane of the sixteen groups per quarter, by two Q8_0 blocks.
#define BODY_STQ1_0(DOT)                                                                                                  \
    const block_stq1_0 * x = (const block_stq1_0 *) blocks;                                                               \
    const __m512i one = _mm512_set1_epi8(1), two = _mm512_set1_epi8(2);                                                   \
    const __m512i table = _mm512_add_epi8(_mm512_loadu_si512(tq1_25_lanes), one);                                         \
    const __m128i nibble = _mm_set1_epi8(15);                                                                             \
    __m512 total = _mm512_setzero_ps();                                                                                   \
    for (int64_t i = 0; i < n / QK_STQ1_0; ++i, ++x) {                                                                    \
        __m512 block = _mm512_setzero_ps();                                                                               \
        for (int c = 0; c < QK_STQ1_0 / STQ1_0_CHUNK; ++c, y += 2) {                                                      \
            const __m128i qs = _mm_loadl_epi64((const __m128i *) (x->qs + STQ1_0_LANE / 2 * c));                          \
            const __m128i slots = _mm_and_si128(_mm_unpacklo_epi8(qs, _mm_srli_epi16(qs, 4)), nibble);                    \
            uint16_t signs;                                                                                               \
            memcpy(&signs, x->sign + STQ1_0_LANE / 8 * c, sizeof(signs));                                                 \
            const __mmask64 negative = signs * 0x0001000100010001u;                                                       \
            const __m512i w = _mm512_shuffle_epi8(table, _mm512_broadcast_i32x4(slots));                                  \
            const __m512i y01 = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *) y[0].qs)), \
                                                   _mm256_loadu_si256((const __m256i *) y[1].qs), 1);                     \
            const __m512i sums = DOT(_mm512_mask_sub_epi8(w, negative, two, w), y01);                                     \
            const __m512i dy = _mm512_mask_set1_epi16(_mm512_set1_epi16((short) y[0].d), 0xff00, (short) y[1].d);         \
            block = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), _mm512_cvtph_ps(_mm512_castsi512_si256(dy)), block);        \
        }                                                                                                                 \
        total = _mm512_fmadd_ps(block, _mm512_cvtph_ps(_mm256_set1_epi16((short) x->d)), total);                          \
    }                                                                                                                     \
    *s = _mm512_reduce_add_ps(total);

TARGET(AVX512) INLINE __m512i one_dot_avx512(__m512i w, __m512i y) {
    const __m512i one = _mm512_set1_epi8(1);
    return _mm512_madd_epi16(_mm512_sub_epi16(_mm512_maddubs_epi16(w, y), _mm512_maddubs_epi16(one, y)), _mm512_set1_epi16(1));
}

TARGET(AVX512VNNI) INLINE __m512i one_dot_avx512vnni(__m512i w, __m512i y) {
    const __m512i one = _mm512_set1_epi8(1), zero = _mm512_setzero_si512();
    return _mm512_sub_epi32(_mm512_dpbusd_epi32(zero, w, y), _mm512_dpbusd_epi32(zero, one, y));
}

#define VEC_DOTS(TARGET_ISA, isa)                                                                                                    \
    TARGET_ISA static float plain_##isa(int64_t n, const void * x, const tq1_25_q8_0 * y) { BODY(dot_##isa, false) }                 \
    TARGET_ISA APART float pairs_##isa(int64_t n, const void * x, const tq1_25_q8_0 * y) { BODY(dot_##isa, true) }                   \
    TARGET_ISA void tq1_25_vec_dot_##isa(int64_t n, float * s, const void * x, const tq1_25_q8_0 * y) { *s = plain_##isa(n, x, y); } \
    TARGET_ISA void tq1_25_64_vec_dot_##isa(int64_t n, float * s, const void * x, const tq1_25_q8_0 * y) {                           \
        *s = pairs_##isa(n, x, y);                                                                                                   \
        if (n % QK_TQ1_25) {                                                                                                         \
            const last_64 last = get_last_64(n, x, y);                                                                               \
            *s += pairs_##isa(QK_TQ1_25, last.x, last.y);                                                                            \
        }                                                                                                                            \
    }                                                                                                                                \
    TARGET_ISA void stq1_0_vec_dot_##isa(int64_t n, float * s, const void * blocks, const tq1_25_q8_0 * y) { BODY_STQ1_0(one_dot_##isa) }

VEC_DOTS(TARGET(AVX512), avx512)
VEC_DOTS(TARGET(AVX512VNNI), avx512vnni)

#endif

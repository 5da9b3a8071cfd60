// Dot products for AVX2 with FMA and F16C.

#include "x86.h"

#ifdef TQ1_25_X86

#include <string.h>

#define TABLE(lane) _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) tq1_25_lanes[lane]))
#define BY_LANE(y) _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i *) (y).qs), by_lane)
// Multiplies |y| by w with y's sign and adds neighbours, which is right for y = -128 too.
#define DOT(y, w) _mm256_maddubs_epi16(_mm256_abs_epi8(y), _mm256_sign_epi8(w, y))

TARGET(AVX2) INLINE float sum_of(__m256 v) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

// The lookup yields weights by lane. The activations are transposed to match, so that each dword collects the sums of one Q8_0 block and
// four scales apply at once. Interleaving the weights instead takes fewer shuffles, but adds and scales four vectors: 0.85 of this rate.
// Weights plus one, corrected by the activations' sum, instead of signs: 0.8. With two scales, x is pairs of TQ1_25_64 blocks.
TARGET(AVX2) INLINE float vec_dot(bool two_scales, int64_t n, const void * x, const tq1_25_q8_0 * y) {
    const __m256i table0 = TABLE(0), table1 = TABLE(1), table2 = TABLE(2), table3 = TABLE(3);
    const __m256i nibble = _mm256_set1_epi8(15), one8 = _mm256_set1_epi8(1), one16 = _mm256_set1_epi16(1);
    const __m256i shift = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4);
    // clang-format off
    const __m256i by_lane = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,
                                             0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    // For each group, its byte in the sign word and its bit in that byte.
    const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3,
                                            0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m256i bit = _mm256_setr_epi32(0x08040201, 0x08040201, 0x08040201, 0x08040201,
                                          (int) 0x80402010, (int) 0x80402010, (int) 0x80402010, (int) 0x80402010);
    // clang-format on
    __m256 total = _mm256_setzero_ps();
    for (int64_t i = 0; i < n / QK_TQ1_25; ++i, y += PARTS) {
        const block_tq1_25 * one = (const block_tq1_25 *) x + i;
        const block_tq1_25_64 * two = (const block_tq1_25_64 *) x + 2 * i;
        const __m256i qs = two_scales ? _mm256_broadcastsi128_si256(slots_of_two(two))
                                      : _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) one->qs));
        // Byte 4k+i is group 8k+i in the low half, from low nibbles, and group 8k+4+i in the high half.
        const __m256i slots = _mm256_and_si256(_mm256_srlv_epi32(qs, shift), nibble);
        int32_t signs;
        if (two_scales) {
            signs = signs_of_two(two);
        } else {
            memcpy(&signs, one->sign, sizeof(signs));
        }
        const __m256i set = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(signs), spread), bit);
        const __m256i sign = _mm256_or_si256(_mm256_cmpeq_epi8(set, bit), one8); // -1 or 1
        const __m256i w0 = _mm256_sign_epi8(_mm256_shuffle_epi8(table0, slots), sign);
        const __m256i w1 = _mm256_sign_epi8(_mm256_shuffle_epi8(table1, slots), sign);
        const __m256i w2 = _mm256_sign_epi8(_mm256_shuffle_epi8(table2, slots), sign);
        const __m256i w3 = _mm256_sign_epi8(_mm256_shuffle_epi8(table3, slots), sign);

        // In each half of t[k], dword l holds lane l of groups 8k..8k+3 or 8k+4..8k+7. The transpose moves it to dword k of y[l].
        const __m256i t0 = BY_LANE(y[0]), t1 = BY_LANE(y[1]), t2 = BY_LANE(y[2]), t3 = BY_LANE(y[3]);
        const __m256i t01l = _mm256_unpacklo_epi32(t0, t1), t01h = _mm256_unpackhi_epi32(t0, t1);
        const __m256i t23l = _mm256_unpacklo_epi32(t2, t3), t23h = _mm256_unpackhi_epi32(t2, t3);
        const __m256i y0 = _mm256_unpacklo_epi64(t01l, t23l), y1 = _mm256_unpackhi_epi64(t01l, t23l);
        const __m256i y2 = _mm256_unpacklo_epi64(t01h, t23h), y3 = _mm256_unpackhi_epi64(t01h, t23h);

        // int16 holds the sum of four of these, at most 8 * 128. Dword k of both halves gets the sums of Q8_0 block k.
        const __m256i sum = _mm256_add_epi16(_mm256_add_epi16(DOT(y0, w0), DOT(y1, w1)), _mm256_add_epi16(DOT(y2, w2), DOT(y3, w3)));
        const __m256 sums = _mm256_cvtepi32_ps(_mm256_madd_epi16(sum, one16));

        const __m128i dy = _mm_setr_epi16((short) y[0].d, (short) y[1].d, (short) y[2].d, (short) y[3].d, (short) y[0].d, (short) y[1].d,
                                          (short) y[2].d, (short) y[3].d);
        const __m128i dx = two_scales ? _mm_unpacklo_epi32(_mm_set1_epi16((short) two[0].d), _mm_set1_epi16((short) two[1].d))
                                      : _mm_set1_epi16((short) one->d);
        total = _mm256_fmadd_ps(sums, _mm256_mul_ps(_mm256_cvtph_ps(dy), _mm256_cvtph_ps(dx)), total);
    }
    return sum_of(total);
}

TARGET(AVX2) void tq1_25_vec_dot_avx2(int64_t n, float * s, const void * x, const tq1_25_q8_0 * y) { *s = vec_dot(false, n, x, y); }

TARGET(AVX2) APART float pairs(int64_t n, const void * x, const tq1_25_q8_0 * y) { return vec_dot(true, n, x, y); }

TARGET(AVX2) void tq1_25_64_vec_dot_avx2(int64_t n, float * s, const void * x, const tq1_25_q8_0 * y) {
    *s = pairs(n, x, y);
    if (n % QK_TQ1_25) {
        const last_64 last = get_last_64(n, x, y);
        *s += pairs(QK_TQ1_25, last.x, last.y);
    }
}

// A lane of a chunk's sixteen groups is sixteen consecutive weights, so that lookups in both halves of a register give 32 weights in the
// order of a Q8_0 block.
TARGET(AVX2) void stq1_0_vec_dot_avx2(int64_t n, float * s, const void * blocks, const tq1_25_q8_0 * y) {
    const block_stq1_0 * x = (const block_stq1_0 *) blocks;
    const __m256i table01 =
        _mm256_set_m128i(_mm_loadu_si128((const __m128i *) tq1_25_lanes[1]), _mm_loadu_si128((const __m128i *) tq1_25_lanes[0]));
    const __m256i table23 =
        _mm256_set_m128i(_mm_loadu_si128((const __m128i *) tq1_25_lanes[3]), _mm_loadu_si128((const __m128i *) tq1_25_lanes[2]));
    const __m128i nibble = _mm_set1_epi8(15);
    const __m256i one8 = _mm256_set1_epi8(1), one16 = _mm256_set1_epi16(1), bit = _mm256_set1_epi64x((int64_t) 0x8040201008040201);
    const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    __m256 total = _mm256_setzero_ps();
    for (int64_t i = 0; i < n / QK_STQ1_0; ++i, ++x) {
        __m256 block = _mm256_setzero_ps();
        for (int c = 0; c < QK_STQ1_0 / STQ1_0_CHUNK; ++c, y += 2) {
            const __m128i qs = _mm_loadl_epi64((const __m128i *) (x->qs + STQ1_0_LANE / 2 * c));
            const __m256i slots = _mm256_broadcastsi128_si256(_mm_and_si128(_mm_unpacklo_epi8(qs, _mm_srli_epi16(qs, 4)), nibble));
            int16_t signs;
            memcpy(&signs, x->sign + STQ1_0_LANE / 8 * c, sizeof(signs));
            const __m256i set = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi16(signs), spread), bit);
            const __m256i sign = _mm256_or_si256(_mm256_cmpeq_epi8(set, bit), one8); // -1 or 1
            const __m256i w0 = _mm256_sign_epi8(_mm256_shuffle_epi8(table01, slots), sign);
            const __m256i w1 = _mm256_sign_epi8(_mm256_shuffle_epi8(table23, slots), sign);
            const __m256i y0 = _mm256_loadu_si256((const __m256i *) y[0].qs), y1 = _mm256_loadu_si256((const __m256i *) y[1].qs);
            const __m256 f0 = _mm256_cvtepi32_ps(_mm256_madd_epi16(DOT(y0, w0), one16));
            const __m256 f1 = _mm256_cvtepi32_ps(_mm256_madd_epi16(DOT(y1, w1), one16));
            block = _mm256_fmadd_ps(f0, _mm256_cvtph_ps(_mm_set1_epi16((short) y[0].d)), block);
            block = _mm256_fmadd_ps(f1, _mm256_cvtph_ps(_mm_set1_epi16((short) y[1].d)), block);
        }
        total = _mm256_fmadd_ps(block, _mm256_cvtph_ps(_mm_set1_epi16((short) x->d)), total);
    }
    *s = sum_of(total);
}

#endif

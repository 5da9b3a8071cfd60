// Repacked TQ1_25, matrix by vector, for AVX-512: with VBMI and VNNI, and without either.

#include "tq1_25-x86.h"

#if defined(__x86_64__) || defined(_M_X64)

#define LOAD(p) _mm512_loadu_si512(p)
#define ZERO    _mm512_setzero_si512()

// Sums of eight groups, high and low parts, to floats in the order of tq1_25_tile.d.
#define FLUSH_VNNI(high, low, f)                                                                    \
    const __m512i lower = _mm512_unpacklo_epi8(low, high), upper = _mm512_unpackhi_epi8(low, high); \
    f[0] = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(ZERO, even, lower));                              \
    f[1] = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(ZERO, odd,  lower));                              \
    f[2] = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(ZERO, even, upper));                              \
    f[3] = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(ZERO, odd,  upper));

#define FLUSH(high, low, f)                                                            \
    const __m512i lower = _mm512_maddubs_epi16(both, _mm512_unpacklo_epi8(low, high)); \
    const __m512i upper = _mm512_maddubs_epi16(both, _mm512_unpackhi_epi8(low, high)); \
    f[0] = _mm512_cvtepi32_ps(_mm512_madd_epi16(lower, first));                        \
    f[1] = _mm512_cvtepi32_ps(_mm512_srai_epi32(lower, 16));                           \
    f[2] = _mm512_cvtepi32_ps(_mm512_madd_epi16(upper, first));                        \
    f[3] = _mm512_cvtepi32_ps(_mm512_srai_epi32(upper, 16));

// From the order of tq1_25_tile.d to that of the rows.
TARGET(AVX512) INLINE void store(float * s, const __m512 t[4]) {
    const __m512 r0 = _mm512_unpacklo_ps(t[0], t[1]), r1 = _mm512_unpackhi_ps(t[0], t[1]); // lane l: rows 16l.., 16l+4..
    const __m512 r2 = _mm512_unpacklo_ps(t[2], t[3]), r3 = _mm512_unpackhi_ps(t[2], t[3]); // 16l+8.., 16l+12..
    const __m512 a = _mm512_shuffle_f32x4(r0, r1, 0x44), b = _mm512_shuffle_f32x4(r0, r1, 0xee);
    const __m512 c = _mm512_shuffle_f32x4(r2, r3, 0x44), d = _mm512_shuffle_f32x4(r2, r3, 0xee);
    _mm512_storeu_ps(s,      _mm512_shuffle_f32x4(a, c, 0x88));
    _mm512_storeu_ps(s + 16, _mm512_shuffle_f32x4(a, c, 0xdd));
    _mm512_storeu_ps(s + 32, _mm512_shuffle_f32x4(b, d, 0x88));
    _mm512_storeu_ps(s + 48, _mm512_shuffle_f32x4(b, d, 0xdd));
}

#define BODY(SUMS, FLUSHED, TABLE_SIZE)                                                                                \
    __m512 total[4] = { _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps() };          \
    for (int64_t i = 0; i < n / QK_TQ1_25; ++i, ++x) {                                                                 \
        __m512 block[4];                                                                                               \
        for (int j = 0; j < PARTS; ++j, table += TABLE_SIZE) {                                                         \
            prefetch_part(x, j);                                                                                       \
            __m512i high, low;                                                                                         \
            SUMS                                                                                                       \
            __m512 f[4];                                                                                               \
            FLUSHED(high, low, f)                                                                                      \
            const __m512 dy = _mm512_set1_ps(*d++);                                                                    \
            for (int k = 0; k < 4; ++k) {                                                                              \
                block[k] = j == 0 ? _mm512_mul_ps(f[k], dy) : _mm512_fmadd_ps(f[k], dy, block[k]);                     \
            }                                                                                                          \
        }                                                                                                              \
        for (int k = 0; k < 4; ++k) {                                                                                  \
            total[k] = _mm512_fmadd_ps(block[k], _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) (x->d + 16 * k))), total[k]); \
        }                                                                                                              \
    }                                                                                                                  \
    store(s, total);

// ---- VBMI: one lookup by the five-bit code ----

TARGET(AVX512VBMI) void tq1_25_widen_avx512vbmi(int64_t nb, const int8_t * table, int8_t * wide) {
    const __m512i twice = _mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3); // high parts and their negatives, low parts and theirs
    for (int64_t g = 0; g < GROUPS * nb; ++g) {
        const __m512i both = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *) (table + 32 * g)));
        const __m512i parts = _mm512_permutexvar_epi64(twice, both);
        _mm512_storeu_si512(wide + 64 * g, _mm512_mask_sub_epi8(parts, 0xffff0000ffff0000, ZERO, parts));
    }
}

// The lookup minds six bits of an index; with the 32 entries twice the sixth may be anything, so what shifts leave there
// needs no mask.

#define ENTRIES(at) _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) (table + (at))))
#define LOOKUP(g, bits, turned) {                                                   \
        const __m512i code = _mm512_ternarylogic_epi32(nibble, bits, turned, 0xca); \
        const __m512i h = _mm512_permutexvar_epi8(code, ENTRIES(64 * (g)));         \
        const __m512i l = _mm512_permutexvar_epi8(code, ENTRIES(64 * (g) + 32));    \
        high = (g) == 0 ? h : _mm512_add_epi8(high, h);                             \
        low  = (g) == 0 ? l : _mm512_add_epi8(low, l);                              \
        IN_ORDER(high);                                                             \
        IN_ORDER(low);                                                              \
    }

#define SUMS_VBMI                                                           \
    const __m512i sign = LOAD(x->part[j].sign);                             \
    const __m512i b0 = LOAD(x->part[j].qs[0]), b1 = LOAD(x->part[j].qs[1]); \
    const __m512i b2 = LOAD(x->part[j].qs[2]), b3 = LOAD(x->part[j].qs[3]); \
    LOOKUP(0, b0, _mm512_slli_epi16(sign, 4))                               \
    LOOKUP(1, b1, _mm512_slli_epi16(sign, 3))                               \
    LOOKUP(2, b2, _mm512_slli_epi16(sign, 2))                               \
    LOOKUP(3, b3, _mm512_slli_epi16(sign, 1))                               \
    LOOKUP(4, _mm512_srli_epi16(b0, 4), sign)                               \
    LOOKUP(5, _mm512_srli_epi16(b1, 4), _mm512_srli_epi16(sign, 1))         \
    LOOKUP(6, _mm512_srli_epi16(b2, 4), _mm512_srli_epi16(sign, 2))         \
    LOOKUP(7, _mm512_srli_epi16(b3, 4), _mm512_srli_epi16(sign, 3))

TARGET(AVX512VBMI) void tq1_25_gemv_avx512vbmi(int64_t n, float * s, const tq1_25_tile * x, const int8_t * table, const float * d) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const __m512i even = _mm512_set1_epi32(TQ1_25_SPLIT << 8 | 1), odd = _mm512_slli_epi32(even, 16);
    BODY(SUMS_VBMI, FLUSH_VNNI, TQ1_25_WIDE)
}

// ---- without: two lookups by slot, the sign by a masked negation ----

#define SLOTS(at) _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) (table + (at))))
#define SHUFFLE(g, slots) {                                                                          \
        const __mmask64 negative = _mm512_test_epi8_mask(sign, _mm512_set1_epi8((char) (1 << (g)))); \
        __m512i h = _mm512_shuffle_epi8(SLOTS(32 * (g)), slots);                                     \
        __m512i l = _mm512_shuffle_epi8(SLOTS(32 * (g) + 16), slots);                                \
        h = _mm512_mask_sub_epi8(h, negative, ZERO, h);                                              \
        l = _mm512_mask_sub_epi8(l, negative, ZERO, l);                                              \
        high = (g) == 0 ? h : _mm512_add_epi8(high, h);                                              \
        low  = (g) == 0 ? l : _mm512_add_epi8(low, l);                                               \
        IN_ORDER(high);                                                                              \
        IN_ORDER(low);                                                                               \
    }

#define SUMS                                                                \
    const __m512i sign = LOAD(x->part[j].sign);                             \
    const __m512i b0 = LOAD(x->part[j].qs[0]), b1 = LOAD(x->part[j].qs[1]); \
    const __m512i b2 = LOAD(x->part[j].qs[2]), b3 = LOAD(x->part[j].qs[3]); \
    SHUFFLE(0, _mm512_and_si512(b0, nibble))                                \
    SHUFFLE(1, _mm512_and_si512(b1, nibble))                                \
    SHUFFLE(2, _mm512_and_si512(b2, nibble))                                \
    SHUFFLE(3, _mm512_and_si512(b3, nibble))                                \
    SHUFFLE(4, _mm512_and_si512(_mm512_srli_epi16(b0, 4), nibble))          \
    SHUFFLE(5, _mm512_and_si512(_mm512_srli_epi16(b1, 4), nibble))          \
    SHUFFLE(6, _mm512_and_si512(_mm512_srli_epi16(b2, 4), nibble))          \
    SHUFFLE(7, _mm512_and_si512(_mm512_srli_epi16(b3, 4), nibble))

TARGET(AVX512) void tq1_25_gemv_avx512(int64_t n, float * s, const tq1_25_tile * x, const int8_t * table, const float * d) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const __m512i both = _mm512_set1_epi16(TQ1_25_SPLIT << 8 | 1), first = _mm512_set1_epi32(1);
    BODY(SUMS, FLUSH, TQ1_25_TABLE)
}

#endif

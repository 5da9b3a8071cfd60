// Repacked TQ1_25, matrix by several vectors, for AVX2 with FMA and F16C: lookups as for one, by slots and signs that are
// expanded once.

#include "tq1_25-x86.h"

#if defined(__x86_64__) || defined(_M_X64)

#define LOAD(p)     _mm256_loadu_si256((const __m256i *) (p))
#define STORE(p, v) _mm256_storeu_si256((__m256i *) (p), v)

TARGET(AVX2) void tq1_25_expand_avx2(const tq1_25_tile * const x[2], tq1_25_codes * codes) {
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int at = 0; at < TQ1_25_TILE; at += 32) {
        for (int j = 0; j < PARTS; ++j) {
            const __m256i sign = LOAD(x[0]->part[j].sign + at);
            __m256i negative = _mm256_setzero_si256();
            UNROLL for (int g = 0; g < GROUPS; ++g) {
                const __m256i bits = LOAD(x[0]->part[j].qs[g % 4] + at);
                const __m256i bit  = _mm256_set1_epi8((char) (1 << g)), mask = _mm256_cmpeq_epi8(_mm256_and_si256(sign, bit), bit);
                STORE(codes->one.slot[GROUPS * j + g] + at, _mm256_and_si256(g < 4 ? bits : _mm256_srli_epi16(bits, 4), nibble));
                STORE(codes->one.mask[GROUPS * j + g] + at, mask);
                negative = _mm256_sub_epi8(negative, mask);
            }
            STORE(codes->one.negative[j] + at, negative);
        }
        for (int k = 0; k < 4; ++k) {
            _mm256_storeu_ps(codes->one.d + at + 8 * k, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (x[0]->d + 16 * k + at / 4))));
        }
    }
}

#define SLOTS(at) _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) (at)))

// 64 rows by nc columns. -t = (t ^ -1) + 1: the ones are added up beforehand, and the xor runs on any pipe, where vpsignb
// would vie with the shuffles. Rows in two halves, each with its sums of blocks in registers, gave 0.94 of this rate.
TARGET(AVX2) INLINE void columns(const tq1_25_codes * codes, int nc, const int8_t * table, const float * d, float * sums) {
    enum { OF_COLUMN = PARTS * TQ1_25_TABLE };
    const __m256i both = _mm256_set1_epi16(TQ1_25_SPLIT << 8 | 1), first = _mm256_set1_epi32(1);
    float block[2][TQ1_25_TILE];
    for (int j = 0; j < PARTS; ++j) {
        __m256i high[2][2], low[2][2];
        UNROLL for (int r = 0; r < 2; ++r) {
            UNROLL for (int c = 0; c < nc; ++c) {
                high[c][r] = low[c][r] = LOAD(codes->one.negative[j] + 32 * r);
            }
        }
        UNROLL for (int g = 0; g < GROUPS; ++g) {
            UNROLL for (int r = 0; r < 2; ++r) {
                __m256i slot = LOAD(codes->one.slot[GROUPS * j + g] + 32 * r), mask = LOAD(codes->one.mask[GROUPS * j + g] + 32 * r);
                LOADED(slot);
                LOADED(mask);
                UNROLL for (int c = 0; c < nc; ++c) {
                    const int8_t * entries = table + OF_COLUMN * c + TQ1_25_TABLE * j + 32 * g;
                    high[c][r] = _mm256_add_epi8(high[c][r], _mm256_xor_si256(_mm256_shuffle_epi8(SLOTS(entries), slot), mask));
                    low[c][r]  = _mm256_add_epi8(low[c][r], _mm256_xor_si256(_mm256_shuffle_epi8(SLOTS(entries + 16), slot), mask));
                    IN_ORDER(high[c][r]);
                    IN_ORDER(low[c][r]);
                }
            }
        }
        UNROLL for (int c = 0; c < nc; ++c) {
            const __m256 dy = _mm256_set1_ps(d[PARTS * c + j]);
            UNROLL for (int r = 0; r < 2; ++r) {
                const __m256i lower = _mm256_maddubs_epi16(both, _mm256_unpacklo_epi8(low[c][r], high[c][r]));
                const __m256i upper = _mm256_maddubs_epi16(both, _mm256_unpackhi_epi8(low[c][r], high[c][r]));
                const __m256 f[4] = {
                    _mm256_cvtepi32_ps(_mm256_madd_epi16(lower, first)), _mm256_cvtepi32_ps(_mm256_srai_epi32(lower, 16)),
                    _mm256_cvtepi32_ps(_mm256_madd_epi16(upper, first)), _mm256_cvtepi32_ps(_mm256_srai_epi32(upper, 16)),
                };
                UNROLL for (int k = 0; k < 4; ++k) {
                    float * to = block[c] + 32 * r + 8 * k;
                    _mm256_storeu_ps(to, j == 0 ? _mm256_mul_ps(f[k], dy) : _mm256_fmadd_ps(f[k], dy, _mm256_loadu_ps(to)));
                }
            }
        }
    }
    UNROLL for (int c = 0; c < nc; ++c) {
        UNROLL for (int k = 0; k < TQ1_25_TILE; k += 8) {
            float * to = sums + TQ1_25_TILE * c + k;
            _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_loadu_ps(block[c] + k), _mm256_loadu_ps(codes->one.d + k), _mm256_loadu_ps(to)));
        }
    }
}

// Apart, since GCC keeps what does not belong to the loop in memory otherwise: 7 % of the rate.
#define PARAMETERS const tq1_25_codes * codes, const int8_t * table, const float * d, float * sums
TARGET(AVX2) APART void one_column(PARAMETERS)  { columns(codes, 1, table, d, sums); }
TARGET(AVX2) APART void two_columns(PARAMETERS) { columns(codes, 2, table, d, sums); }

TARGET(AVX2) void tq1_25_lookup_avx2(const tq1_25_codes * codes, int nc, const int8_t * table, const float * d, float * sums) {
    int c = 0;
    for (; c + 1 < nc; c += 2) {
        two_columns(codes, table + PARTS * TQ1_25_TABLE * c, d + PARTS * c, sums + TQ1_25_TILE * c);
    }
    if (c < nc) {
        one_column(codes, table + PARTS * TQ1_25_TABLE * c, d + PARTS * c, sums + TQ1_25_TILE * c);
    }
}

TARGET(AVX2) void tq1_25_store_avx2(float * s, const float * sums, bool add) {
    for (int at = 0; at < TQ1_25_TILE; at += 32) {
        __m256 rows[4], t[4];
        for (int k = 0; k < 4; ++k) {
            t[k] = _mm256_loadu_ps(sums + at + 8 * k);
        }
        order_rows(t, rows);
        for (int k = 0; k < 4; ++k) {
            float * to = s + at + 8 * k;
            _mm256_storeu_ps(to, add ? _mm256_add_ps(rows[k], _mm256_loadu_ps(to)) : rows[k]);
        }
    }
}

#endif

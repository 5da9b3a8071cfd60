// Tables and codes for AVX2 with FMA and F16C: look up bytes by slot, then apply the sign.

#include "x86.h"

#ifdef TQ1_25_X86

#define LOAD(p) _mm256_loadu_si256((const __m256i *) (p))
#define STORE(p, v) _mm256_storeu_si256((__m256i *) (p), v)
#define SLOTS(at) _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) (at)))

// ---- tables ----

TARGET(AVX2) void tq1_25_table_avx2(int64_t nq, const tq1_25_q8_0 * y, int8_t * table, float * d) {
    __m256i patterns[2];
    slot_patterns(patterns);
    const __m256i reciprocal = _mm256_set1_epi16((32768 + TQ1_25_SPLIT / 2) / TQ1_25_SPLIT);
    const __m256i split = _mm256_set1_epi16(TQ1_25_SPLIT);
    for (int64_t i = 0; i < nq; ++i) {
        int32_t q[3][GROUPS];
        group_dwords(y + i, q);
        d[i] = tq1_25_fp16_to_float(y[i].d);
        for (int g = 0; g < GROUPS; ++g, table += 32) {
            const __m256i a = _mm256_maddubs_epi16(patterns[0], _mm256_set1_epi32(q[0][g]));
            const __m256i b = _mm256_maddubs_epi16(patterns[1], _mm256_set1_epi32(q[1][g]));
            const __m256i t = _mm256_sub_epi16(_mm256_add_epi16(a, b), _mm256_set1_epi32(q[2][g]));
            const __m256i high = _mm256_mulhrs_epi16(t, reciprocal);
            const __m256i low = _mm256_sub_epi16(t, _mm256_mullo_epi16(high, split));
            _mm256_storeu_si256((__m256i *) table, _mm256_permute4x64_epi64(_mm256_packs_epi16(high, low), 0xd8));
        }
    }
}

// Joins the high and low parts of 32 rows' sums into floats, in the order of tq1_25_tile.d.
TARGET(AVX2) INLINE void flush(__m256i high, __m256i low, __m256 f[4]) {
    const __m256i both = _mm256_set1_epi16(TQ1_25_SPLIT << 8 | 1), first = _mm256_set1_epi32(1);
    const __m256i lower = _mm256_maddubs_epi16(both, _mm256_unpacklo_epi8(low, high));
    const __m256i upper = _mm256_maddubs_epi16(both, _mm256_unpackhi_epi8(low, high));
    f[0] = _mm256_cvtepi32_ps(_mm256_madd_epi16(lower, first));
    f[1] = _mm256_cvtepi32_ps(_mm256_srai_epi32(lower, 16));
    f[2] = _mm256_cvtepi32_ps(_mm256_madd_epi16(upper, first));
    f[3] = _mm256_cvtepi32_ps(_mm256_srai_epi32(upper, 16));
}

// ---- one vector ----

// Group g of 32 rows, from the halves of its table.
#define LOOK_UP(g, slots, table_high, table_low)                                                                            \
    {                                                                                                                       \
        const __m256i signed_one = _mm256_or_si256(_mm256_slli_epi16(sign[r], 7 - (g)), one); /* the sign is the top bit */ \
        high[r] = _mm256_add_epi8(high[r], _mm256_sign_epi8(_mm256_shuffle_epi8(table_high, slots), signed_one));           \
        low[r] = _mm256_add_epi8(low[r], _mm256_sign_epi8(_mm256_shuffle_epi8(table_low, slots), signed_one));              \
        IN_ORDER(high[r]);                                                                                                  \
        IN_ORDER(low[r]);                                                                                                   \
    }

// Adds a tile to total[8], in the order of its d. All 64 rows share each load of a table; 32 rows at a time gave 0.88 of the rate.
TARGET(AVX2) INLINE void tile(int parts, __m256 * total, const tq1_25_part * x, const int8_t * table, const float * d) {
    const uint16_t * of_rows = (const uint16_t *) (x + parts);
    const __m256i nibble = _mm256_set1_epi8(15), one = _mm256_set1_epi8(1);
    __m256 block[8];
    for (int j = 0; j < parts; ++j, ++x, table += 32 * GROUPS) {
        prefetch_part(x, j, of_rows);
        __m256i high[2], low[2], sign[2];
        UNROLL for (int r = 0; r < 2; ++r) {
            high[r] = low[r] = _mm256_setzero_si256();
            sign[r] = LOAD(x->sign + 32 * r);
        }
        UNROLL for (int g = 0; g < 4; ++g) {
            __m256i first_high = SLOTS(table + 32 * g), first_low = SLOTS(table + 32 * g + 16);
            __m256i second_high = SLOTS(table + 32 * (g + 4)), second_low = SLOTS(table + 32 * (g + 4) + 16);
            LOADED(first_high);
            LOADED(first_low);
            LOADED(second_high);
            LOADED(second_low);
            UNROLL for (int r = 0; r < 2; ++r) {
                const __m256i bits = LOAD(x->qs[g] + 32 * r);
                LOOK_UP(g, _mm256_and_si256(bits, nibble), first_high, first_low)
                LOOK_UP(g + 4, _mm256_and_si256(_mm256_srli_epi16(bits, 4), nibble), second_high, second_low)
            }
        }
        const __m256 dy = _mm256_set1_ps(d[j]);
        UNROLL for (int r = 0; r < 2; ++r) {
            __m256 f[4];
            flush(high[r], low[r], f);
            UNROLL for (int k = 0; k < 4; ++k) {
                block[4 * r + k] = j == 0 ? _mm256_mul_ps(f[k], dy) : _mm256_fmadd_ps(f[k], dy, block[4 * r + k]);
            }
        }
    }
    for (int k = 0; k < 8; ++k) {
        const __m128i dx = _mm_loadu_si128((const __m128i *) (of_rows + 16 * (k % 4) + 8 * (k / 4)));
        total[k] = _mm256_fmadd_ps(block[k], _mm256_cvtph_ps(dx), total[k]);
    }
}

TARGET(AVX2) INLINE void store(float * s, const __m256 t[4]) {
    __m256 rows[4];
    order_rows(t, rows);
    for (int k = 0; k < 4; ++k) {
        _mm256_storeu_ps(s + 8 * k, rows[k]);
    }
}

TARGET(AVX2) INLINE void gemv(int parts, int64_t n, float * s, const void * x, const int8_t * table, const float * d) {
    __m256 total[8];
    for (int k = 0; k < 8; ++k) {
        total[k] = _mm256_setzero_ps();
    }
    const tq1_25_part * part = (const tq1_25_part *) x;
    for (int64_t i = 0; i < n / (parts * TQ1_25_QK8_0); ++i, table += 32 * GROUPS * parts, d += parts) {
        tile(parts, total, part, table, d);
        part = (const tq1_25_part *) ((const uint16_t *) (part + parts) + TQ1_25_TILE);
    }
    store(s, total);
    store(s + 32, total + 4);
}

TARGET(AVX2) APART void gemv_64(int64_t n, float * s, const void * x, const int8_t * table, const float * d) {
    gemv(PARTS_64, n, s, x, table, d);
}
TARGET(AVX2) APART void gemv_128(int64_t n, float * s, const void * x, const int8_t * table, const float * d) {
    gemv(PARTS, n, s, x, table, d);
}
TARGET(AVX2) APART void gemv_256(int64_t n, float * s, const void * x, const int8_t * table, const float * d) {
    gemv(PARTS_STQ1_0, n, s, x, table, d);
}

TARGET(AVX2) void tq1_25_gemv_avx2(int parts, int64_t n, float * s, const void * x, const int8_t * table, const float * d) {
    (parts == PARTS_64 ? gemv_64 : parts == PARTS ? gemv_128 : gemv_256)(n, s, x, table, d);
}

// ---- several vectors ----

TARGET(AVX2) INLINE void expand(int parts, const tq1_25_unit x[2], tq1_25_codes * codes) {
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int at = 0; at < TQ1_25_TILE; at += 32) {
        for (int j = 0; j < parts; ++j) {
            const __m256i sign = LOAD(x[0].part[j].sign + at);
            __m256i negative = _mm256_setzero_si256();
            UNROLL for (int g = 0; g < GROUPS; ++g) {
                const __m256i bits = LOAD(x[0].part[j].qs[g % 4] + at);
                const __m256i bit = _mm256_set1_epi8((char) (1 << g)), mask = _mm256_cmpeq_epi8(_mm256_and_si256(sign, bit), bit);
                STORE(codes->one.slot[GROUPS * j + g] + at, _mm256_and_si256(g < 4 ? bits : _mm256_srli_epi16(bits, 4), nibble));
                STORE(codes->one.mask[GROUPS * j + g] + at, mask);
                negative = _mm256_sub_epi8(negative, mask);
            }
            STORE(codes->one.negative[j] + at, negative);
        }
        for (int k = 0; k < 4; ++k) {
            _mm256_storeu_ps(codes->one.d + at + 8 * k, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (x[0].d + 16 * k + at / 4))));
        }
    }
}

TARGET(AVX2) void tq1_25_expand_avx2(int parts, const tq1_25_unit x[2], tq1_25_codes * codes) {
    if (parts == PARTS_64) { // constants
        expand(PARTS_64, x, codes);
    } else {
        expand(PARTS, x, codes);
    }
}

// 64 rows by nc columns. Since -t = (t ^ -1) + 1, sums start at the number of negative groups. The xor runs on any pipe, while vpsignb
// would compete with the shuffles. Two halves of the rows, each with its block sums in registers, gave 0.94 of this rate.
TARGET(AVX2) INLINE void columns(int parts, int nc, const tq1_25_codes * codes, const int8_t * table, const float * d, float * sums) {
    float block[2][TQ1_25_TILE];
    for (int j = 0; j < parts; ++j) {
        __m256i high[2][2], low[2][2];
        UNROLL for (int r = 0; r < 2; ++r) {
            UNROLL for (int c = 0; c < nc; ++c) { high[c][r] = low[c][r] = LOAD(codes->one.negative[j] + 32 * r); }
        }
        UNROLL for (int g = 0; g < GROUPS; ++g) {
            UNROLL for (int r = 0; r < 2; ++r) {
                __m256i slot = LOAD(codes->one.slot[GROUPS * j + g] + 32 * r), mask = LOAD(codes->one.mask[GROUPS * j + g] + 32 * r);
                LOADED(slot);
                LOADED(mask);
                UNROLL for (int c = 0; c < nc; ++c) {
                    const int8_t * entries = table + TQ1_25_TABLE_AVX2 * parts * c + 32 * (GROUPS * j + g);
                    high[c][r] = _mm256_add_epi8(high[c][r], _mm256_xor_si256(_mm256_shuffle_epi8(SLOTS(entries), slot), mask));
                    low[c][r] = _mm256_add_epi8(low[c][r], _mm256_xor_si256(_mm256_shuffle_epi8(SLOTS(entries + 16), slot), mask));
                    IN_ORDER(high[c][r]);
                    IN_ORDER(low[c][r]);
                }
            }
        }
        UNROLL for (int c = 0; c < nc; ++c) {
            const __m256 dy = _mm256_set1_ps(d[parts * c + j]);
            UNROLL for (int r = 0; r < 2; ++r) {
                __m256 f[4];
                flush(high[c][r], low[c][r], f);
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

// Not inlined, since GCC would keep the loop's constants in memory: 7 % of the rate.
#define PARAMETERS const tq1_25_codes *codes, const int8_t *table, const float *d, float *sums
TARGET(AVX2) APART void one_column(PARAMETERS) { columns(PARTS, 1, codes, table, d, sums); }
TARGET(AVX2) APART void two_columns(PARAMETERS) { columns(PARTS, 2, codes, table, d, sums); }
TARGET(AVX2) APART void one_column_64(PARAMETERS) { columns(PARTS_64, 1, codes, table, d, sums); }
TARGET(AVX2) APART void two_columns_64(PARAMETERS) { columns(PARTS_64, 2, codes, table, d, sums); }

TARGET(AVX2) void tq1_25_lookup_avx2(int parts, const tq1_25_codes * codes, int nc, const int8_t * table, const float * d, float * sums) {
    for (int c = 0; c < nc; c += 2, table += 2 * TQ1_25_TABLE_AVX2 * parts, d += 2 * parts, sums += 2 * TQ1_25_TILE) {
        if (parts == PARTS) {
            (c + 1 < nc ? two_columns : one_column)(codes, table, d, sums);
        } else {
            (c + 1 < nc ? two_columns_64 : one_column_64)(codes, table, d, sums);
        }
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

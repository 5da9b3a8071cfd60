// Tables and codes for AVX-512 (F, DQ, BW, VL): look up int16 by code.

#include "x86.h"

#ifdef TQ1_25_X86

#define LOAD(p) _mm512_loadu_si512(p)

// ---- tables ----

TARGET(AVX512) void tq1_25_table_avx512(int64_t nq, const tq1_25_q8_0 * y, int8_t * table, float * d) {
    const __m256i two = _mm256_set1_epi8(2);
    __m256i patterns[2];
    slot_patterns(patterns);
    // Lanes plus one for codes with a positive sign, one minus lanes for a negative sign, since maddubs wants one factor unsigned.
    const __m512i straight = _mm512_inserti64x4(_mm512_castsi256_si512(patterns[0]), _mm256_sub_epi8(two, patterns[0]), 1);
    const __m512i turned = _mm512_inserti64x4(_mm512_castsi256_si512(patterns[1]), _mm256_sub_epi8(two, patterns[1]), 1);
    for (int64_t i = 0; i < nq; ++i, table += TQ1_25_TABLE) {
        int32_t q[3][GROUPS];
        group_dwords(y + i, q);
        d[i] = tq1_25_fp16_to_float(y[i].d);
        UNROLL for (int g = 0; g < GROUPS; ++g) {
            const __m512i a = _mm512_maddubs_epi16(straight, _mm512_set1_epi32(q[0][g]));
            const __m512i b = _mm512_maddubs_epi16(turned, _mm512_set1_epi32(q[1][g]));
            const __m512i t = _mm512_sub_epi16(_mm512_add_epi16(a, b), _mm512_set1_epi32(q[2][g]));
            _mm512_storeu_si512(table + 64 * g, t);
        }
    }
}

// ---- shared by both ----

// Places in tq1_25_tile.d in the order of the sums: rows 4m, 4m + 2, 4m + 1, 4m + 3, each for m = 0 .. 15.
#define FOUR(row) TQ1_25_PLACE(row), TQ1_25_PLACE((row) + 4), TQ1_25_PLACE((row) + 8), TQ1_25_PLACE((row) + 12)
#define SIXTEEN(from) FOUR(from), FOUR((from) + 16), FOUR((from) + 32), FOUR((from) + 48)

TARGET(AVX512) INLINE void scales(const uint16_t * x, __m512 d[4]) {
    static const uint16_t places[4][16] = { { SIXTEEN(0) }, { SIXTEEN(2) }, { SIXTEEN(1) }, { SIXTEEN(3) } };
    const __m512i d0 = LOAD(x), d1 = LOAD(x + 32);
    for (int k = 0; k < 4; ++k) {
        const __m512i place = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *) places[k]));
        d[k] = _mm512_cvtph_ps(_mm512_castsi512_si256(_mm512_permutex2var_epi16(d0, place, d1)));
    }
}

// Codes, sign << 4 | slot, of the eight groups of a part. The upper bits stay arbitrary, since the lookup reads only five bits.
TARGET(AVX512) INLINE void eight_codes(const tq1_25_part * x, __m512i codes[GROUPS]) {
    const __m512i slot = _mm512_set1_epi8(15);
    __m512i sign = LOAD(x->sign), qs[4];
    LOADED(sign);
    UNROLL for (int g = 0; g < GROUPS; ++g) {
        if (g < 4) {
            qs[g] = LOAD(x->qs[g]);
            LOADED(qs[g]);
        }
        const __m512i bits = g < 4 ? qs[g] : _mm512_srli_epi16(qs[g - 4], 4);
        const __m512i turned = g < 4 ? _mm512_slli_epi16(sign, 4 - g) : _mm512_srli_epi16(sign, g - 4);
        codes[g] = _mm512_ternarylogic_epi32(turned, slot, bits, 0xb8); // slot ? bits : turned
    }
}

TARGET(AVX512) void tq1_25_store_avx512(float * s, const float * sums, bool add) {
    const __m512 f0 = _mm512_loadu_ps(sums), f2 = _mm512_loadu_ps(sums + 16), f1 = _mm512_loadu_ps(sums + 32),
                 f3 = _mm512_loadu_ps(sums + 48);
    const __m512 a0 = _mm512_unpacklo_ps(f0, f1), a1 = _mm512_unpackhi_ps(f0, f1); // lane l: rows 16l, +1, +4, +5; +8 ..
    const __m512 b0 = _mm512_unpacklo_ps(f2, f3), b1 = _mm512_unpackhi_ps(f2, f3); // +2, +3, +6, +7
#define PAIRS(unpack, a, b) _mm512_castpd_ps(unpack(_mm512_castps_pd(a), _mm512_castps_pd(b)))
    const __m512 q0 = PAIRS(_mm512_unpacklo_pd, a0, b0), q1 = PAIRS(_mm512_unpackhi_pd, a0, b0); // lane l: rows 16l .. +3; +4 .. +7
    const __m512 q2 = PAIRS(_mm512_unpacklo_pd, a1, b1), q3 = PAIRS(_mm512_unpackhi_pd, a1, b1);
    const __m512 a = _mm512_shuffle_f32x4(q0, q1, 0x44), b = _mm512_shuffle_f32x4(q2, q3, 0x44); // lanes 0, 1
    const __m512 c = _mm512_shuffle_f32x4(q0, q1, 0xee), d = _mm512_shuffle_f32x4(q2, q3, 0xee); // lanes 2, 3
    const __m512 rows[4] = {
        _mm512_shuffle_f32x4(a, b, 0x88),
        _mm512_shuffle_f32x4(a, b, 0xdd),
        _mm512_shuffle_f32x4(c, d, 0x88),
        _mm512_shuffle_f32x4(c, d, 0xdd),
    };
    for (int k = 0; k < 4; ++k) {
        _mm512_storeu_ps(s + 16 * k, add ? _mm512_add_ps(rows[k], _mm512_loadu_ps(s + 16 * k)) : rows[k]);
    }
}

// ---- one vector ----

// 64 rows. Each word holds the codes of two rows, the even row in the low byte. A multiplication by 256 moves the odd row's code down;
// shifts would compete with the lookups (0.97 of this rate). Looking up bytes with vpermb, in parts as on AVX2, needs no shifts, but its
// 32-byte tables must be spread to 64 bytes on the same pipes: 0.87.
TARGET(AVX512) INLINE void gemv(int parts, int64_t n, float * s, const void * x, const int8_t * table, const float * d) {
    const __m512i first = _mm512_set1_epi32(1), upper = _mm512_set1_epi16(1 << 8);
    __m512 total[4] = { _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps() };
    const tq1_25_part * part = (const tq1_25_part *) x;
    for (int64_t i = 0; i < n / (parts * TQ1_25_QK8_0); ++i) {
        __m512 block[4];
        const uint16_t * of_rows = (const uint16_t *) (part + parts);
        for (int j = 0; j < parts; ++j, ++part, table += 64 * GROUPS) {
            prefetch_part(part, j, of_rows);
            __m512i codes[GROUPS], even, odd;
            eight_codes(part, codes);
            UNROLL for (int g = 0; g < GROUPS; ++g) {
                __m512i entries = LOAD(table + 64 * g);
                LOADED(entries);
                const __m512i e = _mm512_permutexvar_epi16(codes[g], entries);
                const __m512i o = _mm512_permutexvar_epi16(_mm512_mulhi_epu16(codes[g], upper), entries);
                even = g == 0 ? e : _mm512_add_epi16(even, e);
                odd = g == 0 ? o : _mm512_add_epi16(odd, o);
                IN_ORDER(even);
                IN_ORDER(odd);
            }
            const __m512 f[4] = {
                _mm512_cvtepi32_ps(_mm512_madd_epi16(even, first)),
                _mm512_cvtepi32_ps(_mm512_srai_epi32(even, 16)),
                _mm512_cvtepi32_ps(_mm512_madd_epi16(odd, first)),
                _mm512_cvtepi32_ps(_mm512_srai_epi32(odd, 16)),
            };
            const __m512 dy = _mm512_set1_ps(*d++);
            for (int k = 0; k < 4; ++k) {
                block[k] = j == 0 ? _mm512_mul_ps(f[k], dy) : _mm512_fmadd_ps(f[k], dy, block[k]);
            }
        }
        __m512 dx[4];
        scales(of_rows, dx);
        for (int k = 0; k < 4; ++k) {
            total[k] = _mm512_fmadd_ps(block[k], dx[k], total[k]);
        }
        part = (const tq1_25_part *) (of_rows + TQ1_25_TILE);
    }
    float sums[TQ1_25_TILE];
    for (int k = 0; k < 4; ++k) {
        _mm512_storeu_ps(sums + 16 * k, total[k]);
    }
    tq1_25_store_avx512(s, sums, false);
}

TARGET(AVX512) APART void gemv_64(int64_t n, float * s, const void * x, const int8_t * table, const float * d) {
    gemv(PARTS_64, n, s, x, table, d);
}
TARGET(AVX512) APART void gemv_128(int64_t n, float * s, const void * x, const int8_t * table, const float * d) {
    gemv(PARTS, n, s, x, table, d);
}
TARGET(AVX512) APART void gemv_256(int64_t n, float * s, const void * x, const int8_t * table, const float * d) {
    gemv(PARTS_STQ1_0, n, s, x, table, d);
}

TARGET(AVX512) void tq1_25_gemv_avx512(int parts, int64_t n, float * s, const void * x, const int8_t * table, const float * d) {
    (parts == PARTS_64 ? gemv_64 : parts == PARTS ? gemv_128 : gemv_256)(n, s, x, table, d);
}

// ---- several vectors ----

TARGET(AVX512) INLINE void expand(int parts, const tq1_25_unit x[2], tq1_25_codes * codes) {
    for (int r = 0; r < 2; ++r) {
        for (int j = 0; j < parts; ++j) {
            __m512i code[GROUPS];
            eight_codes(x[r].part + j, code);
            UNROLL for (int g = 0; g < GROUPS; ++g) { _mm512_storeu_si512(codes->two.code[GROUPS * j + g][r], code[g]); }
        }
        __m512 d[4];
        scales(x[r].d, d);
        for (int k = 0; k < 4; ++k) {
            _mm512_storeu_ps(codes->two.d[r] + 16 * k, d[k]);
        }
    }
}

TARGET(AVX512) void tq1_25_expand_avx512(int parts, const tq1_25_unit x[2], tq1_25_codes * codes) {
    if (parts == PARTS_64) { // constants
        expand(PARTS_64, x, codes);
    } else {
        expand(PARTS, x, codes);
    }
}

// 128 rows by nc columns. Loading codes from one byte further on puts those of the odd rows into the low bytes of the words. Two loads of
// tables and four of codes (every other one crosses a cache line) feed eight lookups and additions, so that shuffles, additions and
// conversions keep all vector pipes busy: at best 23.5 cycles for 64 rows by 32 weights on Zen 4, where vpdpbusd alone would take 32.
// Separate words for odd rows, so that no load crosses a line, gain 5 % here and lose it in expand. Prefetching tables gave 0.75.
TARGET(AVX512) INLINE void columns(int parts, int nc, const tq1_25_codes * codes, const int8_t * table, const float * d, float * sums) {
    const __m512i first = _mm512_set1_epi32(1);
    __m512 block[2][4][2]; // [column][half of a tile's rows, tile][word of a pair]
    for (int j = 0; j < parts; ++j) {
        __m512i sum[2][4];
        UNROLL for (int g = 0; g < GROUPS; ++g) {
            __m512i entries[2];
            UNROLL for (int c = 0; c < nc; ++c) {
                entries[c] = LOAD(table + TQ1_25_TABLE * parts * c + 64 * (GROUPS * j + g));
                LOADED(entries[c]);
            }
            UNROLL for (int r = 0; r < 4; ++r) {
                __m512i code = LOAD(codes->two.code[GROUPS * j + g][r / 2] + r % 2);
                LOADED(code);
                UNROLL for (int c = 0; c < nc; ++c) {
                    const __m512i t = _mm512_permutexvar_epi16(code, entries[c]);
                    sum[c][r] = g == 0 ? t : _mm512_add_epi16(sum[c][r], t);
                    IN_ORDER(sum[c][r]);
                }
            }
        }
        UNROLL for (int c = 0; c < nc; ++c) {
            const __m512 dy = _mm512_set1_ps(d[parts * c + j]);
            UNROLL for (int r = 0; r < 4; ++r) {
                const __m512 even = _mm512_cvtepi32_ps(_mm512_madd_epi16(sum[c][r], first));
                const __m512 odd = _mm512_cvtepi32_ps(_mm512_srai_epi32(sum[c][r], 16));
                block[c][r][0] = j == 0 ? _mm512_mul_ps(even, dy) : _mm512_fmadd_ps(even, dy, block[c][r][0]);
                block[c][r][1] = j == 0 ? _mm512_mul_ps(odd, dy) : _mm512_fmadd_ps(odd, dy, block[c][r][1]);
            }
        }
    }
    UNROLL for (int c = 0; c < nc; ++c) {
        UNROLL for (int r = 0; r < 4; ++r) {
            UNROLL for (int k = 0; k < 2; ++k) {
                float * to = sums + 2 * TQ1_25_TILE * c + 32 * r + 16 * k;
                _mm512_storeu_ps(
                    to, _mm512_fmadd_ps(block[c][r][k], _mm512_loadu_ps(codes->two.d[r / 2] + 32 * (r % 2) + 16 * k), _mm512_loadu_ps(to)));
            }
        }
    }
}

// Not inlined, since GCC would keep the loop's constants in memory: 7 % of the rate.
#define PARAMETERS const tq1_25_codes *codes, const int8_t *table, const float *d, float *sums
TARGET(AVX512) APART void one_column(PARAMETERS) { columns(PARTS, 1, codes, table, d, sums); }
TARGET(AVX512) APART void two_columns(PARAMETERS) { columns(PARTS, 2, codes, table, d, sums); }
TARGET(AVX512) APART void one_column_64(PARAMETERS) { columns(PARTS_64, 1, codes, table, d, sums); }
TARGET(AVX512) APART void two_columns_64(PARAMETERS) { columns(PARTS_64, 2, codes, table, d, sums); }

TARGET(AVX512) void tq1_25_lookup_avx512(int parts, const tq1_25_codes * codes, int nc, const int8_t * table, const float * d,
                                         float * sums) {
    for (int c = 0; c < nc; c += 2, table += 2 * TQ1_25_TABLE * parts, d += 2 * parts, sums += 4 * TQ1_25_TILE) {
        if (parts == PARTS) {
            (c + 1 < nc ? two_columns : one_column)(codes, table, d, sums);
        } else {
            (c + 1 < nc ? two_columns_64 : one_column_64)(codes, table, d, sums);
        }
    }
}

#endif

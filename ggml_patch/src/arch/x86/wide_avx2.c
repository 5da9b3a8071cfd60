// Wide tables for AVX2 with FMA and F16C: an entry holds a code's sums for up to 32 columns, so that one addition from memory serves
// sixteen of them. Neither shuffles nor signs are left in the loop; its limit is two vector loads a cycle.

#include "x86.h"

#ifdef TQ1_25_X86

#define LOAD(p) _mm256_loadu_si256((const __m256i *) (p))
#define STORE(p, v) _mm256_storeu_si256((__m256i *) (p), v)

enum {
    LANES = 16,                     // int16 in a vector: half an entry
    ENTRY = TQ1_25_WIDE_COLUMNS,    // int16
    SLOTS = 16,
    CODES = 2 * SLOTS, // entries for a group
};

// Transposes eight vectors of eight dwords.
TARGET(AVX2) INLINE void transpose(__m256i v[8]) {
    __m256i a[8], b[8];
    UNROLL for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
    UNROLL for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; ++i) {
        v[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
        v[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
    }
}

// ---- tables ----

// Columns c and 8 + c of sixteen share a dword, the first in its low word.
TARGET(AVX2) void tq1_25_wide_table_avx2(int nc, const tq1_25_q8_0 * const * y, int16_t * table, float * d) {
    const __m256i zero = _mm256_setzero_si256();
    for (int first = 0; first < nc; first += LANES, table += LANES) {
        __m256i q[2][8]; // [columns 0 to 7 or 8 to 15][column], then [..][group]: four activations in a dword
        for (int c = 0; c < LANES; ++c) {
            const tq1_25_q8_0 * of = y[first + c < nc ? first + c : nc - 1]; // whatever completes the vector
            q[c / 8][c % 8] = LOAD(of->qs);
            d[first + c] = tq1_25_fp16_to_float(of->d);
        }
        transpose(q[0]);
        transpose(q[1]);
        for (int g = 0; g < GROUPS; ++g) {
            __m256i v[TQ1_25_GROUP];
            UNROLL for (int lane = 0; lane < TQ1_25_GROUP; ++lane) {
                const __m256i low = _mm256_srai_epi32(_mm256_slli_epi32(q[0][g], 24 - 8 * lane), 24);
                v[lane] = _mm256_blend_epi16(low, _mm256_srai_epi32(_mm256_slli_epi32(q[1][g], 24 - 8 * lane), 8), 0xaa);
            }
            int16_t * to = table + ENTRY * CODES * g;
            UNROLL for (int z = 0; z < TQ1_25_GROUP; ++z) { // the zero lane
                const __m256i a = v[z == 0], b = v[z < 2 ? 2 : 1], c = v[z < 3 ? 3 : 2];
                const __m256i sum = _mm256_add_epi16(a, b), difference = _mm256_sub_epi16(a, b);
                const __m256i t[4] = { _mm256_add_epi16(sum, c), _mm256_add_epi16(difference, c), _mm256_sub_epi16(sum, c),
                                       _mm256_sub_epi16(difference, c) };
                UNROLL for (int k = 0; k < 4; ++k) {
                    STORE(to + ENTRY * (4 * z + k), t[k]);
                    STORE(to + ENTRY * (SLOTS + 4 * z + k), _mm256_sub_epi16(zero, t[k]));
                }
            }
        }
    }
}

// ---- rows ----

// The codes of 64 rows, a byte per group: sign << 7 | slot << 3, an eighth of the entry's offset. An address can multiply it by eight.
TARGET(AVX2) INLINE void read_codes(const tq1_25_part * x, uint64_t codes[TQ1_25_TILE]) {
    const __m256i slot = _mm256_set1_epi8(15 << 3), top = _mm256_set1_epi8((char) 0x80);
    for (int at = 0; at < TQ1_25_TILE; at += 32) {
        const __m256i sign = LOAD(x->sign + at);
        __m256i v[GROUPS], a[GROUPS];
        UNROLL for (int g = 0; g < GROUPS; ++g) {
            const __m256i b = LOAD(x->qs[g % 4] + at), shifted = g < 4 ? _mm256_slli_epi16(b, 3) : _mm256_srli_epi16(b, 1);
            const __m256i negative = _mm256_and_si256(_mm256_slli_epi16(sign, 7 - g), top);
            v[g] = _mm256_or_si256(_mm256_and_si256(shifted, slot), negative);
        }
        UNROLL for (int g = 0; g < GROUPS; g += 2) {
            a[g] = _mm256_unpacklo_epi8(v[g], v[g + 1]);
            a[g + 1] = _mm256_unpackhi_epi8(v[g], v[g + 1]);
        }
        UNROLL for (int h = 0; h < 2; ++h) { // eight of each sixteen rows
            const __m256i p0 = _mm256_unpacklo_epi16(a[h], a[h + 2]), p1 = _mm256_unpackhi_epi16(a[h], a[h + 2]);
            const __m256i q0 = _mm256_unpacklo_epi16(a[h + 4], a[h + 6]), q1 = _mm256_unpackhi_epi16(a[h + 4], a[h + 6]);
            const __m256i rows[4] = { _mm256_unpacklo_epi32(p0, q0), _mm256_unpackhi_epi32(p0, q0), _mm256_unpacklo_epi32(p1, q1),
                                      _mm256_unpackhi_epi32(p1, q1) };
            UNROLL for (int k = 0; k < 4; ++k) {
                uint64_t * to = codes + at + 8 * h + 2 * k;
                _mm_storeu_si128((__m128i *) to, _mm256_castsi256_si128(rows[k]));
                _mm_storeu_si128((__m128i *) (to + 16), _mm256_extracti128_si256(rows[k], 1));
            }
        }
    }
}

// Eight codes are one load and shifts; loads of bytes would take the place of other loads.
TARGET(AVX2) INLINE void rows(int halves, const tq1_25_part * x, const uint16_t * dx, const int16_t * table, const float * d,
                              float * sums) {
    uint64_t codes[TQ1_25_TILE];
    float scales[TQ1_25_TILE];
    read_codes(x, codes);
    for (int at = 0; at < TQ1_25_TILE; at += 32) {
        __m256 t[4], in_order[4];
        for (int k = 0; k < 4; ++k) {
            t[k] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (dx + 16 * k + at / 4)));
        }
        order_rows(t, in_order);
        for (int k = 0; k < 4; ++k) {
            _mm256_storeu_ps(scales + at + 8 * k, in_order[k]);
        }
    }
    const __m256i low = _mm256_set1_epi32(1);
    __m256 dy[4];
    UNROLL for (int k = 0; k < 2 * halves; ++k) { dy[k] = _mm256_loadu_ps(d + 8 * k); }
    for (int r = 0; r < TQ1_25_TILE; ++r, sums += LANES * halves) {
        uint64_t next = codes[r];
        __m256i sum[2];
        UNROLL for (int g = 0; g < GROUPS; ++g) {
            const char * entry = (const char *) (table + ENTRY * CODES * g) + 8 * (size_t) (uint8_t) (g % 2 ? next >> 8 : next);
            UNROLL for (int h = 0; h < halves; ++h) {
                sum[h] = g == 0 ? LOAD(entry + 32 * h) : _mm256_add_epi16(sum[h], LOAD(entry + 32 * h));
                IN_ORDER(sum[h]); // both halves of a line together, so that their banks differ
            }
            if (g % 2) {
                next >>= 16;
                OPAQUE(next);
            }
        }
        const __m256 dr = _mm256_set1_ps(scales[r]);
        UNROLL for (int h = 0; h < halves; ++h) {
            const __m256 f[2] = { _mm256_cvtepi32_ps(_mm256_madd_epi16(sum[h], low)), _mm256_cvtepi32_ps(_mm256_srai_epi32(sum[h], 16)) };
            UNROLL for (int k = 0; k < 2; ++k) {
                float * to = sums + LANES * h + 8 * k;
                _mm256_storeu_ps(to, _mm256_fmadd_ps(f[k], _mm256_mul_ps(dr, dy[2 * h + k]), _mm256_loadu_ps(to)));
            }
        }
    }
}

#define PARAMETERS const tq1_25_part *x, const uint16_t *dx, const int16_t *table, const float *d, float *sums
TARGET(AVX2) APART void half(PARAMETERS) { rows(1, x, dx, table, d, sums); }
TARGET(AVX2) APART void whole(PARAMETERS) { rows(2, x, dx, table, d, sums); }

TARGET(AVX2) void tq1_25_wide_rows_avx2(int nc, const tq1_25_part * x, const uint16_t * dx, const int16_t * table, const float * d,
                                        float * sums) {
    (nc <= LANES ? half : whole)(x, dx, table, d, sums);
}

TARGET(AVX2) void tq1_25_wide_store_avx2(int nc, const float * sums, float * const * s) {
    const int width = nc <= LANES ? LANES : 2 * LANES;
    for (int c = 0; c < nc; c += 8) {
        for (int r = 0; r < TQ1_25_TILE; r += 8) {
            __m256i v[8];
            UNROLL for (int k = 0; k < 8; ++k) { v[k] = LOAD(sums + width * (r + k) + c); }
            transpose(v);
            for (int k = 0; k < 8 && c + k < nc; ++k) {
                STORE(s[c + k] + r, v[k]);
            }
        }
    }
}

#endif

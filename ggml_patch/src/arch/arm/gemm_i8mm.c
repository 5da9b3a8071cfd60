// Panels for NEON with i8mm.

#include "arm.h"

#ifdef TQ1_25_I8MM

#include <string.h>

// smmla multiplies eight weights of two rows by two columns. The decoded weights therefore keep groups 2k and 2k + 1 of a row together,
// as 16 rows of eight bytes.

// Groups g and g + 1 of columns c and c + 1, c even, or of a last column c twice. Four columns share their loads.
I8MM INLINE int8x16_t two_columns(const int8_t * panel, int nc, int g, int c) {
    const int32_t *lower = (const int32_t *) panel + g * nc + c, *upper = lower + nc;
    if (c % 4 == 0 && c + 4 <= nc) {
        return vreinterpretq_s8_s32(vzip1q_s32(vld1q_s32(lower), vld1q_s32(upper)));
    }
    if (c % 4 == 2 && c + 2 <= nc) {
        return vreinterpretq_s8_s32(vzip2q_s32(vld1q_s32(lower - 2), vld1q_s32(upper - 2)));
    }
    const int32x2_t a = c + 1 < nc ? vld1_s32(lower) : vld1_dup_s32(lower), b = c + 1 < nc ? vld1_s32(upper) : vld1_dup_s32(upper);
    return vreinterpretq_s8_s32(vzip1q_s32(vcombine_s32(a, vdup_n_s32(0)), vcombine_s32(b, vdup_n_s32(0))));
}

// The panel's value for columns c and c + 1, for each of two rows.
I8MM INLINE int32x4_t of_two(const int8_t * panel, int nc, int c) {
    const int32_t * p = (const int32_t *) panel + c;
    int64_t both = 0; // aligned like int32_t
    if (c + 1 < nc) {
        memcpy(&both, p, sizeof(both));
    }
    return c + 1 < nc ? vreinterpretq_s32_s64(vdupq_n_s64(both)) : vld1q_dup_s32(p);
}

enum { PAIRS = TQ1_25_COLUMNS / 2 };

// Eight rows from row `at` on by all columns of a panel.
I8MM INLINE void eight_rows(int parts, int64_t units, int nc, float * s, const uint8_t * w, int at, const int8_t * panel) {
    const int pairs = (nc + 1) / 2;
    for (int64_t i = 0; i < units; ++i, w += TQ1_25_DECODED(parts)) {
        float32x4_t block[PAIRS][4];
        UNROLL for (int c = 0; c < pairs; ++c) {
            UNROLL for (int r = 0; r < 4; ++r) { block[c][r] = vdupq_n_f32(0.0f); }
        }
        const int8_t * rows = (const int8_t *) w + at / 16 * TQ1_25_DECODED_SIXTEEN(parts) + 2 * TQ1_25_GROUP * (at % 16);
        const float * scales = (const float *) (w + 4 * TQ1_25_DECODED_SIXTEEN(parts)) + at;
        for (int j = 0; j < parts; ++j) {
            int32x4_t sum[PAIRS][4];
            UNROLL for (int c = 0; c < pairs; ++c) {
                sum[c][0] = sum[c][1] = sum[c][2] = sum[c][3] = of_two(panel + 4 * GROUPS * nc, nc, 2 * c);
            }
            UNROLL for (int g = 0; g < GROUPS; g += 2, rows += 128) {
                int8x16_t y[PAIRS];
                UNROLL for (int c = 0; c < pairs; ++c) { y[c] = two_columns(panel, nc, g, 2 * c); }
                UNROLL for (int r = 0; r < 4; ++r) {
                    const int8x16_t two_rows = vld1q_s8(rows + 16 * r);
                    UNROLL for (int c = 0; c < pairs; ++c) {
                        sum[c][r] = vmmlaq_s32(sum[c][r], two_rows, y[c]);
                        IN_ORDER(sum[c][r]);
                    }
                }
            }
            UNROLL for (int c = 0; c < pairs; ++c) {
                const float32x4_t d = vreinterpretq_f32_s32(of_two(panel + 4 * (GROUPS + 1) * nc, nc, 2 * c));
                UNROLL for (int r = 0; r < 4; ++r) { block[c][r] = vfmaq_f32(block[c][r], vcvtq_f32_s32(sum[c][r]), d); }
            }
            panel += 4 * (GROUPS + 2) * nc;
        }
        UNROLL for (int r = 0; r < 2; ++r) {
            const float32x4_t d = vld1q_f32(scales + 4 * r);
            UNROLL for (int c = 0; c < nc; ++c) {
                const float32x4_t rows01 = block[c / 2][2 * r], rows23 = block[c / 2][2 * r + 1];
                const float32x4_t of_column = c % 2 ? vuzp2q_f32(rows01, rows23) : vuzp1q_f32(rows01, rows23);
                float * to = s + TQ1_25_TILE * c + at + 4 * r;
                vst1q_f32(to, vfmaq_f32(i == 0 ? vdupq_n_f32(0.0f) : vld1q_f32(to), of_column, d));
            }
        }
    }
}

I8MM INLINE void gemm(int parts, int64_t units, int nc, float * s, const uint8_t * w, const int8_t * panel) {
    for (int at = 0; at < TQ1_25_TILE; at += 8) {
#define PRODUCT(parts, nc) eight_rows(parts, units, nc, s, w, at, panel)
        BY_COLUMNS(parts, nc, PRODUCT)
    }
}

I8MM APART void gemm_64(int64_t units, int nc, float * s, const uint8_t * w, const int8_t * panel) {
    gemm(PARTS_64, units, nc, s, w, panel);
}
I8MM APART void gemm_128(int64_t units, int nc, float * s, const uint8_t * w, const int8_t * panel) { gemm(PARTS, units, nc, s, w, panel); }

I8MM void tq1_25_gemm_i8mm(int parts, int64_t units, int nc, float * s, const uint8_t * w, const int8_t * panel) {
    (parts == PARTS_64 ? gemm_64 : gemm_128)(units, nc, s, w, panel);
}

void tq1_25_decode_i8mm(int parts, tq1_25_unit x, uint8_t * w) {
    int8x16x2_t of_lane[TQ1_25_GROUP];
    UNROLL for (int lane = 0; lane < TQ1_25_GROUP; ++lane) { of_lane[lane] = lane_of_codes(lane, 1); }
    for (int at = 0; at < TQ1_25_TILE; at += 16) {
        int32_t * of_rows = (int32_t *) (w + at / 16 * TQ1_25_DECODED_SIXTEEN(parts));
        for (int j = 0; j < parts; ++j) {
            const tq1_25_part * part = x.part + j;
            const uint8x16_t signs = vld1q_u8(part->sign + at);
            UNROLL for (int g = 0; g < 4; g += 2) {
                uint8x16_t even[2], odd[2];
                two_codes(g, vld1q_u8(part->qs[g] + at), signs, even);
                two_codes(g + 1, vld1q_u8(part->qs[g + 1] + at), signs, odd);
                UNROLL for (int h = 0; h < 2; ++h) {
                    int8x16_t a[4], b[4];
                    sixteen_rows(of_lane, even[h], a);
                    sixteen_rows(of_lane, odd[h], b);
                    int32_t * to = of_rows + 16 * (GROUPS * j + 4 * h + g);
                    UNROLL for (int k = 0; k < 4; ++k) {
                        const int32x4_t of_even = vreinterpretq_s32_s8(a[k]), of_odd = vreinterpretq_s32_s8(b[k]);
                        vst1q_s32(to + 8 * k, vzip1q_s32(of_even, of_odd));
                        vst1q_s32(to + 8 * k + 4, vzip2q_s32(of_even, of_odd));
                    }
                }
            }
        }
    }
    put_scales(x.d, (float *) (w + 4 * TQ1_25_DECODED_SIXTEEN(parts)));
}

#endif

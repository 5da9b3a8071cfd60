// Panels for NEON with dotprod.

#include "arm.h"

#ifdef TQ1_25_DOTPROD

// Up to four dwords.
DOTPROD INLINE int32x4_t dwords(const int8_t * p, int count) {
    const int32_t * q = (const int32_t *) p;
    switch (count) {
        case 1:  return vsetq_lane_s32(*q, vdupq_n_s32(0), 0);
        case 2:  return vcombine_s32(vld1_s32(q), vdup_n_s32(0));
        case 3:  return vcombine_s32(vld1_s32(q), vset_lane_s32(q[2], vdup_n_s32(0), 0));
        default: return vld1q_s32(q);
    }
}

DOTPROD INLINE int32x4_t dot(int32x4_t sum, int8x16_t w, int32x4_t y, int lane) { // lane is constant
    const int8x16_t q = vreinterpretq_s8_s32(y);
    switch (lane) {
        case 0:  return vdotq_laneq_s32(sum, w, q, 0);
        case 1:  return vdotq_laneq_s32(sum, w, q, 1);
        case 2:  return vdotq_laneq_s32(sum, w, q, 2);
        default: return vdotq_laneq_s32(sum, w, q, 3);
    }
}

// Eight rows from row `at` on by all columns of a panel: sums over a Q8_0 block and over a block of weights fill 24 registers.
DOTPROD INLINE void eight_rows(int parts, int64_t units, int nc, float * s, const uint8_t * w, int at, const int8_t * panel) {
    for (int64_t i = 0; i < units; ++i, w += TQ1_25_DECODED(parts)) {
        float32x4_t block[TQ1_25_COLUMNS][2];
        UNROLL for (int c = 0; c < nc; ++c) { block[c][0] = block[c][1] = vdupq_n_f32(0.0f); }
        const int8_t * rows = (const int8_t *) w + at / 16 * TQ1_25_DECODED_SIXTEEN(parts) + TQ1_25_GROUP * (at % 16);
        const float * scales = (const float *) (w + 4 * TQ1_25_DECODED_SIXTEEN(parts)) + at;
        for (int j = 0; j < parts; ++j) {
            int32x4_t sum[TQ1_25_COLUMNS][2];
            UNROLL for (int c = 0; c < nc; ++c) {
                sum[c][0] = sum[c][1] = vld1q_dup_s32((const int32_t *) (panel + 4 * (GROUPS * nc + c)));
            }
            UNROLL for (int g = 0; g < GROUPS; ++g, rows += 64) {
                const int8x16_t w0 = vld1q_s8(rows), w1 = vld1q_s8(rows + 16);
                const int32x4_t y0 = dwords(panel + 4 * g * nc, nc), y1 = nc > 4 ? dwords(panel + 4 * (g * nc + 4), nc - 4) : y0;
                UNROLL for (int c = 0; c < nc; ++c) {
                    sum[c][0] = dot(sum[c][0], w0, c < 4 ? y0 : y1, c % 4);
                    sum[c][1] = dot(sum[c][1], w1, c < 4 ? y0 : y1, c % 4);
                    IN_ORDER(sum[c][0]);
                    IN_ORDER(sum[c][1]);
                }
            }
            UNROLL for (int c = 0; c < nc; ++c) {
                const float d = *(const float *) (panel + 4 * ((GROUPS + 1) * nc + c));
                block[c][0] = vfmaq_n_f32(block[c][0], vcvtq_f32_s32(sum[c][0]), d);
                block[c][1] = vfmaq_n_f32(block[c][1], vcvtq_f32_s32(sum[c][1]), d);
            }
            panel += 4 * (GROUPS + 2) * nc;
        }
        UNROLL for (int c = 0; c < nc; ++c) {
            float * to = s + TQ1_25_TILE * c + at;
            UNROLL for (int k = 0; k < 2; ++k) {
                const float32x4_t t = i == 0 ? vdupq_n_f32(0.0f) : vld1q_f32(to + 4 * k);
                vst1q_f32(to + 4 * k, vfmaq_f32(t, block[c][k], vld1q_f32(scales + 4 * k)));
            }
        }
    }
}

DOTPROD INLINE void gemm(int parts, int64_t units, int nc, float * s, const uint8_t * w, const int8_t * panel) {
    for (int at = 0; at < TQ1_25_TILE; at += 8) {
#define PRODUCT(parts, nc) eight_rows(parts, units, nc, s, w, at, panel)
        BY_COLUMNS(parts, nc, PRODUCT)
    }
}

DOTPROD APART void gemm_64(int64_t units, int nc, float * s, const uint8_t * w, const int8_t * panel) {
    gemm(PARTS_64, units, nc, s, w, panel);
}
DOTPROD APART void gemm_128(int64_t units, int nc, float * s, const uint8_t * w, const int8_t * panel) {
    gemm(PARTS, units, nc, s, w, panel);
}

DOTPROD void tq1_25_gemm_dotprod(int parts, int64_t units, int nc, float * s, const uint8_t * w, const int8_t * panel) {
    (parts == PARTS_64 ? gemm_64 : gemm_128)(units, nc, s, w, panel);
}

void tq1_25_decode_dotprod(int parts, tq1_25_unit x, uint8_t * w) {
    int8x16x2_t of_lane[TQ1_25_GROUP];
    UNROLL for (int lane = 0; lane < TQ1_25_GROUP; ++lane) { of_lane[lane] = lane_of_codes(lane, 1); }
    for (int at = 0; at < TQ1_25_TILE; at += 16) {
        int8_t * of_rows = (int8_t *) w + at / 16 * TQ1_25_DECODED_SIXTEEN(parts);
        for (int j = 0; j < parts; ++j) {
            const tq1_25_part * part = x.part + j;
            const uint8x16_t signs = vld1q_u8(part->sign + at);
            UNROLL for (int g = 0; g < 4; ++g) {
                uint8x16_t code[2];
                two_codes(g, vld1q_u8(part->qs[g] + at), signs, code);
                UNROLL for (int h = 0; h < 2; ++h) {
                    int8x16_t weights[4];
                    sixteen_rows(of_lane, code[h], weights);
                    int8_t * to = of_rows + 64 * (GROUPS * j + 4 * h + g);
                    UNROLL for (int k = 0; k < 4; ++k) { vst1q_s8(to + 16 * k, weights[k]); }
                }
            }
        }
    }
    put_scales(x.d, (float *) (w + 4 * TQ1_25_DECODED_SIXTEEN(parts)));
}

#endif

// Tables and codes for NEON: look up bytes by code, high and low parts separately.

#include "arm.h"

#ifdef TQ1_25_ARM

// Entries of a group by code: 32 high parts, then 32 low ones (TQ1_25_SPLIT). Groups are in the order of the lookups, the two groups of a
// byte of slots one after the other, so that loads need only a growing address.
enum { ENTRIES = 64 };
#define GROUP_AT(u) ((u) / 2 + (u) % 2 * 4)

TQ1_25_ASSERT(TQ1_25_QK8_0 / TQ1_25_GROUP * ENTRIES == TQ1_25_TABLE, "the size of a table");

// ---- tables ----

void tq1_25_table_neon(int64_t nq, const tq1_25_q8_0 * y, int8_t * table, float * d) {
    int8x16_t of_slot[TQ1_25_GROUP];
    UNROLL for (int lane = 0; lane < TQ1_25_GROUP; ++lane) {
        of_slot[lane] = vld1q_s8(tq1_25_lanes[lane]);
        LOADED(of_slot[lane]);
    }
    for (int64_t i = 0; i < nq; ++i, ++y) {
        d[i] = fp16(&y->d);
        for (int u = 0; u < GROUPS; ++u, table += ENTRIES) {
            const int8_t * q = y->qs + TQ1_25_GROUP * GROUP_AT(u);
            int16x8_t t[2] = { vdupq_n_s16(0), vdupq_n_s16(0) };
            UNROLL for (int lane = 0; lane < TQ1_25_GROUP; ++lane) {
                const int8x16_t of_lane = vld1q_dup_s8(q + lane);
                t[0] = vmlal_s8(t[0], vget_low_s8(of_slot[lane]), vget_low_s8(of_lane));
                t[1] = vmlal_high_s8(t[1], of_slot[lane], of_lane);
            }
            int8x8_t high[2], low[2];
            UNROLL for (int k = 0; k < 2; ++k) {
                const int16x8_t part = vqrdmulhq_n_s16(t[k], (32768 + TQ1_25_SPLIT / 2) / TQ1_25_SPLIT);
                high[k] = vmovn_s16(part);
                low[k] = vmovn_s16(vmlsq_n_s16(t[k], part, TQ1_25_SPLIT));
            }
            const int8x16_t h = vcombine_s8(high[0], high[1]), l = vcombine_s8(low[0], low[1]);
            vst1q_s8(table, h);
            vst1q_s8(table + 16, vnegq_s8(h));
            vst1q_s8(table + 32, l);
            vst1q_s8(table + 48, vnegq_s8(l));
        }
    }
}

// Joins the high and low parts of sixteen rows' sums and adds them, scaled, to block[4].
INLINE void flush(int8x16_t high, int8x16_t low, float d, float32x4_t * block) {
    const int8x16_t split = vdupq_n_s8(TQ1_25_SPLIT);
    const int16x8_t lower = vaddw_s8(vmull_s8(vget_low_s8(high), vget_low_s8(split)), vget_low_s8(low));
    const int16x8_t upper = vaddw_high_s8(vmull_high_s8(high, split), low);
    const float32x4_t f[4] = { vcvtq_f32_s32(vmovl_s16(vget_low_s16(lower))), vcvtq_f32_s32(vmovl_high_s16(lower)),
                               vcvtq_f32_s32(vmovl_s16(vget_low_s16(upper))), vcvtq_f32_s32(vmovl_high_s16(upper)) };
    UNROLL for (int k = 0; k < 4; ++k) { block[k] = vfmaq_n_f32(block[k], f[k], d); }
}

// ---- one vector ----

enum { AT_ONCE = 2 }; // times sixteen rows: these sums and the block's fill sixteen registers

INLINE void gemv(int parts, int64_t n, float * s, const void * x, const int8_t * table, const float * d) {
    const tq1_25_part * part = (const tq1_25_part *) x;
    for (int row = 0; row < TQ1_25_TILE; row += 4) {
        vst1q_f32(s + row, vdupq_n_f32(0.0f));
    }
    for (int64_t i = 0; i < n / (parts * TQ1_25_QK8_0); ++i, table += GROUPS * ENTRIES * parts, d += parts) {
        const uint16_t * of_rows = (const uint16_t *) (part + parts);
        for (int at = 0; at < TQ1_25_TILE; at += 16 * AT_ONCE) {
            float32x4_t block[4 * AT_ONCE];
            UNROLL for (int k = 0; k < 4 * AT_ONCE; ++k) { block[k] = vdupq_n_f32(0.0f); }
            const int8_t * entries = table;
            for (int j = 0; j < parts; ++j) {
                if (at == 0) {
                    prefetch_part(part + j, j, of_rows);
                }
                int8x16_t high[AT_ONCE], low[AT_ONCE];
                uint8x16_t signs[AT_ONCE], code[AT_ONCE][2];
                UNROLL for (int r = 0; r < AT_ONCE; ++r) { signs[r] = vld1q_u8(part[j].sign + at + 16 * r); }
                UNROLL for (int u = 0; u < GROUPS; ++u) {
                    const int8x16x2_t h = vld1q_s8_x2(entries);
                    entries += ENTRIES / 2;
                    ADVANCED(entries);
                    const int8x16x2_t l = vld1q_s8_x2(entries);
                    entries += ENTRIES / 2;
                    ADVANCED(entries);
                    UNROLL for (int r = 0; r < AT_ONCE; ++r) {
                        if (u % 2 == 0) {
                            two_codes(u / 2, vld1q_u8(part[j].qs[u / 2] + at + 16 * r), signs[r], code[r]);
                        }
                        const int8x16_t of_high = vqtbl2q_s8(h, code[r][u % 2]), of_low = vqtbl2q_s8(l, code[r][u % 2]);
                        high[r] = u == 0 ? of_high : vaddq_s8(high[r], of_high);
                        low[r] = u == 0 ? of_low : vaddq_s8(low[r], of_low);
                        IN_ORDER(high[r]);
                        IN_ORDER(low[r]);
                    }
                }
                UNROLL for (int r = 0; r < AT_ONCE; ++r) { flush(high[r], low[r], d[j], block + 4 * r); }
            }
            UNROLL for (int r = 0; r < 2 * AT_ONCE; ++r) {
                float32x4_t scale[2];
                scales_of_rows(of_rows + at / 4, r, scale);
                float * to = s + at + 8 * r;
                vst1q_f32(to, vfmaq_f32(vld1q_f32(to), block[2 * r], scale[0]));
                vst1q_f32(to + 4, vfmaq_f32(vld1q_f32(to + 4), block[2 * r + 1], scale[1]));
            }
        }
        part = (const tq1_25_part *) (of_rows + TQ1_25_TILE);
    }
}

APART void gemv_64(int64_t n, float * s, const void * x, const int8_t * table, const float * d) { gemv(PARTS_64, n, s, x, table, d); }
APART void gemv_128(int64_t n, float * s, const void * x, const int8_t * table, const float * d) { gemv(PARTS, n, s, x, table, d); }
APART void gemv_256(int64_t n, float * s, const void * x, const int8_t * table, const float * d) { gemv(PARTS_STQ1_0, n, s, x, table, d); }

void tq1_25_gemv_neon(int parts, int64_t n, float * s, const void * x, const int8_t * table, const float * d) {
    (parts == PARTS_64 ? gemv_64 : parts == PARTS ? gemv_128 : gemv_256)(n, s, x, table, d);
}

// ---- several vectors ----

INLINE void expand(int parts, const tq1_25_unit x[2], tq1_25_codes * codes) {
    for (int at = 0; at < TQ1_25_TILE; at += 16) {
        for (int j = 0; j < parts; ++j) {
            const tq1_25_part * part = x[0].part + j;
            const uint8x16_t signs = vld1q_u8(part->sign + at);
            UNROLL for (int g = 0; g < 4; ++g) {
                uint8x16_t code[2];
                two_codes(g, vld1q_u8(part->qs[g] + at), signs, code);
                vst1q_u8(codes->neon.code[GROUPS * j + g] + at, code[0]);
                vst1q_u8(codes->neon.code[GROUPS * j + 4 + g] + at, code[1]);
            }
        }
    }
    put_scales(x[0].d, codes->neon.d);
}

void tq1_25_expand_neon(int parts, const tq1_25_unit x[2], tq1_25_codes * codes) {
    if (parts == PARTS_64) { // constants
        expand(PARTS_64, x, codes);
    } else {
        expand(PARTS, x, codes);
    }
}

// 32 rows by nc columns.
INLINE void columns(int parts, int nc, const tq1_25_codes * codes, int at, const int8_t * table, const float * d, float * sums) {
    float32x4_t block[2][4 * AT_ONCE];
    UNROLL for (int c = 0; c < nc; ++c) {
        UNROLL for (int k = 0; k < 4 * AT_ONCE; ++k) { block[c][k] = vdupq_n_f32(0.0f); }
    }
    for (int j = 0; j < parts; ++j) {
        int8x16_t high[2][AT_ONCE], low[2][AT_ONCE];
        UNROLL for (int u = 0; u < GROUPS; ++u) {
            uint8x16_t code[AT_ONCE];
            UNROLL for (int r = 0; r < AT_ONCE; ++r) { code[r] = vld1q_u8(codes->neon.code[GROUPS * j + GROUP_AT(u)] + at + 16 * r); }
            UNROLL for (int c = 0; c < nc; ++c) {
                const int8_t * entries = table + TQ1_25_TABLE * parts * c + ENTRIES * (GROUPS * j + u);
                const int8x16x2_t h = vld1q_s8_x2(entries), l = vld1q_s8_x2(entries + 32);
                UNROLL for (int r = 0; r < AT_ONCE; ++r) {
                    const int8x16_t of_high = vqtbl2q_s8(h, code[r]), of_low = vqtbl2q_s8(l, code[r]);
                    high[c][r] = u == 0 ? of_high : vaddq_s8(high[c][r], of_high);
                    low[c][r] = u == 0 ? of_low : vaddq_s8(low[c][r], of_low);
                    IN_ORDER(high[c][r]);
                    IN_ORDER(low[c][r]);
                }
            }
        }
        UNROLL for (int c = 0; c < nc; ++c) {
            UNROLL for (int r = 0; r < AT_ONCE; ++r) { flush(high[c][r], low[c][r], d[parts * c + j], block[c] + 4 * r); }
        }
    }
    UNROLL for (int c = 0; c < nc; ++c) {
        UNROLL for (int k = 0; k < 4 * AT_ONCE; ++k) {
            float * to = sums + TQ1_25_TILE * c + at + 4 * k;
            vst1q_f32(to, vfmaq_f32(vld1q_f32(to), block[c][k], vld1q_f32(codes->neon.d + at + 4 * k)));
        }
    }
}

INLINE void lookup(int parts, const tq1_25_codes * codes, int nc, const int8_t * table, const float * d, float * sums) {
    for (int at = 0; at < TQ1_25_TILE; at += 16 * AT_ONCE) {
        int c = 0;
        for (; c + 1 < nc; c += 2) {
            columns(parts, 2, codes, at, table + TQ1_25_TABLE * parts * c, d + parts * c, sums + TQ1_25_TILE * c);
        }
        if (c < nc) {
            columns(parts, 1, codes, at, table + TQ1_25_TABLE * parts * c, d + parts * c, sums + TQ1_25_TILE * c);
        }
    }
}

#define PARAMETERS const tq1_25_codes *codes, int nc, const int8_t *table, const float *d, float *sums
APART void lookup_64(PARAMETERS) { lookup(PARTS_64, codes, nc, table, d, sums); }
APART void lookup_128(PARAMETERS) { lookup(PARTS, codes, nc, table, d, sums); }

void tq1_25_lookup_neon(int parts, PARAMETERS) { (parts == PARTS_64 ? lookup_64 : lookup_128)(codes, nc, table, d, sums); }

// The sums are in the order of the rows already.
void tq1_25_store_neon(float * s, const float * sums, bool add) {
    for (int r = 0; r < TQ1_25_TILE; r += 4) {
        const float32x4_t v = vld1q_f32(sums + r);
        vst1q_f32(s + r, add ? vaddq_f32(v, vld1q_f32(s + r)) : v);
    }
}

#endif

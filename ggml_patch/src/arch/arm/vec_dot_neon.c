// Dot products for NEON. vec_dot_dotprod.c includes this file to multiply with sdot instead.

#include "arm.h"

#ifdef TQ1_25_ARM

#include <string.h>

#ifdef NEON_DOTPROD
#    define NAME(name) name##_dotprod
#    define FOR DOTPROD
typedef int32x4_t sums;

FOR INLINE sums no_sums(void) { return vdupq_n_s32(0); }
FOR INLINE sums add(sums s, int8x16_t w, int8x16_t y) { return vdotq_s32(s, w, y); }
FOR INLINE int32x4_t fours(sums s) { return s; }
#else
#    define NAME(name) name##_neon
#    define FOR
typedef struct {
    int16x8_t lower, upper;
} sums; // of up to 255 products

FOR INLINE sums no_sums(void) {
    const sums none = { vdupq_n_s16(0), vdupq_n_s16(0) };
    return none;
}
FOR INLINE sums add(sums s, int8x16_t w, int8x16_t y) {
    s.lower = vmlal_s8(s.lower, vget_low_s8(w), vget_low_s8(y));
    s.upper = vmlal_high_s8(s.upper, w, y);
    return s;
}
// Dword k: the sums of bytes 4k .. 4k + 3.
FOR INLINE int32x4_t fours(sums s) { return vpaddq_s32(vpaddlq_s16(s.lower), vpaddlq_s16(s.upper)); }
#endif

// Sixteen codes. The sign of byte i is the bit of signs[i] that is set in bit[i].
FOR INLINE uint8x16_t codes(uint8x16_t slots, uint8x16_t signs, uint8x16_t bit) { return with_sign(slots, vtstq_u8(signs, bit)); }

// The scales of four Q8_0 blocks.
FOR INLINE float32x4_t four_scales(const tq1_25_q8_0 * y) {
    const uint16x4_t d = vset_lane_u16(y[3].d, vset_lane_u16(y[2].d, vset_lane_u16(y[1].d, vdup_n_u16(y[0].d), 1), 2), 3);
    return vcvt_f32_f16(vreinterpret_f16_u16(d));
}

// Spreads the four bytes with the signs of 32 groups: byte i becomes sign[to[i]].
FOR INLINE uint8x16_t spread_signs(const uint8_t sign[4], uint8x16_t to) {
    uint32_t word;
    memcpy(&word, sign, sizeof(word));
    return vqtbl1q_u8(vreinterpretq_u8_u32(vdupq_n_u32(word)), to);
}

// The lookup yields weights by lane. The activations are deinterleaved to match, so that each dword collects the sums of one Q8_0 block
// and four scales apply at once. With two scales, x is pairs of TQ1_25_64 blocks.
FOR INLINE float vec_dot(bool two_scales, int64_t n, const void * x, const tq1_25_q8_0 * y) {
    static const uint8_t spread_to[16] = { 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3 };
    uint8x16_t spread = vld1q_u8(spread_to);
    uint8x16_t lower_bit = vreinterpretq_u8_u32(vdupq_n_u32(0x08040201)), upper_bit = vreinterpretq_u8_u32(vdupq_n_u32(0x80402010));
    LOADED(spread);
    LOADED(lower_bit);
    LOADED(upper_bit);
    int8x16x2_t of_lane[TQ1_25_GROUP];
    UNROLL for (int lane = 0; lane < TQ1_25_GROUP; ++lane) { of_lane[lane] = lane_of_codes(lane, 0); }
    float32x4_t total = vdupq_n_f32(0.0f);
    for (int64_t i = 0; i < n / QK_TQ1_25; ++i, y += PARTS) {
        const block_tq1_25 * one = (const block_tq1_25 *) x + i;
        const block_tq1_25_64 * two = (const block_tq1_25_64 *) x + 2 * i;
        const uint8x16_t qs = two_scales ? vcombine_u8(vld1_u8(two[0].qs), vld1_u8(two[1].qs)) : vld1q_u8(one->qs);
        uint8_t of_two[4];
        if (two_scales) {
            memcpy(of_two, two[0].sign, 2);
            memcpy(of_two + 2, two[1].sign, 2);
        }
        const uint8x16_t signs = spread_signs(two_scales ? of_two : one->sign, spread);
        // byte 4k + i: group 8k + i, and 8k + 4 + i
        const uint8x16_t code[2] = { codes(vandq_u8(qs, vdupq_n_u8(15)), signs, lower_bit), codes(vshrq_n_u8(qs, 4), signs, upper_bit) };
        sums sum = no_sums();
        UNROLL for (int h = 0; h < 2; ++h) { // half of each Q8_0 block, by lane, in the order of the codes
            const int8x16_t y0 = vld1q_s8(y[0].qs + 16 * h), y1 = vld1q_s8(y[1].qs + 16 * h);
            const int8x16_t y2 = vld1q_s8(y[2].qs + 16 * h), y3 = vld1q_s8(y[3].qs + 16 * h);
            const int8x16_t even01 = vuzp1q_s8(y0, y1), even23 = vuzp1q_s8(y2, y3), odd01 = vuzp2q_s8(y0, y1), odd23 = vuzp2q_s8(y2, y3);
            sum = add(sum, vqtbl2q_s8(of_lane[0], code[h]), vuzp1q_s8(even01, even23));
            sum = add(sum, vqtbl2q_s8(of_lane[1], code[h]), vuzp1q_s8(odd01, odd23));
            sum = add(sum, vqtbl2q_s8(of_lane[2], code[h]), vuzp2q_s8(even01, even23));
            sum = add(sum, vqtbl2q_s8(of_lane[3], code[h]), vuzp2q_s8(odd01, odd23));
        }
        const float32x4_t dy = four_scales(y);
        const float32x4_t d = two_scales ? vmulq_f32(dy, vcombine_f32(vdup_n_f32(fp16(&two[0].d)), vdup_n_f32(fp16(&two[1].d))))
                                         : vmulq_n_f32(dy, fp16(&one->d));
        total = vfmaq_f32(total, vcvtq_f32_s32(fours(sum)), d);
    }
    return vaddvq_f32(total);
}

FOR void NAME(tq1_25_vec_dot)(int64_t n, float * s, const void * x, const tq1_25_q8_0 * y) { *s = vec_dot(false, n, x, y); }

FOR APART float pairs(int64_t n, const void * x, const tq1_25_q8_0 * y) { return vec_dot(true, n, x, y); }

FOR void NAME(tq1_25_64_vec_dot)(int64_t n, float * s, const void * x, const tq1_25_q8_0 * y) {
    *s = pairs(n, x, y);
    if (n % QK_TQ1_25) {
        const last_64 last = get_last_64(n, x, y);
        *s += pairs(QK_TQ1_25, last.x, last.y);
    }
}

// A lane of a chunk's sixteen groups is sixteen consecutive weights. Two chunks at a time meet four Q8_0 blocks.
FOR void NAME(stq1_0_vec_dot)(int64_t n, float * s, const void * blocks, const tq1_25_q8_0 * y) {
    const block_stq1_0 * x = (const block_stq1_0 *) blocks;
    static const uint8_t spread_to[2][16] = { { 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1 },
                                              { 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3 } };
    uint8x16_t spread[2] = { vld1q_u8(spread_to[0]), vld1q_u8(spread_to[1]) };
    uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    LOADED(spread[0]);
    LOADED(spread[1]);
    LOADED(bit);
    int8x16x2_t of_lane[TQ1_25_GROUP];
    UNROLL for (int lane = 0; lane < TQ1_25_GROUP; ++lane) { of_lane[lane] = lane_of_codes(lane, 0); }
    float32x4_t total = vdupq_n_f32(0.0f);
    for (int64_t i = 0; i < n / QK_STQ1_0; ++i, ++x) {
        float32x4_t block = vdupq_n_f32(0.0f);
        for (int h = 0; h < 2; ++h, y += 4) {
            const uint8x16_t qs = vld1q_u8(x->qs + 16 * h), low = vandq_u8(qs, vdupq_n_u8(15)), high = vshrq_n_u8(qs, 4);
            const uint8x16_t slots[2] = { vzip1q_u8(low, high), vzip2q_u8(low, high) };
            int32x4_t of_half[4];
            UNROLL for (int c = 0; c < 2; ++c) {
                const uint8x16_t code = codes(slots[c], spread_signs(x->sign + 4 * h, spread[c]), bit);
                UNROLL for (int j = 0; j < 2; ++j) {
                    const tq1_25_q8_0 * q = y + 2 * c + j;
                    const sums first = add(no_sums(), vqtbl2q_s8(of_lane[2 * j], code), vld1q_s8(q->qs));
                    of_half[2 * c + j] = fours(add(first, vqtbl2q_s8(of_lane[2 * j + 1], code), vld1q_s8(q->qs + STQ1_0_LANE)));
                }
            }
            const int32x4_t of_blocks = vpaddq_s32(vpaddq_s32(of_half[0], of_half[1]), vpaddq_s32(of_half[2], of_half[3]));
            block = vfmaq_f32(block, vcvtq_f32_s32(of_blocks), four_scales(y));
        }
        total = vfmaq_n_f32(total, block, fp16(&x->d));
    }
    *s = vaddvq_f32(total);
}

#endif

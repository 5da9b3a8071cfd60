// What the kernels for 64-bit, little-endian ARM share.

#pragma once

#include "../../internal.h"
#include "kernels.h"

#ifdef TQ1_25_ARM

#    include <arm_neon.h>

#    ifdef __clang__
#        define TARGET(isa) __attribute__((target(isa)))
#        define LOADED_PAIR(v) // Clang accepts no pair there and needs no help to keep one
#    else // as in arm_neon.h: "+isa" alone is less than its functions need
#        define TARGET(isa) __attribute__((target("arch=armv8.2-a+" isa)))
#        define LOADED_PAIR(v) LOADED(v)
#    endif
// Without this, GCC loads constants anew in each iteration.
#    define LOADED(v) __asm__("" : "+w"(v))
// Without this, GCC computes one sum after the other and keeps what they share in more registers than there are.
#    define IN_ORDER(v) __asm__ volatile("" : "+w"(v))
// Without this, GCC computes an address for each load of an unrolled loop, although a load can advance it.
#    define ADVANCED(p) __asm__("" : "+r"(p))

// Empty if the whole build has it, since its -march may offer more than the attribute.
#ifdef __ARM_FEATURE_DOTPROD
#    define DOTPROD
#else
#    define DOTPROD TARGET("dotprod")
#endif
#ifdef __ARM_FEATURE_MATMUL_INT8
#    define I8MM
#else
#    define I8MM TARGET("i8mm")
#endif

// A lane of all 32 codes, sign << 4 | slot, plus a constant.
INLINE int8x16x2_t lane_of_codes(int lane, int8_t plus) {
    int8_t codes[32]; // GCC keeps a loaded pair in its two registers, but copies any other pair
    vst1q_s8(codes, vaddq_s8(vdupq_n_s8(plus), vld1q_s8(tq1_25_lanes[lane])));
    vst1q_s8(codes + 16, vsubq_s8(vdupq_n_s8(plus), vld1q_s8(tq1_25_lanes[lane])));
    int8x16x2_t both = vld1q_s8_x2(codes);
    LOADED_PAIR(both);
    return both;
}

// Codes from slots and from bytes with the sign in bit 4.
INLINE uint8x16_t with_sign(uint8x16_t slots, uint8x16_t sign) { return vbslq_u8(vdupq_n_u8(16), sign, slots); }

INLINE float fp16(const uint16_t * d) { return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vld1_dup_u16(d))), 0); }

// The codes of groups g and g + 4 of sixteen rows, from the bytes that hold their slots and from the rows' signs.
INLINE void two_codes(int g, uint8x16_t slots, uint8x16_t signs, uint8x16_t codes[2]) {
    const uint8x16_t both = vdupq_n_u8(0x11), low = vdupq_n_u8(15);
    uint8x16_t bits; // bit 0: the sign of group g, bit 4: that of group g + 4
    switch (g) {     // shifts need constants
        case 0:  bits = vandq_u8(signs, both); break;
        case 1:  bits = vandq_u8(vshrq_n_u8(signs, 1), both); break;
        case 2:  bits = vandq_u8(vshrq_n_u8(signs, 2), both); break;
        default: bits = vandq_u8(vshrq_n_u8(signs, 3), both); break;
    }
    codes[0] = vbslq_u8(low, slots, vshlq_n_u8(bits, 4));
    codes[1] = vsriq_n_u8(bits, slots, 4);
}

// The scales of rows 8k .. 8k + 7 of a tile.
INLINE void scales_of_rows(const uint16_t * d, int k, float32x4_t out[2]) {
    const uint16_t *even = d + TQ1_25_PLACE(8 * k), *odd = d + TQ1_25_PLACE(8 * k + 1);
    const uint16x4x2_t rows = vzip_u16(vld1_u16(even), vld1_u16(odd));
    out[0] = vcvt_f32_f16(vreinterpret_f16_u16(rows.val[0]));
    out[1] = vcvt_f32_f16(vreinterpret_f16_u16(rows.val[1]));
}

// All 64 scales of a tile, in the order of the rows.
INLINE void put_scales(const uint16_t * d, float * to) {
    for (int k = 0; k < TQ1_25_TILE / 8; ++k) {
        float32x4_t scale[2];
        scales_of_rows(d, k, scale);
        vst1q_f32(to + 8 * k, scale[0]);
        vst1q_f32(to + 8 * k + 4, scale[1]);
    }
}

// The weights of one group of sixteen rows, four bytes per row. One st4 would do the same, more slowly on most CPUs.
INLINE void sixteen_rows(const int8x16x2_t of_lane[TQ1_25_GROUP], uint8x16_t code, int8x16_t weights[4]) {
    const int8x16_t l0 = vqtbl2q_s8(of_lane[0], code), l1 = vqtbl2q_s8(of_lane[1], code);
    const int8x16_t l2 = vqtbl2q_s8(of_lane[2], code), l3 = vqtbl2q_s8(of_lane[3], code);
    const int16x8_t a0 = vreinterpretq_s16_s8(vzip1q_s8(l0, l1)), a1 = vreinterpretq_s16_s8(vzip2q_s8(l0, l1));
    const int16x8_t b0 = vreinterpretq_s16_s8(vzip1q_s8(l2, l3)), b1 = vreinterpretq_s16_s8(vzip2q_s8(l2, l3));
    weights[0] = vreinterpretq_s8_s16(vzip1q_s16(a0, b0));
    weights[1] = vreinterpretq_s8_s16(vzip2q_s16(a0, b0));
    weights[2] = vreinterpretq_s8_s16(vzip1q_s16(a1, b1));
    weights[3] = vreinterpretq_s8_s16(vzip2q_s16(a1, b1));
}

#endif

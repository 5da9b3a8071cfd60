// Attention for NEON.

#include "arm.h"

#ifdef TQ1_25_ARM

#include <math.h>

#define TARGET_ATTENTION
#define F float32x4_t
#define LANES 4
#define SUMS 8
#define MOST_ROWS 6

#define f_set vdupq_n_f32
#define f_set_f16(p) vdupq_n_f32(fp16(p))
#define f_load vld1q_f32
#define f_store vst1q_f32
#define f_add vaddq_f32
#define f_sub vsubq_f32
#define f_mul vmulq_f32
#define f_div vdivq_f32
#define f_fma(a, b, c) vfmaq_f32(c, a, b)
#define f_max(a, b) vbslq_f32(vcgtq_f32(a, b), a, b)
#define f_abs vabsq_f32
#define f_copysign(magnitude, sign) vbslq_f32(vdupq_n_u32(0x80000000u), sign, magnitude)
#define f_scale_exp(p, z) vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), vshlq_n_s32(vreinterpretq_s32_f32(z), 23)))
#define f_zero_below(x, limit, v) vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), vcltq_f32(x, limit)))

#define load_f16(p) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))
#define load_bf16(p) vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))

INLINE F load_q8(const int8_t * p) {
    int32_t four;
    memcpy(&four, p, sizeof(four));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
}

INLINE void reduce(const F v[LANES], float * to) { f_store(to, vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3]))); }

#include "../attention.inc"

ATTENTION_KERNELS(neon)

#endif

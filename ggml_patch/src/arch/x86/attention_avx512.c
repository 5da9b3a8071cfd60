// Attention for AVX-512.

#include "x86.h"

#ifdef TQ1_25_X86

#include <math.h>

#define TARGET_ATTENTION TARGET(AVX512)
#define F __m512
#define LANES 16
#define SUMS 16
#define MOST_ROWS 16

#define f_set _mm512_set1_ps
#define f_set_f16(p) _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(*(p))))
#define f_load _mm512_loadu_ps
#define f_store _mm512_storeu_ps
#define f_add _mm512_add_ps
#define f_sub _mm512_sub_ps
#define f_mul _mm512_mul_ps
#define f_div _mm512_div_ps
#define f_fma _mm512_fmadd_ps
#define f_max _mm512_max_ps
#define f_abs _mm512_abs_ps
#define f_copysign(magnitude, sign) _mm512_or_ps(magnitude, _mm512_and_ps(_mm512_set1_ps(-0.0f), sign))
#define f_scale_exp(p, z) _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(z), 23)))
#define f_zero_below(x, limit, v) _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), v)

#define load_f16(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) (p)))
#define load_bf16(p) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) (p))), 16))
#define load_q8(p) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) (p))))

TARGET(AVX512) INLINE void reduce(const F v[LANES], float * to) {
    F pair[8], quad[4], half[2];
    UNROLL for (int i = 0; i < 8; ++i) {
        pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    }
    UNROLL for (int i = 0; i < 4; ++i) {
        quad[i] =
            _mm512_add_ps(_mm512_shuffle_ps(pair[2 * i], pair[2 * i + 1], 0x44), _mm512_shuffle_ps(pair[2 * i], pair[2 * i + 1], 0xee));
    }
    UNROLL for (int i = 0; i < 2; ++i) {
        half[i] = _mm512_add_ps(_mm512_shuffle_f32x4(quad[2 * i], quad[2 * i + 1], 0x88),
                                _mm512_shuffle_f32x4(quad[2 * i], quad[2 * i + 1], 0xdd));
    }
    f_store(to, _mm512_add_ps(_mm512_shuffle_f32x4(half[0], half[1], 0x88), _mm512_shuffle_f32x4(half[0], half[1], 0xdd)));
}

#include "../attention.inc"

ATTENTION_KERNELS(avx512)

#endif

// Attention for AVX2 with FMA and F16C.

#include "x86.h"

#ifdef TQ1_25_X86

#include <math.h>

#define TARGET_ATTENTION TARGET(AVX2)
#define F __m256
#define LANES 8
#define SUMS 8
#define MOST_ROWS 6

#define f_set _mm256_set1_ps
#define f_set_f16(p) _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(*(p))))
#define f_load _mm256_loadu_ps
#define f_store _mm256_storeu_ps
#define f_add _mm256_add_ps
#define f_sub _mm256_sub_ps
#define f_mul _mm256_mul_ps
#define f_div _mm256_div_ps
#define f_fma _mm256_fmadd_ps
#define f_max _mm256_max_ps
#define f_abs(x) _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x)
#define f_copysign(magnitude, sign) _mm256_or_ps(magnitude, _mm256_and_ps(_mm256_set1_ps(-0.0f), sign))
#define f_scale_exp(p, z) _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(z), 23)))
#define f_zero_below(x, limit, v) _mm256_andnot_ps(_mm256_cmp_ps(x, limit, _CMP_LT_OQ), v)

#define load_f16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (p)))
#define load_bf16(p) _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) (p))), 16))
#define load_q8(p) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) (p))))

TARGET(AVX2) INLINE void reduce(const F v[LANES], float * to) {
    F pair[4], quad[2];
    UNROLL for (int i = 0; i < 4; ++i) {
        pair[i] = _mm256_add_ps(_mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    }
    UNROLL for (int i = 0; i < 2; ++i) {
        quad[i] =
            _mm256_add_ps(_mm256_shuffle_ps(pair[2 * i], pair[2 * i + 1], 0x44), _mm256_shuffle_ps(pair[2 * i], pair[2 * i + 1], 0xee));
    }
    f_store(to, _mm256_add_ps(_mm256_permute2f128_ps(quad[0], quad[1], 0x20), _mm256_permute2f128_ps(quad[0], quad[1], 0x31)));
}

#include "../attention.inc"

ATTENTION_KERNELS(avx2)

#endif

// What the x86 kernels share.

#pragma once

#include "../../internal.h"
#include "kernels.h"

#ifdef TQ1_25_X86

#    include <immintrin.h>

#    if defined(_MSC_VER) && !defined(__clang__)
#        define TARGET(isa)
#        define IN_ORDER(v)
#        define OPAQUE(v)
#        define LOADED(v)
#    else
#        define TARGET(isa) __attribute__((target(isa)))
// Without this, GCC adds integers as a tree, with more live terms than registers: two thirds of the rate.
#        define IN_ORDER(v) __asm__("" : "+v"(v))
// Without this, GCC shifts a whole word for each of its bytes.
#        define OPAQUE(v) __asm__("" : "+r"(v))
// Without this, -march=native repeats a load for each use: three quarters of the rate.
#        define LOADED(v) __asm__("" : "+v"(v))
#    endif

#define AVX2 "avx2,fma,f16c"
#ifndef AVXVNNI
#    define AVXVNNI AVX2 ",avxvnni"
#endif
#define AVX512 AVX2 ",avx512f,avx512dq,avx512bw,avx512vl"
#define AVX512VNNI AVX512 ",avx512vnni"

// The slots and the signs of two blocks, as one of TQ1_25 has them.
TARGET(AVX2) INLINE __m128i slots_of_two(const block_tq1_25_64 x[2]) {
    return _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i *) x[0].qs), _mm_loadl_epi64((const __m128i *) x[1].qs));
}

INLINE int32_t signs_of_two(const block_tq1_25_64 x[2]) {
    return (int32_t) (x[0].sign[0] | x[0].sign[1] << 8 | x[1].sign[0] << 16 | (uint32_t) x[1].sign[1] << 24);
}

// Two lanes of each slot, plus one, since maddubs wants one factor unsigned. A group's four activations are a dword. Its low word meets
// lanes 0 and 1 in even words of patterns[0], its high word lanes 2 and 3 in odd ones; patterns[1] is for the words swapped.
TARGET(AVX2) INLINE void slot_patterns(__m256i patterns[2]) {
    const __m256i one = _mm256_set1_epi8(1);
    const __m128i l0 = _mm_loadu_si128((const __m128i *) tq1_25_lanes[0]), l1 = _mm_loadu_si128((const __m128i *) tq1_25_lanes[1]);
    const __m128i l2 = _mm_loadu_si128((const __m128i *) tq1_25_lanes[2]), l3 = _mm_loadu_si128((const __m128i *) tq1_25_lanes[3]);
    const __m256i l01 = _mm256_add_epi8(one, _mm256_set_m128i(_mm_unpackhi_epi8(l0, l1), _mm_unpacklo_epi8(l0, l1)));
    const __m256i l23 = _mm256_add_epi8(one, _mm256_set_m128i(_mm_unpackhi_epi8(l2, l3), _mm_unpacklo_epi8(l2, l3)));
    patterns[0] = _mm256_blend_epi16(l01, l23, 0xaa);
    patterns[1] = _mm256_blend_epi16(l23, l01, 0xaa);
}

TARGET(AVX2) INLINE __m256i swap_words(__m256i v) { return _mm256_or_si256(_mm256_slli_epi32(v, 16), _mm256_srli_epi32(v, 16)); }

// A Q8_0 block for these patterns, one dword per group: the activations; with words swapped; their sum in both words, which takes the
// one off again.
TARGET(AVX2) INLINE void group_dwords(const tq1_25_q8_0 * y, int32_t q[3][GROUPS]) {
    const __m256i y0 = _mm256_loadu_si256((const __m256i *) y->qs), pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), y0);
    _mm256_storeu_si256((__m256i *) q[0], y0);
    _mm256_storeu_si256((__m256i *) q[1], swap_words(y0));
    _mm256_storeu_si256((__m256i *) q[2], _mm256_add_epi16(pairs, swap_words(pairs)));
}

// Moves 32 sums from the order of tq1_25_tile.d to the order of the rows.
TARGET(AVX2) INLINE void order_rows(const __m256 t[4], __m256 rows[4]) {
    const __m256 r0 = _mm256_unpacklo_ps(t[0], t[1]), r1 = _mm256_unpackhi_ps(t[0], t[1]);
    const __m256 r2 = _mm256_unpacklo_ps(t[2], t[3]), r3 = _mm256_unpackhi_ps(t[2], t[3]);
    rows[0] = _mm256_permute2f128_ps(r0, r1, 0x20);
    rows[1] = _mm256_permute2f128_ps(r2, r3, 0x20);
    rows[2] = _mm256_permute2f128_ps(r0, r1, 0x31);
    rows[3] = _mm256_permute2f128_ps(r2, r3, 0x31);
}

#endif

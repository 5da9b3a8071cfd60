// What the x86 files share.

#pragma once

#include "tq1_25.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

#if defined(_MSC_VER) && !defined(__clang__)
#    define TARGET(isa)
#    define INLINE static __forceinline
#    define UNROLL
#    define IN_ORDER(v)
#else
#    define TARGET(isa) __attribute__((target(isa)))
#    define INLINE static inline __attribute__((always_inline))
#    ifdef __clang__
#        define UNROLL _Pragma("unroll")
#    else
#        define UNROLL _Pragma("GCC unroll 16")
#    endif
// GCC would add up integers as a tree, with more terms alive than there are registers: a third of the rate is lost.
#    define IN_ORDER(v) __asm__("" : "+v"(v))
#endif

#define AVX2       "avx2,fma,f16c"
#define AVXVNNI    AVX2 ",avxvnni"
#define AVX512     AVX2 ",avx512f,avx512dq,avx512bw,avx512vl"
#define AVX512VNNI AVX512 ",avx512vnni"
#define AVX512VBMI AVX512VNNI ",avx512vbmi"

enum {
    PARTS  = QK_TQ1_25 / TQ1_25_QK8_0,     // Q8_0 blocks that meet a block of weights
    GROUPS = TQ1_25_QK8_0 / TQ1_25_GROUP,  // groups that meet a Q8_0 block
};

static const int8_t lanes[TQ1_25_GROUP][16] = { TQ1_25_LANE0, TQ1_25_LANE1, TQ1_25_LANE2, TQ1_25_LANE3 };

// Weights stream by once: they are fetched into the L2 cache, 24 tiles (33 KB) ahead. The L1 cache is for the tables; what
// is fetched into it that early drives them out (half the rate), 4 to 8 tiles ahead come too late on Zen 4 (two thirds).
INLINE void prefetch_part(const tq1_25_tile * x, int part) {
    const char * p = (const char *) &x[24].part[part];
    for (size_t i = 0; i < sizeof(x->part[0]); i += 64) {
        _mm_prefetch(p + i, _MM_HINT_T1);
    }
    if (part < 2) {
        _mm_prefetch((const char *) x[24].d + 64 * part, _MM_HINT_T1);
    }
}

#endif

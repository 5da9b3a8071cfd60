// What our C files share with nobody else: attributes, prefetching, fp16, constant numbers of columns.

#pragma once

#include "isas.h"

#include <string.h>

#if defined(_MSC_VER) && !defined(__clang__)
#    define INLINE static __forceinline
#    define APART static __declspec(noinline)
#    define UNROLL
#else
#    define INLINE static inline __attribute__((always_inline))
#    define APART static __attribute__((noinline))
#    ifdef __clang__
#        define UNROLL _Pragma("unroll")
#    else
#        define UNROLL _Pragma("GCC unroll 16")
#    endif
#endif

// To the L2 cache.
#if !defined(_MSC_VER)
#    define PREFETCH(p) __builtin_prefetch(p, 0, 2)
#    define PREFETCH_WRITE(p) __builtin_prefetch(p, 1)
#elif defined(TQ1_25_X86)
#    include <immintrin.h>
#    define PREFETCH(p) _mm_prefetch((const char *) (p), _MM_HINT_T1)
#    define PREFETCH_WRITE(p) ((void) (p))
#else
#    define PREFETCH(p) ((void) (p))
#    define PREFETCH_WRITE(p) ((void) (p))
#endif

enum {
    PARTS = QK_TQ1_25 / TQ1_25_QK8_0,         // Q8_0 blocks per block of TQ1_25
    PARTS_64 = QK_TQ1_25_64 / TQ1_25_QK8_0,   // the same for TQ1_25_64
    PARTS_STQ1_0 = QK_STQ1_0 / TQ1_25_QK8_0,  // the same for STQ1_0
    GROUPS = TQ1_25_QK8_0 / TQ1_25_GROUP,     // groups per Q8_0 block
};

// The last 64 weights of a row of TQ1_25_64, completed by zeros: vec_dot takes its blocks in pairs.
typedef struct {
    block_tq1_25_64 x[2];
    tq1_25_q8_0 y[2 * PARTS_64];
} last_64;

static inline last_64 get_last_64(int64_t n, const void * x, const tq1_25_q8_0 * y) {
    last_64 last;
    memset(&last, 0, sizeof(last));
    last.x[0] = ((const block_tq1_25_64 *) x)[n / QK_TQ1_25_64 - 1];
    for (int j = 0; j < PARTS_64; ++j) {
        last.y[j] = y[n / TQ1_25_QK8_0 - PARTS_64 + j];
    }
    return last;
}

// Converts exactly, with operations that any compiler has.
static inline float tq1_25_fp16_to_float(uint16_t h) {
    union {
        uint32_t u;
        float f;
    } out, magic = { (254 - 15) << 23 };
    const uint32_t sign = (uint32_t) (h & 0x8000) << 16;
    out.u = (uint32_t) (h & 0x7fff) << 13;
    out.f *= magic.f; // moves the exponent's bias, also of subnormals
    if ((h & 0x7c00) == 0x7c00) {
        out.u |= 0xffu << 23;
    }
    out.u |= sign;
    return out.f;
}

// Weights are read once, so they are fetched 33 KB (24 tiles of TQ1_25) ahead into the L2 cache. Fetching that far into L1 evicts the
// tables (half the rate), and 4 to 8 tiles ahead is too late on Zen 4 (two thirds). Not measured on ARM.
INLINE void prefetch_part(const tq1_25_part * x, int part, const uint16_t * d) {
    enum { AHEAD = 24 * sizeof(tq1_25_tile) };
    for (size_t i = 0; i < sizeof(*x); i += 64) {
        PREFETCH((const char *) x + AHEAD + i);
    }
    if (part < 2) {
        PREFETCH((const char *) d + AHEAD + 64 * part);
    }
}

// PRODUCT(parts, nc) with a constant nc, since kernels are unrolled over columns. Kernels for different `parts` are functions of their own
// (APART), since GCC finds worse code for several in one: up to 3 % more instructions on ARM.
#define BY_COLUMNS(parts, nc, PRODUCT)           \
    switch (nc) {                                \
        case 1:  PRODUCT(parts, 1); break;       \
        case 2:  PRODUCT(parts, 2); break;       \
        case 3:  PRODUCT(parts, 3); break;       \
        case 4:  PRODUCT(parts, 4); break;       \
        case 5:  PRODUCT(parts, 5); break;       \
        default: PRODUCT(parts, TQ1_25_COLUMNS); \
    }

// Converts a unit's scales and puts them into the order of the rows.
void tq1_25_decode_scales(const uint16_t * d, float * to);

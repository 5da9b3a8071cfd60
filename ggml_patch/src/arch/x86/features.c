// Which of our instruction sets this x86 CPU and its system support.

#include "kernels.h"

#ifdef TQ1_25_X86

#ifdef _MSC_VER
#    include <intrin.h>
static void cpuid_sub(unsigned leaf, unsigned sub, unsigned r[4]) { __cpuidex((int *) r, (int) leaf, (int) sub); }
static uint64_t xcr0(void) { return _xgetbv(0); }
#else
#    include <cpuid.h>
static void cpuid_sub(unsigned leaf, unsigned sub, unsigned r[4]) {
    if (!__get_cpuid_count(leaf, sub, r, r + 1, r + 2, r + 3)) {
        r[0] = r[1] = r[2] = r[3] = 0;
    }
}
static uint64_t xcr0(void) {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t) high << 32 | low;
}
#endif

static void cpuid(unsigned leaf, unsigned r[4]) { cpuid_sub(leaf, 0, r); }

#define ALL(word, mask) (((word) & (mask)) == (mask))

int tq1_25_has_avx2(void) { // with FMA and F16C
    unsigned one[4], seven[4];
    cpuid(1, one);
    cpuid(7, seven);
    const unsigned fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
    return ALL(one[2], fma | osxsave | avx | f16c) && ALL(seven[1], 1u << 5) && ALL(xcr0(), 0x6u);
}

int tq1_25_has_avx512(void) { // F, DQ, BW, VL
    unsigned seven[4];
    cpuid(7, seven);
    return tq1_25_has_avx2() && ALL(seven[1], 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31) && ALL(xcr0(), 0xe6u);
}

int tq1_25_has_avx512vnni(void) {
    unsigned seven[4];
    cpuid(7, seven);
    return tq1_25_has_avx512() && ALL(seven[2], 1u << 11);
}

// Zen 4 and later. AMD has four vector pipes, where shuffles and additions run beside multiplications, so that lookups beat vpdpbusd
// (lookup_avx512.c). Intel has two pipes for all of them.
int tq1_25_has_zen4(void) {
    unsigned zero[4];
    cpuid(0, zero);
    const unsigned auth = 0x68747541, enti = 0x69746e65, camd = 0x444d4163;
    return tq1_25_has_avx512vnni() && zero[1] == auth && zero[3] == enti && zero[2] == camd;
}

#ifdef TQ1_25_AVXVNNI
int tq1_25_has_avxvnni(void) {
    unsigned seven[4];
    cpuid_sub(7, 1, seven);
    return tq1_25_has_avx2() && ALL(seven[0], 1u << 4);
}
#endif

#endif

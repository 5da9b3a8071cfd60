// Dot products of TQ1_25 and STQ1_0: the scalar versions and the choice of an instruction set.

#include "tq1_25.h"

#include <assert.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const int8_t lanes[TQ1_25_GROUP][16] = { TQ1_25_LANE0, TQ1_25_LANE1, TQ1_25_LANE2, TQ1_25_LANE3 };

void tq1_25_vec_dot_scalar(int64_t n, float * s, const block_tq1_25 * x, const tq1_25_q8_0 * y) {
    enum { GROUPS = TQ1_25_QK8_0 / TQ1_25_GROUP }; // of a Q8_0 block
    float total = 0.0f;
    for (int64_t i = 0; i < n / QK_TQ1_25; ++i, ++x) {
        float of_block = 0.0f;
        for (int j = 0; j < QK_TQ1_25 / TQ1_25_QK8_0; ++j, ++y) {
            int sum = 0;
            for (int g = 0; g < GROUPS; ++g) {
                const int8_t * q    = y->qs + TQ1_25_GROUP * g;
                const int      slot = tq1_25_slot(x, GROUPS * j + g);
                const int of_group  = lanes[0][slot] * q[0] + lanes[1][slot] * q[1] + lanes[2][slot] * q[2] + lanes[3][slot] * q[3];
                sum += tq1_25_negative(x, GROUPS * j + g) ? -of_group : of_group;
            }
            of_block += tq1_25_fp16_to_float(y->d) * (float) sum;
        }
        total += tq1_25_fp16_to_float(x->d) * of_block;
    }
    *s = total;
}

// A Q8_0 block meets two lanes of the sixteen groups of a chunk, in the order of the weights.
void stq1_0_vec_dot_scalar(int64_t n, float * s, const block_stq1_0 * x, const tq1_25_q8_0 * y) {
    float total = 0.0f;
    for (int64_t i = 0; i < n / QK_STQ1_0; ++i, ++x) {
        float of_block = 0.0f;
        for (int j = 0; j < QK_STQ1_0 / TQ1_25_QK8_0; ++j, ++y) {
            const int group = j / 2 * STQ1_0_LANE, lane = j % 2 * 2;
            int sum = 0;
            for (int g = 0; g < STQ1_0_LANE; ++g) {
                const int slot = stq1_0_slot(x, group + g);
                const int of_group = lanes[lane][slot] * y->qs[g] + lanes[lane + 1][slot] * y->qs[STQ1_0_LANE + g];
                sum += stq1_0_negative(x, group + g) ? -of_group : of_group;
            }
            of_block += tq1_25_fp16_to_float(y->d) * (float) sum;
        }
        total += tq1_25_fp16_to_float(x->d) * of_block;
    }
    *s = total;
}

// ---- what this CPU has ----

#if defined(__x86_64__) || defined(_M_X64)

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

static int has_avx2(void) { // with FMA and F16C
    unsigned one[4], seven[4];
    cpuid(1, one);
    cpuid(7, seven);
    const unsigned fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
    return ALL(one[2], fma | osxsave | avx | f16c) && ALL(seven[1], 1u << 5) && ALL(xcr0(), 0x6u);
}

static int has_avx512(void) { // F, DQ, BW, VL
    unsigned seven[4];
    cpuid(7, seven);
    return has_avx2() && ALL(seven[1], 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31) && ALL(xcr0(), 0xe6u);
}

static int has_avx512vnni(void) {
    unsigned seven[4];
    cpuid(7, seven);
    return has_avx512() && ALL(seven[2], 1u << 11);
}

// AMD's four vector pipes: shuffles and additions run beside multiplications, so that looking up exceeds what vpdpbusd could do
// alone (tq1_25-lookup-avx512.c). Intel's two do all of it.
static int has_zen4(void) { // and later
    unsigned zero[4];
    cpuid(0, zero);
    const unsigned auth = 0x68747541, enti = 0x69746e65, camd = 0x444d4163;
    return has_avx512vnni() && zero[1] == auth && zero[3] == enti && zero[2] == camd;
}

#ifdef TQ1_25_AVXVNNI
static int has_avxvnni(void) {
    unsigned seven[4];
    cpuid_sub(7, 1, seven);
    return has_avx2() && ALL(seven[0], 1u << 4);
}
#endif

#endif

#ifdef TQ1_25_DOTPROD

#    if defined(__linux__)
#        include <sys/auxv.h>
static int has_dotprod(void) { return (getauxval(AT_HWCAP) & 1ul << 20) != 0; }
static int has_i8mm(void) { return has_dotprod() && (getauxval(AT_HWCAP2) & 1ul << 13) != 0; }
#    elif defined(__APPLE__)
#        include <sys/sysctl.h>
static int has(const char * name) {
    int value = 0;
    size_t size = sizeof(value);
    return sysctlbyname(name, &value, &size, NULL, 0) == 0 && value == 1;
}
static int has_dotprod(void) { return has("hw.optional.arm.FEAT_DotProd"); }
static int has_i8mm(void) { return has_dotprod() && has("hw.optional.arm.FEAT_I8MM"); }
#    elif defined(_WIN32)
#        include <windows.h>
static int has_dotprod(void) { return IsProcessorFeaturePresent(43); } // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE
static int has_i8mm(void) { return has_dotprod() && IsProcessorFeaturePresent(66); } // PF_ARM_V82_I8MM_INSTRUCTIONS_AVAILABLE
#    else // what the build was told
static int has_dotprod(void) {
#        ifdef __ARM_FEATURE_DOTPROD
    return 1;
#        else
    return 0;
#        endif
}
static int has_i8mm(void) {
#        ifdef __ARM_FEATURE_MATMUL_INT8
    return 1;
#        else
    return 0;
#        endif
}
#    endif

#endif

// ---- the choice ----

#ifdef _MSC_VER // aligned pointers are read and written whole
#    define LOAD(p)     (*(void * volatile *) (p))
#    define STORE(p, v) (*(void * volatile *) (p) = (void *) (v))
#else
#    define LOAD(p)     __atomic_load_n(p, __ATOMIC_RELAXED)
#    define STORE(p, v) __atomic_store_n(p, v, __ATOMIC_RELAXED)
#endif

#define LOOKUP_AVX2(tables, codes) .max_tables = tables, .max_codes = codes, .table_size = TQ1_25_TABLE_AVX2, .code_tiles = 1, .table = tq1_25_table_avx2, \
    .gemv = { tq1_25_gemv_avx2, stq1_0_gemv_avx2 }, .expand = tq1_25_expand_avx2, .lookup = tq1_25_lookup_avx2, .store = tq1_25_store_avx2
#define LOOKUP_AVX512(tables, codes) .max_tables = tables, .max_codes = codes, .table_size = TQ1_25_TABLE, .code_tiles = 2, .table = tq1_25_table_avx512, \
    .gemv = { tq1_25_gemv_avx512, stq1_0_gemv_avx512 }, .expand = tq1_25_expand_avx512, .lookup = tq1_25_lookup_avx512, .store = tq1_25_store_avx512
#define LOOKUP_NEON(tables, codes) .max_tables = tables, .max_codes = codes, .table_size = TQ1_25_TABLE, .code_tiles = 1, .table = tq1_25_table_neon, \
    .gemv = { tq1_25_gemv_neon, stq1_0_gemv_neon }, .expand = tq1_25_expand_neon, .lookup = tq1_25_lookup_neon, .store = tq1_25_store_neon
#define VEC_DOT(isa) tq1_25_vec_dot_##isa, stq1_0_vec_dot_##isa
#define PANELS(isa) .decode = tq1_25_decode_##isa, .gemm = tq1_25_gemm_##isa

const struct tq1_25_isa tq1_25_isas[] = {
#if defined(__x86_64__) || defined(_M_X64)
    { "zen4",       VEC_DOT(avx512vnni), has_zen4,       LOOKUP_AVX512(1, INT_MAX) },
    { "avx512vnni", VEC_DOT(avx512vnni), has_avx512vnni, LOOKUP_AVX512(1, 8), PANELS(avx512vnni) },
    { "avx512",     VEC_DOT(avx512),     has_avx512,     LOOKUP_AVX512(1, INT_MAX) },
#    ifdef TQ1_25_AVXVNNI
    { "avxvnni",    VEC_DOT(avx2),       has_avxvnni,    LOOKUP_AVX2(2, 8), PANELS(avxvnni) },
#    endif
    { "avx2",       VEC_DOT(avx2),       has_avx2,       LOOKUP_AVX2(2, INT_MAX) },
#endif
#ifdef TQ1_25_ARM
#    ifdef TQ1_25_I8MM
    { "i8mm",       VEC_DOT(dotprod),    has_i8mm,       LOOKUP_NEON(1, 9), PANELS(i8mm) },
#    endif
#    ifdef TQ1_25_DOTPROD
    { "dotprod",    VEC_DOT(dotprod),    has_dotprod,    LOOKUP_NEON(1, 15), PANELS(dotprod) },
#    endif
    { "neon",       VEC_DOT(neon),       NULL,           LOOKUP_NEON(1, INT_MAX) },
#endif
    { .name = "scalar", .vec_dot = tq1_25_vec_dot_scalar, .vec_dot_stq1_0 = stq1_0_vec_dot_scalar },
    { .name = NULL },
};

static const struct tq1_25_isa * choose(void) {
    const char * forced = getenv("SHERRY_ISA");
    const struct tq1_25_isa * isa = tq1_25_isas;
    if (!forced || !*forced) {
        while (isa->supported && !isa->supported()) {
            ++isa;
        }
        return isa;
    }
    while (isa->name && strcmp(isa->name, forced)) {
        ++isa;
    }
    if (isa->name && (!isa->supported || isa->supported())) {
        return isa;
    }
    char message[640]; // written in one piece, whatever other threads have to say
    int length = snprintf(message, sizeof(message), "SHERRY_ISA=%.64s: %s; this CPU runs", forced,
                          isa->name ? "this CPU lacks it" : "there is no such instruction set in this build");
    for (isa = tq1_25_isas; isa->name; ++isa) {
        if (!isa->supported || isa->supported()) {
            length += snprintf(message + length, sizeof(message) - (size_t) length, " %s", isa->name);
        }
    }
    fprintf(stderr, "%s\n", message);
    fflush(stderr);
    _Exit(1); // not exit: other threads may be at work
}

const struct tq1_25_isa * tq1_25_best_isa(void) {
    // ggml_cpu_init calls this before there are threads, so that they only read. Without it, threads that meet here
    // store the same pointer.
    static const struct tq1_25_isa * best = NULL;
    const struct tq1_25_isa * isa = LOAD(&best);
    if (!isa) {
        isa = choose();
        STORE(&best, isa);
    }
    return isa;
}

void ggml_vec_dot_tq1_25_q8_0(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc) {
    assert(n % QK_TQ1_25 == 0 && nrc == 1);
    (void) bs; (void) bx; (void) by; (void) nrc; // strides of a second row
    tq1_25_best_isa()->vec_dot(n, s, (const block_tq1_25 *) x, (const tq1_25_q8_0 *) y);
}

void ggml_vec_dot_stq1_0_q8_0(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc) {
    assert(n % QK_STQ1_0 == 0 && nrc == 1);
    (void) bs; (void) bx; (void) by; (void) nrc;
    tq1_25_best_isa()->vec_dot_stq1_0(n, s, (const block_stq1_0 *) x, (const tq1_25_q8_0 *) y);
}

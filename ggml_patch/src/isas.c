// The table of instruction sets and the choice among them.

#include "isas.h"

#include "arch/arm/kernels.h"
#include "arch/x86/kernels.h"

#include <assert.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define VEC_DOT(isa) { tq1_25_vec_dot_##isa, stq1_0_vec_dot_##isa, tq1_25_64_vec_dot_##isa } // by enum tq1_25_kind
#define LOOKUP(isa, tables, codes, size, tiles)                                                                     \
    .max_tables = tables, .max_codes = codes, .table_size = size, .code_tiles = tiles, .table = tq1_25_table_##isa, \
    .gemv = tq1_25_gemv_##isa, .expand = tq1_25_expand_##isa, .lookup = tq1_25_lookup_##isa, .store = tq1_25_store_##isa
#define LOOKUP_AVX2(tables, codes) LOOKUP(avx2, tables, codes, TQ1_25_TABLE_AVX2, 1)
#define LOOKUP_AVX512(tables, codes) LOOKUP(avx512, tables, codes, TQ1_25_TABLE, 2)
#define LOOKUP_NEON(tables, codes) LOOKUP(neon, tables, codes, TQ1_25_TABLE, 1)
#define ATTENTION(isa) .attention = &sherry_attention_##isa
#define WIDE(isa) .wide_table = tq1_25_wide_table_##isa, .wide_rows = tq1_25_wide_rows_##isa, .wide_store = tq1_25_wide_store_##isa
#define PANELS(isa) .decode = tq1_25_decode_##isa, .gemm = tq1_25_gemm_##isa

// clang-format off
const struct tq1_25_isa tq1_25_isas[] = {
#ifdef TQ1_25_X86
    { "zen4",       VEC_DOT(avx512vnni), tq1_25_has_zen4,       LOOKUP_AVX512(1, INT_MAX), ATTENTION(avx512) },
    { "avx512vnni", VEC_DOT(avx512vnni), tq1_25_has_avx512vnni, LOOKUP_AVX512(1, 8), PANELS(avx512vnni), ATTENTION(avx512) },
    { "avx512",     VEC_DOT(avx512),     tq1_25_has_avx512,     LOOKUP_AVX512(1, INT_MAX), ATTENTION(avx512) },
#    ifdef TQ1_25_AVXVNNI
    { "avxvnni",    VEC_DOT(avx2),       tq1_25_has_avxvnni,    LOOKUP_AVX2(2, 8), PANELS(avxvnni), ATTENTION(avx2) },
#    endif
    { "avx2",       VEC_DOT(avx2),       tq1_25_has_avx2,       LOOKUP_AVX2(2, 11), WIDE(avx2), ATTENTION(avx2) },
#endif
#ifdef TQ1_25_ARM
#    ifdef TQ1_25_I8MM
    { "i8mm",       VEC_DOT(dotprod),    tq1_25_has_i8mm,       LOOKUP_NEON(1, 9), PANELS(i8mm), ATTENTION(neon) },
#    endif
#    ifdef TQ1_25_DOTPROD
    { "dotprod",    VEC_DOT(dotprod),    tq1_25_has_dotprod,    LOOKUP_NEON(1, 15), PANELS(dotprod), ATTENTION(neon) },
#    endif
    { "neon",       VEC_DOT(neon),       NULL,                  LOOKUP_NEON(1, INT_MAX), ATTENTION(neon) },
#endif
    { "scalar",     VEC_DOT(scalar),     .supported = NULL },
    { .name = NULL },
};
// clang-format on

#ifdef _MSC_VER // reads and writes of aligned pointers are atomic
#    define LOAD(p) (*(void * volatile *) (p))
#    define STORE(p, v) (*(void * volatile *) (p) = (void *) (v))
#else
#    define LOAD(p) __atomic_load_n(p, __ATOMIC_RELAXED)
#    define STORE(p, v) __atomic_store_n(p, v, __ATOMIC_RELAXED)
#endif

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
    char message[640]; // written in one piece, so that other threads' output cannot interrupt it
    int length = snprintf(message, sizeof(message), "SHERRY_ISA=%.64s: %s; this CPU runs", forced,
                          isa->name ? "this CPU lacks it" : "there is no such instruction set in this build");
    for (isa = tq1_25_isas; isa->name; ++isa) {
        if (!isa->supported || isa->supported()) {
            length += snprintf(message + length, sizeof(message) - (size_t) length, " %s", isa->name);
        }
    }
    fprintf(stderr, "%s\n", message);
    fflush(stderr);
    _Exit(1); // not exit, since other threads may be running
}

const struct tq1_25_isa * tq1_25_best_isa(void) {
    // ggml_cpu_init calls this before there are other threads. Without it, threads that meet here store the same pointer.
    static const struct tq1_25_isa * best = NULL;
    const struct tq1_25_isa * isa = LOAD(&best);
    if (!isa) {
        isa = choose();
        STORE(&best, isa);
    }
    return isa;
}

#define GGML_VEC_DOT(TYPE, name)                                                                                                  \
    void ggml_vec_dot_##name##_q8_0(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc) { \
        assert(n % QK_##TYPE == 0 && nrc == 1);                                                                                   \
        (void) bs;                                                                                                                \
        (void) bx;                                                                                                                \
        (void) by;                                                                                                                \
        (void) nrc; /* bs, bx and by are the strides to a second row */                                                           \
        tq1_25_best_isa()->vec_dot[KIND_##TYPE](n, s, x, (const tq1_25_q8_0 *) y);                                                \
    }

GGML_VEC_DOT(TQ1_25, tq1_25)
GGML_VEC_DOT(TQ1_25_64, tq1_25_64)
GGML_VEC_DOT(STQ1_0, stq1_0)

// Calls a kernel once on zeros; scripts/bench/count_arm.py counts the instructions. usage: count_arm KERNEL WEIGHTS VECTORS
// KERNEL: an instruction set, one of its kernels and a type, such as "neon gemv TQ1_25"; or one of upstream's. For "neon attention F16",
// WEIGHTS are keys and VECTORS the queries of one token that share a head of 128.

#include "attention.h"
#include "repack.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// upstream's kernels; NULL if this build lacks them
typedef void vec_dot(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc);
typedef void matmul(int n, float * s, size_t bs, const void * x, const void * y, int nr, int nc);
__attribute__((weak)) vec_dot ggml_vec_dot_tq2_0_q8_K, ggml_vec_dot_tq1_0_q8_K, ggml_vec_dot_q4_0_q8_0, ggml_vec_dot_q2_K_q8_K;
__attribute__((weak)) matmul ggml_gemv_q4_0_4x4_q8_0, ggml_gemv_q4_0_4x8_q8_0, ggml_gemm_q4_0_4x4_q8_0, ggml_gemm_q4_0_4x8_q8_0;
float ggml_table_f32_f16[1 << 16], ggml_table_f32_ue4m3[256]; // upstream's tables for some types

enum { MOST = 8192, ROWS = TQ1_25_TILE };

static char x[MOST * ROWS] __attribute__((aligned(64))), y[MOST * 64] __attribute__((aligned(64)));
static int8_t table[MOST / TQ1_25_QK8_0 * TQ1_25_TABLE] __attribute__((aligned(64)));
static float d[MOST / TQ1_25_QK8_0], s[ROWS * 64] __attribute__((aligned(64)));
static tq1_25_codes codes;
static uint8_t decoded[MOST / QK_TQ1_25_64 * TQ1_25_DECODED(2)] __attribute__((aligned(64)));

#define IS(name) (strcmp(what, name) == 0)

static int upstream(const char * what, int n, int nc) {
    static const struct {
        const char * name;
        vec_dot * f;
    } dots[] = {
        { "TQ2_0", ggml_vec_dot_tq2_0_q8_K },
        { "TQ1_0", ggml_vec_dot_tq1_0_q8_K },
        { "Q4_0", ggml_vec_dot_q4_0_q8_0 },
        { "Q2_K", ggml_vec_dot_q2_K_q8_K },
    };
    static const struct {
        const char * name;
        matmul * f;
    } products[] = {
        { "Q4_0 4x4 gemv", ggml_gemv_q4_0_4x4_q8_0 },
        { "Q4_0 4x8 gemv", ggml_gemv_q4_0_4x8_q8_0 },
        { "Q4_0 4x4 gemm", ggml_gemm_q4_0_4x4_q8_0 },
        { "Q4_0 4x8 gemm", ggml_gemm_q4_0_4x8_q8_0 },
    };
    for (size_t i = 0; i < sizeof(dots) / sizeof(*dots); ++i) {
        if (IS(dots[i].name) && dots[i].f) {
            dots[i].f(n, s, 0, x, 0, y, 0, 1);
            return 1;
        }
    }
    for (size_t i = 0; i < sizeof(products) / sizeof(*products); ++i) {
        if (IS(products[i].name) && products[i].f) {
            products[i].f(n, s, ROWS, x, y, nc, ROWS);
            return 1;
        }
    }
    return 0;
}

static int ours(const struct tq1_25_isa * isa, const char * what, const char * type, int n, int nc) {
    static const char * const names[TQ1_25_KINDS] = { [KIND_TQ1_25] = "TQ1_25", [KIND_STQ1_0] = "STQ1_0", [KIND_TQ1_25_64] = "TQ1_25_64" };
    const int nq = n / TQ1_25_QK8_0;
    int k = 0;
    while (strcmp(type, names[k]) != 0) {
        if (++k == TQ1_25_KINDS) {
            return 0;
        }
    }
    const tq1_25_sizes of = tq1_25_sizes_of((enum tq1_25_kind) k);
    const int unit = of.parts;
    const tq1_25_part * part = (const tq1_25_part *) x;
    const tq1_25_unit units[2] = { { part, (const uint16_t *) (part + unit) }, { part, (const uint16_t *) (part + unit) } };
    if (IS("table")) {
        isa->table(nq, (const tq1_25_q8_0 *) y, table, d);
    } else if (IS("vec_dot")) {
        isa->vec_dot[k](n, s, x, (const tq1_25_q8_0 *) y);
    } else if (IS("gemv")) {
        isa->gemv(of.parts * of.units, n, s, x, table, d);
    } else if (IS("codes")) {
        for (int i = 0; i < nq; i += unit) {
            isa->expand(unit, units, &codes);
            isa->lookup(unit, &codes, nc, table, d, s);
        }
    } else if (IS("panels") && isa->gemm) {
        for (int i = 0; i < nq / unit; ++i) {
            isa->decode(unit, units[0], decoded + TQ1_25_DECODED(unit) * i);
        }
        for (int p = 0; p < tq1_25_panels(nc); ++p) {
            const int columns = (int) (tq1_25_first_column(nc, p + 1) - tq1_25_first_column(nc, p));
            isa->gemm(unit, nq / unit, columns, s, decoded, (const int8_t *) y);
        }
    } else {
        return 0;
    }
    return 1;
}

static int attention(const struct sherry_attention_kernels * kernels, const char * type, int64_t keys, int64_t queries) {
    enum { SIZE = 128, SCRATCH = 1 << 19 };
    static const char * const names[] = { [SHERRY_ATTENTION_F16] = "F16",
                                          [SHERRY_ATTENTION_BF16] = "BF16",
                                          [SHERRY_ATTENTION_Q8_0] = "Q8_0" };
    static char scratch[SCRATCH] __attribute__((aligned(64)));
    static float q[64 * SIZE], o[64 * SIZE];
    int k = 0;
    while (k < 3 && strcmp(type, names[k]) != 0) {
        ++k;
    }
    const int64_t row = k == SHERRY_ATTENTION_Q8_0 ? SIZE / TQ1_25_QK8_0 * (int64_t) sizeof(tq1_25_q8_0) : 2 * SIZE;
    struct sherry_attention a = {
        .q = (char *) q,
        .k = calloc((size_t) keys, (size_t) row),
        .v = calloc((size_t) keys, (size_t) row),
        .dst = (char *) o,
        .k_type = k,
        .v_type = k,
        .k_size = SIZE,
        .v_size = SIZE,
        .tokens = 1,
        .keys = keys,
        .heads = queries,
        .kv_heads = 1,
        .streams = 1,
        .kv_streams = 1,
        .mask_heads = 1,
        .mask_streams = 1,
        .q_stride = { 4 * SIZE * queries, 4 * SIZE, 0 },
        .k_stride = { row, 0, 0 },
        .v_stride = { row, 0, 0 },
        .dst_stride = 4 * SIZE,
        .scale = 1.0f,
    };
    struct sherry_attention_plan plan;
    if (k == 3 || !a.k || !a.v || !sherry_attention_make_plan(&a, 1, SCRATCH, &plan)) {
        return 0;
    }
    for (int64_t i = 0; plan.tiles && i < plan.items; ++i) {
        sherry_attention_tile(kernels, &a, &plan, i, (float *) scratch);
    }
    for (int64_t i = 0; !plan.tiles && i < plan.rounds; ++i) {
        sherry_attention_part(kernels, &a, &plan, i, 0, (float *) scratch);
    }
    return 1;
}

int main(int argc, char ** argv) {
    const char * what = argc == 4 ? argv[1] : "";
    const int n = argc == 4 ? atoi(argv[2]) : 0, nc = argc == 4 ? atoi(argv[3]) : 0;
    if (n <= 0 || n > MOST || nc <= 0 || nc > 64) {
        fprintf(stderr, "count_arm: KERNEL WEIGHTS VECTORS, at most %d and 64\n", MOST);
        return 2;
    }
    char name[16], kernel[16], type[16];
    if (sscanf(what, "%15s %15s %15s", name, kernel, type) == 3) {
        for (const struct tq1_25_isa * isa = tq1_25_isas; isa->name; ++isa) {
            if (strcmp(name, isa->name) == 0) {
                if (strcmp(kernel, "attention") == 0) {
                    return attention(isa->attention, type, n, nc) ? 0 : 3;
                }
                return ours(isa, kernel, type, n, nc) ? 0 : 3;
            }
        }
    }
    return upstream(what, n, nc) ? 0 : 3; // 3: no such kernel
}

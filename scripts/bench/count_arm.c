// Calls a kernel once on zeros; scripts/bench/count_arm.py counts the instructions. usage: count_arm KERNEL WEIGHTS VECTORS

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
static int8_t table[MOST / QK_TQ1_25 * TQ1_25_TABLE * TQ1_25_CODE_COLUMNS] __attribute__((aligned(64)));
static float d[MOST / TQ1_25_QK8_0 * TQ1_25_CODE_COLUMNS], s[ROWS * 64] __attribute__((aligned(64)));
static tq1_25_codes codes;
static tq1_25_decoded decoded[MOST / QK_TQ1_25];

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

static int ours(const struct tq1_25_isa * isa, const char * what, int n, int nc) {
    const tq1_25_part * part = (const tq1_25_part *) x;
    const tq1_25_rows rows[2] = { { part, (const uint16_t *) (part + 4) }, { part, (const uint16_t *) (part + 4) } };
    if (IS("vec_dot")) {
        isa->vec_dot(n, s, (const block_tq1_25 *) x, (const tq1_25_q8_0 *) y);
    } else if (IS("vec_dot STQ1_0")) {
        isa->vec_dot_stq1_0(n, s, (const block_stq1_0 *) x, (const tq1_25_q8_0 *) y);
    } else if (IS("table")) {
        isa->table(n / QK_TQ1_25, (const tq1_25_q8_0 *) y, table, isa->table_size, d, 4);
    } else if (IS("gemv")) {
        isa->gemv[KIND_TQ1_25](n, s, x, table, d);
    } else if (IS("gemv STQ1_0")) {
        isa->gemv[KIND_STQ1_0](n, s, x, table, d);
    } else if (IS("codes")) { // 128 weights at a time
        for (int i = 0; i < n; i += QK_TQ1_25) {
            isa->expand(rows, &codes);
            isa->lookup(&codes, nc, table, d, s);
        }
    } else if (IS("panels") && isa->gemm) {
        for (int i = 0; i < n / QK_TQ1_25; ++i) {
            isa->decode(rows[0], decoded + i);
        }
        for (int p = 0; p < tq1_25_panels(nc); ++p) {
            isa->gemm(n / QK_TQ1_25, (int) (tq1_25_first_column(nc, p + 1) - tq1_25_first_column(nc, p)), s, decoded, (const int8_t *) y);
        }
    } else {
        return 0;
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
    for (const struct tq1_25_isa * isa = tq1_25_isas; isa->name; ++isa) {
        const size_t length = strlen(isa->name);
        if (strncmp(what, isa->name, length) == 0 && what[length] == ' ') {
            return ours(isa, what + length + 1, n, nc) ? 0 : 3;
        }
    }
    return upstream(what, n, nc) ? 0 : 3; // 3: no such kernel
}

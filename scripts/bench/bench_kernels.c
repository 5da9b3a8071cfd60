// Times vec_dot of the named types, ours with each instruction set, in one thread on rows that stay in the L1 cache. Types take turns in each
// round, so that disturbances hit all of them.
// usage: bench_kernels N ROUNDS TYPE...     prints "name seconds" for each type and round; seconds per 1e9 weights

#define _POSIX_C_SOURCE 199309L

#include "ggml-cpu.h"
#include "ggml.h"
#include "sherry/repack.h"

#include "bench.h"

#include <stdio.h>

enum { ROWS = 4, MAX_KERNELS = 64 }; // so many rows of 4096 weights of any type, with the activations, fit an L1 cache of 32 KiB

struct kernel {
    const char * name;
    enum ggml_type type;
    tq1_25_vec_dot_t * ours; // with an instruction set; NULL: the function that ggml has registered
    void * rows;
    void * y;
};

static float * floats(size_t n, float least) { return noise(malloc(n * sizeof(float)), n, least); }

static volatile float sink;

static double run(const struct kernel * k, int n, int repeats) {
    const ggml_vec_dot_t dot = ggml_get_type_traits_cpu(k->type)->vec_dot;
    const size_t size = ggml_row_size(k->type, n);
    float s = 0;
    const double start = now();
    for (int i = 0; i < repeats; ++i) {
        for (int row = 0; row < ROWS; ++row) {
            const char * x = (const char *) k->rows + (size_t) row * size;
            if (k->ours) {
                k->ours(n, &s, x, (const tq1_25_q8_0 *) k->y);
            } else {
                dot(n, &s, 0, x, 0, k->y, 0, 1);
            }
            sink = s;
        }
    }
    return (now() - start) / ((double) n * ROWS * repeats) * 1e9;
}

int main(int argc, char ** argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: %s N ROUNDS TYPE...\n", argv[0]);
        return 2;
    }
    ggml_cpu_init();
    const int n = atoi(argv[1]), rounds = atoi(argv[2]);
    if (n <= 0 || n > 1 << 20 || rounds <= 0) {
        fprintf(stderr, "rows of %d weights and %d rounds: both are at least 1, rows at most %d\n", n, rounds, 1 << 20);
        return 1;
    }
    const float *x = floats((size_t) n * ROWS, -0.5f), *activations = floats((size_t) n, -0.5f), *importance = floats((size_t) n, 0.5f);
    struct kernel kernels[MAX_KERNELS];
    int count = 0;
    for (int a = 3; a < argc; ++a) {
        const enum ggml_type type = type_of(argv[a], n);
        if (type == GGML_TYPE_COUNT) {
            fprintf(stderr, "%s: no such type, or rows of %d are not whole blocks of it\n", argv[a], n);
            return 1;
        }
        const struct ggml_type_traits_cpu * cpu = ggml_get_type_traits_cpu(type);
        struct kernel k = { argv[a], type, NULL, malloc(ggml_row_size(type, n) * ROWS), malloc(ggml_row_size(cpu->vec_dot_type, n)) };
        ggml_quantize_chunk(type, x, k.rows, 0, ROWS, n, importance);
        ggml_get_type_traits_cpu(cpu->vec_dot_type)->from_float(activations, k.y, n);
        const enum tq1_25_kind kind = kind_of(type);
        if (kind == TQ1_25_KINDS) {
            kernels[count++] = k;
            continue;
        }
        for (const struct tq1_25_isa * isa = tq1_25_isas; isa->name; ++isa) {
            if (!isa->supported || isa->supported()) {
                char * name = malloc(64);
                snprintf(name, 64, "%s-%s", argv[a], isa->name);
                k.name = name;
                k.ours = isa->vec_dot[kind];
                kernels[count++] = k;
            }
        }
    }
    int repeats[MAX_KERNELS];
    for (int i = 0; i < count; ++i) {
        const double once = run(&kernels[i], n, 10) * n * ROWS * 1e-9; // warms up as well
        repeats[i] = once < 2e-3 ? (int) (2e-3 / once) + 1 : 1; // about 2 ms a turn
    }
    for (int round = 0; round < rounds; ++round) {
        for (int i = 0; i < count; ++i) {
            printf("%s %.6f\n", kernels[i].name, run(&kernels[i], n, repeats[i]));
        }
    }
    return 0;
}

// What the benchmarks share.
#ifndef BENCH_H
#define BENCH_H

#include <stdlib.h>
#include <string.h>
#include <time.h>

static inline double now(void) { // seconds
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double) t.tv_sec + 1e-9 * (double) t.tv_nsec;
}

#ifdef GGML_API

// The type of this name whose blocks divide rows of n weights, or GGML_TYPE_COUNT.
static inline enum ggml_type type_of(const char * name, int64_t n) {
    int type = 0;
    while (type < GGML_TYPE_COUNT && (!ggml_type_name(type) || strcmp(ggml_type_name(type), name) != 0)) {
        ++type;
    }
    return type < GGML_TYPE_COUNT && ggml_blck_size(type) && n % ggml_blck_size(type) == 0 ? type : GGML_TYPE_COUNT;
}

// n random floats between `least` and `least` + 1.
static inline float * noise(float * x, size_t n, float least) {
    for (size_t i = 0; i < n; ++i) {
        x[i] = (float) rand() / (float) RAND_MAX + least;
    }
    return x;
}

#endif

#ifdef TQ1_25_TILE

// Our kind of this type, or TQ1_25_KINDS.
static inline enum tq1_25_kind kind_of(int type) {
    static const int types[TQ1_25_KINDS] = {
        [KIND_TQ1_25] = TQ1_25_TYPE_ID,
        [KIND_STQ1_0] = STQ1_0_TYPE_ID,
        [KIND_TQ1_25_64] = TQ1_25_64_TYPE_ID,
    };
    int kind = 0;
    while (kind < TQ1_25_KINDS && types[kind] != type) {
        ++kind;
    }
    return (enum tq1_25_kind) kind;
}

#endif
#endif

// Decodes repacked weights on threads that share a matrix and its result, under ThreadSanitizer or under AddressSanitizer and UBSan.
// The result must be the plain blocks' weights, bit by bit. usage: threads_decode SEED

#include "repack.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { THREADS = 4, ROWS = 200, BLOCKS = 5, CHANNELS = 7 };

typedef struct {
    enum tq1_25_kind kind;
    int64_t n, weights;
    const void * x;
    const int64_t * channels;
    float *rows, *columns; // of all threads
    int number;
} job;

static uint32_t state;

static uint32_t next(void) {
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

// Each thread has a range of rows, which meet within tiles, then a range of blocks of all rows, then the channels in memory of its own.
static void * work(void * of) {
    const job * j = of;
    const int64_t begin = ROWS * j->number / THREADS, end = ROWS * (j->number + 1) / THREADS;
    tq1_25_decode_rows(j->kind, ROWS, j->n, j->x, begin, end, 0, j->n, j->rows + begin * j->n);
    const int64_t first = BLOCKS * j->number / THREADS * j->weights, last = BLOCKS * (j->number + 1) / THREADS * j->weights;
    float * part = malloc((size_t) (ROWS * (last - first) + 1) * sizeof(float));
    tq1_25_decode_rows(j->kind, ROWS, j->n, j->x, 0, ROWS, first, last, part);
    for (int64_t r = 0; r < ROWS; ++r) {
        memcpy(j->rows + ROWS * j->n + r * j->n + first, part + r * (last - first), (size_t) (last - first) * sizeof(float));
    }
    free(part);
    tq1_25_decode_columns(j->kind, ROWS, j->n, j->x, CHANNELS, j->channels, j->columns + j->number * ROWS * CHANNELS);
    return NULL;
}

// Whether all threads' weights are those of the blocks.
static int check(enum tq1_25_kind kind, int64_t weights, size_t bytes, void (*dequantize)(const void *, float *, int64_t)) {
    const int64_t n = BLOCKS * weights;
    const size_t all = (size_t) (ROWS * n);
    uint8_t *blocks = malloc(ROWS * BLOCKS * bytes), *x = malloc(ROWS * BLOCKS * bytes);
    for (size_t i = 0; i < ROWS * BLOCKS * bytes; ++i) {
        blocks[i] = i % bytes == bytes - 1 ? next() % 0x78 : (uint8_t) next(); // finite scales
    }
    tq1_25_repack(kind, ROWS, n, blocks, x);
    float *expected = malloc(all * sizeof(float)), *rows = malloc(2 * all * sizeof(float));
    float * columns = malloc(THREADS * ROWS * CHANNELS * sizeof(float));
    dequantize(blocks, expected, ROWS * n);
    int64_t channels[CHANNELS];
    for (int c = 0; c < CHANNELS; ++c) {
        channels[c] = next() % (uint32_t) n;
    }
    pthread_t threads[THREADS];
    job jobs[THREADS];
    for (int t = 0; t < THREADS; ++t) {
        jobs[t] = (job){ kind, n, weights, x, channels, rows, columns, t };
        pthread_create(&threads[t], NULL, work, &jobs[t]);
    }
    for (int t = 0; t < THREADS; ++t) {
        pthread_join(threads[t], NULL);
    }
    int right = !memcmp(rows, expected, all * sizeof(float)) && !memcmp(rows + all, expected, all * sizeof(float));
    for (int i = 0; i < THREADS * ROWS * CHANNELS; ++i) {
        right &= columns[i] == expected[i / CHANNELS % ROWS * n + channels[i % CHANNELS]];
    }
    free(blocks), free(x), free(expected), free(rows), free(columns);
    return right;
}

int main(int argc, char ** argv) {
    state = argc > 1 ? (uint32_t) atoi(argv[1]) : 0;
    int right = 0;
    for (int round = 0; round < 5; ++round) {
        right += check(KIND_TQ1_25, QK_TQ1_25, sizeof(block_tq1_25), dequantize_row_tq1_25);
        right += check(KIND_STQ1_0, QK_STQ1_0, sizeof(block_stq1_0), dequantize_row_stq1_0);
        right += check(KIND_TQ1_25_64, QK_TQ1_25_64, sizeof(block_tq1_25_64), dequantize_row_tq1_25_64);
    }
    printf("%d right\n", right);
    return right != 15;
}

// Measures how fast this machine reads memory, which limits anything that streams its weights.
// usage: bench_memory THREADS ROUNDS     prints "threads GB/s" for each round; 1 GB is 1e9 bytes
// Each thread reads its share of 512 MiB in order with the CPU's widest loads, which suits hardware prefetchers best. Software prefetches and
// several streams at once were slower on AMD Zen 4.

#define _GNU_SOURCE // madvise

#include "bench.h"

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>

enum {
    HUGE_PAGE = 2 << 20,
    BUFFER = 512 << 20, // larger than most last-level caches
    PASSES = 4, // over the buffer in a round, about 0.1 s: starting the threads does not show
    STEP = 256, // bytes of four of the widest loads
    MAX_THREADS = 1024,
    MAX_ROUNDS = 1000000,
};

typedef uint64_t (*reader_t)(const char * p, size_t n); // n: a multiple of STEP; the result depends on every byte

// Four independent sums, each in a register of this type.
#define READER(name, attribute, type)                                                            \
    attribute static uint64_t name(const char * p, size_t n) {                                   \
        type a = { 0 }, b = a, c = a, d = a;                                                     \
        for (const type *q = (const type *) p, *end = (const type *) (p + n); q < end; q += 4) { \
            a ^= q[0];                                                                           \
            b ^= q[1];                                                                           \
            c ^= q[2];                                                                           \
            d ^= q[3];                                                                           \
        }                                                                                        \
        a ^= b ^ c ^ d;                                                                          \
        uint64_t parts[sizeof(type) / 8], sum = 0;                                               \
        memcpy(parts, &a, sizeof(type));                                                         \
        for (size_t i = 0; i < sizeof(type) / 8; ++i) {                                          \
            sum ^= parts[i];                                                                     \
        }                                                                                        \
        return sum;                                                                              \
    }

READER(read_scalar, , uint64_t)
#if defined(__x86_64__)
typedef uint64_t of_32_bytes __attribute__((vector_size(32)));
typedef uint64_t of_64_bytes __attribute__((vector_size(64)));
READER(read_avx2, __attribute__((target("avx2"))), of_32_bytes)
READER(read_avx512, __attribute__((target("avx512f"))), of_64_bytes)
#endif

static reader_t best_reader(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) {
        return read_avx512;
    }
    if (__builtin_cpu_supports("avx2")) {
        return read_avx2;
    }
#endif
    return read_scalar;
}

struct share {
    pthread_t thread;
    char * start;
    size_t size;
    reader_t reader; // NULL: fill the share, which puts its pages on the thread's memory node
    uint64_t sum;
};

static void * work(void * argument) {
    struct share * s = argument;
    if (!s->reader) {
        memset(s->start, 1, s->size);
        return NULL;
    }
    for (int pass = 0; pass < PASSES; ++pass) {
        s->sum += s->reader(s->start, s->size);
    }
    return NULL;
}

static void in_parallel(struct share * shares, int threads) {
    for (int i = 1; i < threads; ++i) {
        if (pthread_create(&shares[i].thread, NULL, work, &shares[i]) != 0) {
            fprintf(stderr, "thread %d of %d could not be started\n", i + 1, threads);
            exit(1);
        }
    }
    work(&shares[0]);
    for (int i = 1; i < threads; ++i) {
        pthread_join(shares[i].thread, NULL);
    }
}

int main(int argc, char ** argv) {
    const int threads = argc == 3 ? atoi(argv[1]) : 0, rounds = argc == 3 ? atoi(argv[2]) : 0;
    if (threads < 1 || threads > MAX_THREADS || rounds < 1 || rounds > MAX_ROUNDS) {
        fprintf(stderr, "usage: %s THREADS ROUNDS     (1 to %d threads, 1 to %d rounds)\n", argv[0], MAX_THREADS, MAX_ROUNDS);
        return 2;
    }
    char * buffer = aligned_alloc(HUGE_PAGE, BUFFER);
    if (!buffer) {
        fprintf(stderr, "no memory for a buffer of %d MiB\n", BUFFER >> 20);
        return 1;
    }
#if defined(MADV_HUGEPAGE)
    madvise(buffer, BUFFER, MADV_HUGEPAGE); // page walks are not part of the limit; without huge pages the result is just lower
#endif
    static struct share shares[MAX_THREADS];
    const size_t steps = BUFFER / STEP;
    for (int i = 0; i < threads; ++i) {
        const size_t first = steps * (size_t) i / (size_t) threads, end = steps * ((size_t) i + 1) / (size_t) threads;
        shares[i].start = buffer + first * STEP;
        shares[i].size = (end - first) * STEP;
    }
    in_parallel(shares, threads); // fills
    for (int i = 0; i < threads; ++i) {
        shares[i].reader = best_reader();
    }
    volatile uint64_t sink = 0; // so that the compiler keeps every load
    for (int round = 0; round < rounds; ++round) {
        const double start = now();
        in_parallel(shares, threads);
        const double seconds = now() - start;
        for (int i = 0; i < threads; ++i) {
            sink ^= shares[i].sum;
        }
        printf("%d %.2f\n", threads, 1e-9 * BUFFER * PASSES / seconds);
    }
    free(buffer);
    return 0;
}

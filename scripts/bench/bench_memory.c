// Measures how fast this machine reads memory, the limit for anything that streams its weights.
// usage: bench_memory THREADS ROUNDS     prints "threads GB/s" for each round; 1 GB is 1e9 bytes
// Each thread reads its share of 512 MiB in order with the CPU's widest loads, which suits hardware prefetchers best. Software prefetches and
// several streams at once were slower on AMD Zen 4.

#define _GNU_SOURCE // madvise

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum {
    HUGE_PAGE = 2 << 20,
    BUFFER = 512 << 20, // larger than most last-level caches
    PASSES = 4, // over the buffer in a round, about 0.1 s: starting the threads does not show
    STEP = 256, // bytes of four of the widest loads
    MAX_THREADS = 1024,
    MAX_ROUNDS = 1000000,
};

typedef uint64_t (*reader_t)(const char * p, size_t n); // n: a multiple of STEP; the result depends on every byte

// Four independent sums, each in a register.

static uint64_t read_scalar(const char * p, size_t n) {
    const uint64_t * q = (const uint64_t *) p;
    uint64_t a = 0, b = 0, c = 0, d = 0;
    for (size_t i = 0; i < n / 8; i += 4) {
        a ^= q[i];
        b ^= q[i + 1];
        c ^= q[i + 2];
        d ^= q[i + 3];
    }
    return a ^ b ^ c ^ d;
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static uint64_t read_avx2(const char * p, size_t n) {
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    for (const __m256i * q = (const __m256i *) p; q < (const __m256i *) (p + n); q += 4) {
        a = _mm256_xor_si256(a, _mm256_load_si256(q));
        b = _mm256_xor_si256(b, _mm256_load_si256(q + 1));
        c = _mm256_xor_si256(c, _mm256_load_si256(q + 2));
        d = _mm256_xor_si256(d, _mm256_load_si256(q + 3));
    }
    uint64_t parts[4];
    _mm256_storeu_si256((__m256i *) parts, _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d)));
    return parts[0] ^ parts[1] ^ parts[2] ^ parts[3];
}

__attribute__((target("avx512f"))) static uint64_t read_avx512(const char * p, size_t n) {
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (const __m512i * q = (const __m512i *) p; q < (const __m512i *) (p + n); q += 4) {
        a = _mm512_xor_si512(a, _mm512_load_si512(q));
        b = _mm512_xor_si512(b, _mm512_load_si512(q + 1));
        c = _mm512_xor_si512(c, _mm512_load_si512(q + 2));
        d = _mm512_xor_si512(d, _mm512_load_si512(q + 3));
    }
    return (uint64_t) _mm512_reduce_add_epi64(_mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d)));
}
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
    reader_t reader; // NULL: fill the share, which puts its pages on the node of the thread
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

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double) t.tv_sec + 1e-9 * (double) t.tv_nsec;
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
    madvise(buffer, BUFFER, MADV_HUGEPAGE); // page walks are not part of the limit; without huge pages the result is only lower
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

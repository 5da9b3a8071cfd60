// What the programs that run our glue on threads share: the parts of ggml that it calls, with atomics and barriers that order the same as
// ggml's, and threads whose work buffer has exactly the requested size, any address, and old contents.

#pragma once

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#ifdef __has_feature
#    if __has_feature(address_sanitizer) // clang
#        define __SANITIZE_ADDRESS__
#    endif
#endif

#define CHECK(condition, ...)                                       \
    if (!(condition)) {                                             \
        fprintf(stderr, #condition " does not hold: " __VA_ARGS__); \
        exit(1);                                                    \
    } else                                                          \
        (void) 0

static std::mt19937 generator;

static int64_t below(int64_t n) { return (int64_t) (generator() % (uint64_t) n); }

// ---- of ggml ----

struct ggml_threadpool {
    int n_threads = 1, waiting = 0, passed = 0;
    std::mutex mutex;
    std::condition_variable all_there;
    std::atomic<int> current_chunk{ 0 };
};

static bool numa;

bool ggml_is_numa(void) { return numa; }

void ggml_barrier(ggml_threadpool * tp) { // sleeps, where ggml spins
    std::unique_lock<std::mutex> lock(tp->mutex);
    const int passed = tp->passed;
    if (++tp->waiting == tp->n_threads) {
        tp->waiting = 0;
        ++tp->passed;
        tp->all_there.notify_all();
        return;
    }
    tp->all_there.wait(lock, [&] { return tp->passed != passed; });
}

void ggml_threadpool_chunk_set(ggml_threadpool * tp, int value) { tp->current_chunk.store(value, std::memory_order_relaxed); }

int ggml_threadpool_chunk_add(ggml_threadpool * tp, int value) { return tp->current_chunk.fetch_add(value, std::memory_order_relaxed); }

void ggml_abort(const char * file, int line, const char * fmt, ...) {
    fprintf(stderr, "%s:%d: %s\n", file, line, fmt);
    abort();
}

// ---- threads ----

// Calls operation(&params) on this many threads, twice: one operation after another, a barrier between them.
template <typename Operation> static void on_threads(int threads, size_t work_size, const Operation & operation) {
    const size_t skew = 16 * (size_t) below(4); // as malloc has it
#ifdef __SANITIZE_ADDRESS__                     // it sees what lies past the end
    enum { GUARD = 0 };
#else
    enum { GUARD = 64 };
#endif
    uint8_t *work = (uint8_t *) malloc(skew + work_size + GUARD), *end = work + skew + work_size;
    memset(work, 0xa5, skew + work_size + GUARD);
    ggml_threadpool pool;
    pool.n_threads = threads;
    std::vector<std::thread> team;
    for (int ith = 0; ith < threads; ++ith) {
        team.emplace_back([&, ith] {
            ggml_compute_params params = {};
            params.ith = ith;
            params.nth = threads;
            params.wsize = work_size;
            params.wdata = work + skew;
            params.threadpool = &pool;
            for (int again = 0; again < 2; ++again) {
                operation(&params);
                ggml_barrier(&pool);
            }
        });
    }
    for (std::thread & t : team) {
        t.join();
    }
    for (int i = 0; i < GUARD; ++i) {
        CHECK(end[i] == 0xa5, "written past the work buffer\n");
    }
    free(work);
}

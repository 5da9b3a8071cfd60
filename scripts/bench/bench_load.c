// Measures how long llama.cpp takes to load a model and how much memory it then holds, on Linux.
// usage: bench_load MODEL REPACK THREADS     REPACK: 1 to repack weights, 0 to leave them as they are in the file
// prints "what seconds anon file peak" after the load and after a token: "load" or "token", the seconds it took, and the memory of this
// process in KiB: its own (RssAnon), from files (RssFile), the peak of their sum (VmHWM)

#define _POSIX_C_SOURCE 199309L

#include "llama.h"

#include "bench.h"

#include <stdio.h>

static long status(const char * key) {
    FILE * f = fopen("/proc/self/status", "r");
    char line[256];
    long kib = -1;
    while (f && fgets(line, sizeof(line), f)) {
        const size_t n = strlen(key);
        if (strncmp(line, key, n) == 0 && line[n] == ':') {
            kib = atol(line + n + 1);
        }
    }
    if (f) {
        fclose(f);
    }
    if (kib < 0) {
        fprintf(stderr, "/proc/self/status has no %s\n", key);
        exit(1);
    }
    return kib;
}

static void report(const char * what, double seconds) {
    printf("%s %.6f %ld %ld %ld\n", what, seconds, status("RssAnon"), status("RssFile"), status("VmHWM"));
}

static void only_errors(enum ggml_log_level level, const char * text, void * unused) {
    (void) unused;
    if (level == GGML_LOG_LEVEL_ERROR) {
        fputs(text, stderr);
    }
}

int main(int argc, char ** argv) {
    const int threads = argc == 4 ? atoi(argv[3]) : 0;
    if (threads < 1 || strlen(argv[2]) != 1 || !strchr("01", argv[2][0])) {
        fprintf(stderr, "usage: %s MODEL REPACK THREADS     (REPACK: 0 or 1; at least one thread)\n", argv[0]);
        return 2;
    }
    llama_log_set(only_errors, NULL);
    llama_backend_init();
    struct llama_model_params model_params = llama_model_default_params();
    model_params.use_extra_bufts = argv[2][0] == '1';
    double start = now();
    struct llama_model * model = llama_model_load_from_file(argv[1], model_params);
    if (!model) {
        fprintf(stderr, "%s: llama.cpp cannot load it\n", argv[1]);
        return 1;
    }
    report("load", now() - start);

    struct llama_context_params context_params = llama_context_default_params();
    context_params.n_ctx = 512;
    context_params.n_threads = context_params.n_threads_batch = threads;
    start = now();
    struct llama_context * context = llama_init_from_model(model, context_params);
    llama_token token = 1;
    if (!context || llama_decode(context, llama_batch_get_one(&token, 1)) != 0) {
        fprintf(stderr, "%s: llama.cpp cannot run it\n", argv[1]);
        return 1;
    }
    report("token", now() - start);
    llama_free(context);
    llama_model_free(model);
    llama_backend_free();
    return 0;
}

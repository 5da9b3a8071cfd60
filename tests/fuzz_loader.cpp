// libFuzzer target: any bytes as a GGUF file for the patched llama.cpp, as llama-cli --check-tensors loads it.
//
// What loads is used: a context, a batch of tokens and one more, so that repacked rows are read by both kernels. Aborts of llama.cpp
// count as crashes, but for those that its own code makes of metadata alone (FUZZ_KNOWN in the environment counts them too).

#include "ggml-backend.h"
#include "ggml.h"
#include "gguf.h"
#include "llama.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <string>

extern "C" size_t LLVMFuzzerMutate(uint8_t * data, size_t size, size_t max_size);

static std::string path;
static int         file = -1;

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    llama_backend_init();
    llama_log_set([](ggml_log_level, const char * text, void *) {
        if (getenv("FUZZ_LOG")) {
            fputs(text, stderr);
        }
    }, nullptr);
    file = memfd_create("fuzz", 0);
    path = "/proc/self/fd/" + std::to_string(file);
    return file < 0;
}

static void use(llama_model * model) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 64;
    params.n_batch = params.n_ubatch = 16;
    params.n_threads = params.n_threads_batch = 1;
    llama_context * context = llama_init_from_model(model, params);
    if (!context) {
        return;
    }
    llama_token tokens[13] = {};
    for (int count : { 12, 1 }) {
        if (llama_decode(context, llama_batch_get_one(tokens, count))) {
            break;
        }
    }
    llama_free(context);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (ftruncate(file, 0) || ftruncate(file, (off_t) size) || pwrite(file, data, size, 0) != (ssize_t) size) {
        abort();
    }
    llama_model_params params = llama_model_default_params();
    params.check_tensors = true;
    params.load_mode = size % 2 ? LLAMA_LOAD_MODE_NONE : LLAMA_LOAD_MODE_MMAP;
    if (llama_model * model = llama_model_load_from_file(path.c_str(), params)) {
        use(model);
        llama_model_free(model);
    }
    return 0;
}

// The head is a few per cent of a file, and all that decides what the rest means: it has most of the changes.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t * data, size_t size, size_t max_size, unsigned seed) {
    enum { HEAD = 2048 };
    srand(seed);
    if (size <= HEAD || rand() % 4 == 0) {
        return LLVMFuzzerMutate(data, size, max_size);
    }
    uint8_t head[HEAD + 256];
    memcpy(head, data, HEAD);
    const size_t changed = LLVMFuzzerMutate(head, HEAD, sizeof(head));
    if (changed != HEAD && rand() % 2) { // what follows keeps its place
        memcpy(data, head, changed < HEAD ? changed : HEAD);
        return size;
    }
    size_t rest = size - HEAD;
    rest = changed + rest > max_size ? max_size - changed : rest;
    memmove(data + changed, data + HEAD, rest);
    memcpy(data, head, changed);
    return changed + rest;
}

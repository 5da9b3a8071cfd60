// libFuzzer target: any bytes as a GGUF file for the patched llama.cpp, as llama-cli --check-tensors loads it.
//
// Of what loads, each tensor of our types is multiplied by one column and by several, which its repacked rows have kernels for;
// a few models decode tokens too, which is slow. scripts/fuzz.py builds and runs it.
//
// llama.cpp answers some hyperparameters that no model has, such as no layers, and types that an operator does not take by an
// assertion: these, in its src/llama-*.cpp and src/models, and any while it decodes, end an input and no more. Any other one, as of
// ggml, of its reader of files, of the model loader and of our products, is a crash.
//
// environment: FUZZ_LOG, show llama.cpp's log; FUZZ_ASSERTIONS, a file to add those assertions to

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "gguf.h"
#include "llama-model.h"
#include "llama.h"
#include "sherry/ggml/types.h"

#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <stdexcept>
#include <string>
#include <vector>

extern "C" size_t LLVMFuzzerMutate(uint8_t * data, size_t size, size_t max_size);

static std::string path;
static int file = -1;
static ggml_backend_t backend;
static bool decoding;

static void on_abort(const char * message) {
    const bool of_model =
        (strstr(message, "/src/llama-") && !strstr(message, "/src/llama-model-loader.cpp")) || strstr(message, "/src/models/");
    const bool ours = strstr(message, "/sherry/");
    if (ours || (!of_model && !decoding)) {
        fprintf(stderr, "%s\n", message);
        return; // and ggml aborts
    }
    if (const char * list = getenv("FUZZ_ASSERTIONS")) {
        const int fd = open(list, O_WRONLY | O_CREAT | O_APPEND, 0666);
        const std::string line = std::string(message) + "\n";
        if (fd < 0 || write(fd, line.data(), line.size()) < 0) {
            return;
        }
        close(fd);
    }
    throw std::runtime_error(message);
}

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    llama_backend_init();
    ggml_set_abort_callback(on_abort);
    llama_log_set(
        [](ggml_log_level, const char * text, void *) {
            if (getenv("FUZZ_LOG")) {
                fputs(text, stderr);
            }
        },
        nullptr);
    backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend, 1);
    file = memfd_create("fuzz", 0);
    path = "/proc/self/fd/" + std::to_string(file);
    return file < 0;
}

static void multiply(ggml_tensor * weights, int64_t columns) {
    const ggml_init_params params = { 16 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true };
    ggml_context * context = ggml_init(params);
    ggml_tensor * x = ggml_new_tensor_3d(context, GGML_TYPE_F32, weights->ne[0], columns, weights->ne[2]);
    ggml_cgraph * graph = ggml_new_graph(context);
    ggml_build_forward_expand(graph, ggml_mul_mat(context, weights, x));
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(context, backend);
    const std::vector<float> ones((size_t) ggml_nelements(x), 1.0f);
    ggml_backend_tensor_set(x, ones.data(), 0, ggml_nbytes(x));
    if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
        abort();
    }
    ggml_backend_buffer_free(buffer);
    ggml_free(context);
}

static void decode(llama_model * model) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 64;
    params.n_batch = params.n_ubatch = 16;
    params.n_threads = params.n_threads_batch = 1;
    if (llama_context * context = llama_init_from_model(model, params)) {
        llama_token tokens[13] = {};
        if (llama_decode(context, llama_batch_get_one(tokens, 12)) == 0) {
            llama_decode(context, llama_batch_get_one(tokens, 1));
        }
        llama_free(context);
    }
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (ftruncate(file, 0) || ftruncate(file, (off_t) size) || pwrite(file, data, size, 0) != (ssize_t) size) {
        abort();
    }
    llama_model_params params = llama_model_default_params();
    params.check_tensors = true;
    params.load_mode = size % 2 ? LLAMA_LOAD_MODE_NONE : LLAMA_LOAD_MODE_MMAP;
    llama_model * model = nullptr;
    try {
        model = llama_model_load_from_file(path.c_str(), params);
        if (!model) {
            return 0;
        }
        for (const auto & [name, tensor] : llama_internal_get_tensor_map(model)) {
            if (sherry_has_type(tensor->type) && ggml_nelements(tensor) && tensor->ne[3] == 1) {
                multiply(tensor, 1);
                multiply(tensor, 9);
            }
        }
        if (size % 16 < 2) {
            decoding = true;
            decode(model);
        }
    } catch (const std::runtime_error &) {
    }
    decoding = false;
    llama_model_free(model);
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
    const size_t changed = LLVMFuzzerMutate(head, HEAD, max_size < sizeof(head) ? max_size : sizeof(head));
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

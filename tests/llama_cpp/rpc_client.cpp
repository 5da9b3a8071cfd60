// A client of rpc-server: computes with matrices of a type, and reads, writes, copies and clears them between computations. Prints what it
// checked; ends with an error at the first byte or product that is not as if the server had kept plain blocks.
//
// usage: rpc_client HOST:PORT TYPE

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml-impl.h" // ggml_cgraph's uid
#include "ggml-rpc.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

static std::mt19937 rng(1);

// Blocks with any codes. Their scales, the last two bytes, are powers of two.
static std::vector<char> weights(ggml_type type, size_t size) {
    std::vector<char> blocks(size);
    for (size_t i = 0; i < size; ++i) {
        blocks[i] = (char) rng();
    }
    const size_t block = ggml_type_size(type);
    for (size_t end = block; end <= size; end += block) {
        const ggml_fp16_t scale = ggml_fp32_to_fp16(std::ldexp(0.5f, (int) (rng() % 3)));
        memcpy(blocks.data() + end - sizeof(scale), &scale, sizeof(scale));
    }
    return blocks;
}

// Q8_0 holds these exactly: integers up to 127, with a 127 in each 32, also in the order that repacked rows of STQ1_0 use. So the sums of
// their products with the weights are exact as well, in any order.
static std::vector<float> activations(int64_t n) {
    std::vector<float> x(n);
    for (int64_t i = 0; i < n; ++i) {
        x[i] = i % 8 == 0 ? 127 : (float) (rng() % 255) - 127;
    }
    return x;
}

// A backend with one weight tensor, its input, and the graphs that use them.
struct machine {
    ggml_backend_t backend;
    ggml_context * weights = ggml_init({ 1 << 20, nullptr, true });
    ggml_context * work = ggml_init({ 1 << 20, nullptr, true });
    ggml_tensor *w, *other, *x, *ids, *product, *rows, *slice;
    ggml_cgraph *multiply, *read_rows, *multiply_slice;
    ggml_backend_buffer_t buffer;

    machine(ggml_backend_t backend, ggml_type type, int64_t n, int64_t m, int64_t experts, int64_t columns) : backend(backend) {
        w = ggml_new_tensor_3d(weights, type, n, m, experts);
        other = ggml_new_tensor_3d(weights, type, n, m, experts);
        buffer = ggml_backend_alloc_ctx_tensors(weights, backend);
        x = ggml_new_tensor_3d(work, GGML_TYPE_F32, n, experts > 1 ? 1 : columns, experts > 1 ? columns : 1);
        ids = ggml_new_tensor_2d(work, GGML_TYPE_I32, 2, columns);
        product = experts > 1 ? ggml_mul_mat_id(work, w, x, ids) : ggml_mul_mat(work, w, x);
        multiply = graph(product);
        static uint64_t graphs = 0;
        multiply->uid = ++graphs; // the second time, the client only says that it is the same graph
        rows = ggml_get_rows(work, ggml_view_2d(work, w, n, m, w->nb[1], 0), ggml_view_1d(work, ids, 2, 0));
        read_rows = graph(rows);
        slice = ggml_mul_mat(work, ggml_view_2d(work, w, n, m / 2, w->nb[1], w->nb[1]), ggml_view_2d(work, x, n, 1, x->nb[1], 0));
        multiply_slice = graph(slice);
        ggml_backend_alloc_ctx_tensors(work, backend);
    }

    ggml_cgraph * graph(ggml_tensor * result) {
        ggml_cgraph * g = ggml_new_graph(work);
        ggml_build_forward_expand(g, result);
        return g;
    }

    std::vector<float> compute(ggml_cgraph * g, ggml_tensor * result) {
        ggml_backend_graph_compute(backend, g);
        std::vector<float> out(ggml_nelements(result));
        ggml_backend_tensor_get(result, out.data(), 0, ggml_nbytes(result));
        return out;
    }
};

static void check(bool ok, const std::string & what) {
    printf("%s: %s\n", ok ? "ok" : "WRONG", what.c_str());
    if (!ok) {
        exit(1);
    }
}

struct pair_of_machines {
    machine server, local; // the local one has plain blocks
    std::vector<char> bytes;
    std::string name;

    void same_bytes(ggml_tensor * t, const std::string & when) {
        std::vector<char> got(bytes.size());
        ggml_backend_tensor_get(t, got.data(), 0, got.size());
        check(got == bytes, name + ": bytes " + when);
    }

    void same(ggml_cgraph * machine::* g, ggml_tensor * machine::* t, const std::string & when) {
        const std::vector<float> a = server.compute(server.*g, server.*t), b = local.compute(local.*g, local.*t);
        check(a == b && std::any_of(b.begin(), b.end(), [](float y) { return y != 0; }), name + ": " + when);
    }

    void product(const std::string & when) { same(&machine::multiply, &machine::product, "product " + when); }

    void set(size_t offset, size_t size) {
        for (machine * m : { &server, &local }) {
            ggml_backend_tensor_set(m->w, bytes.data() + offset, offset, size);
        }
    }

    void run(ggml_type type, int64_t columns) {
        const int64_t n = server.w->ne[0], experts = server.w->ne[2];
        bytes = weights(type, ggml_nbytes(server.w));
        set(0, bytes.size());
        const std::vector<float> x = activations(n * columns);
        std::vector<int32_t> ids(2 * columns);
        for (size_t i = 0; i < ids.size(); ++i) {
            ids[i] = (int32_t) (i % (size_t) std::max<int64_t>(experts, 2));
        }
        for (machine * of : { &server, &local }) {
            ggml_backend_tensor_set(of->x, x.data(), 0, ggml_nbytes(of->x));
            ggml_backend_tensor_set(of->ids, ids.data(), 0, ggml_nbytes(of->ids));
        }
        product("at first");
        product("again");
        same_bytes(server.w, "after a product");
        product("after reading");

        char some[100];
        ggml_backend_tensor_get(server.w, some, bytes.size() / 2, sizeof(some));
        check(memcmp(some, bytes.data() + bytes.size() / 2, sizeof(some)) == 0, name + ": some bytes");
        product("after reading some");

        const size_t row = server.w->nb[1];
        const std::vector<char> fresh = weights(type, row);
        memcpy(bytes.data() + row, fresh.data(), row);
        set(row, row);
        product("after writing one row");
        same_bytes(server.w, "after that");

        product("before a copy");
        ggml_backend_tensor_copy(server.w, server.other);
        same_bytes(server.other, "of a copy");
        product("after a copy");
        ggml_backend_tensor_copy(server.other, server.w);
        product("after copying back");

        memset(bytes.data(), 0, row);
        for (machine * of : { &server, &local }) {
            ggml_backend_tensor_memset(of->w, 0, 0, row);
        }
        product("after clearing a row");
        same_bytes(server.w, "after that");

        product("before a slice's");
        same(&machine::multiply_slice, &machine::slice, "product of a slice");
        product("after a slice's");
        same_bytes(server.w, "after a slice's product");
        set(0, bytes.size());
        product("after writing all");
        same(&machine::read_rows, &machine::rows, "rows");
        product("after reading rows");
        same_bytes(server.w, "at the end");

        ggml_backend_buffer_clear(server.buffer, 0);
        std::fill(bytes.begin(), bytes.end(), 0);
        same_bytes(server.w, "after clearing all");
        ggml_backend_buffer_free(server.buffer);
    }
};

int main(int argc, char ** argv) {
    if (argc != 3) {
        return 2;
    }
    ggml_backend_reg_t reg = ggml_backend_rpc_add_server(argv[1]);
    ggml_backend_t server = ggml_backend_dev_init(ggml_backend_reg_dev_get(reg, 0), nullptr), local = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(local, 2);
    ggml_type type = GGML_TYPE_COUNT;
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const char * name = ggml_type_name((ggml_type) i);
        type = name && strcmp(name, argv[2]) == 0 ? (ggml_type) i : type;
    }
    struct {
        int64_t n, m, experts, columns;
    } shapes[] = { { 512, 128, 1, 1 }, { 256, 64 + 7, 1, 3 }, { 512, 30, 1, 2 }, { 256, 96, 4, 5 }, { 4096, 4096, 1, 40 } };
    for (const auto & s : shapes) {
        char name[100];
        snprintf(name, sizeof(name), "%d x %d x %d", (int) s.n, (int) s.m, (int) s.experts);
        pair_of_machines both = {
            machine(server, type, s.n, s.m, s.experts, s.columns), machine(local, type, s.n, s.m, s.experts, s.columns), {}, name
        };
        both.run(type, s.columns);
    }
    return 0;
}

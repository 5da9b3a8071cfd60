// Runs mul_mat.hpp on threads without ggml (threads.hpp), under ThreadSanitizer or under AddressSanitizer and UBSan. Sums are exact, so
// results must equal the plain scalar kernel's. usage: threads_repacked SEED, with an instruction set in SHERRY_ISA

#include "threads.hpp"
#include "traits.h"

#include <cmath>

namespace ggml::cpu {
tensor_traits::~tensor_traits() {}
namespace repack {
struct tensor_traits_base : public ggml::cpu::tensor_traits {
    virtual int repack(struct ggml_tensor * t, const void * data, size_t data_size) = 0;
};
} // namespace repack
} // namespace ggml::cpu

#include "ggml/mul_mat.hpp"

// ---- of ggml ----

int64_t ggml_nrows(const ggml_tensor * t) { return t->ne[1] * t->ne[2] * t->ne[3]; }

static size_t bytes_of(ggml_type type, int64_t n) {
    switch (type) {
        case GGML_TYPE_TQ1_25:    return n / QK_TQ1_25 * sizeof(block_tq1_25);
        case GGML_TYPE_TQ1_25_64: return n / QK_TQ1_25_64 * sizeof(block_tq1_25_64);
        case GGML_TYPE_Q8_0:      return n / TQ1_25_QK8_0 * sizeof(tq1_25_q8_0);
        default:                  return n * 4; // float and int32
    }
}

const char * ggml_type_name(ggml_type) { return "?"; }

size_t ggml_row_size(ggml_type type, int64_t n) { return bytes_of(type, n); }

size_t ggml_nbytes(const ggml_tensor * t) { return t->nb[3] * t->ne[3]; }

void * ggml_backend_buffer_get_base(ggml_backend_buffer_t buffer) { return buffer->context; }

size_t ggml_backend_buffer_get_size(ggml_backend_buffer_t buffer) { return buffer->size; }

static void q8_0(const float * x, void * y, int64_t n) { tq1_25_quantize_q8_0(x, (tq1_25_q8_0 *) y, n); }

const ggml_type_traits_cpu * ggml_get_type_traits_cpu(ggml_type) {
    static const ggml_type_traits_cpu of_q8_0 = { q8_0, nullptr, GGML_TYPE_Q8_0, 1 };
    return &of_q8_0;
}

// ---- the cases ----

static ggml_tensor tensor(ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3) {
    ggml_tensor t = {};
    t.type = type;
    const int64_t ne[] = { ne0, ne1, ne2, ne3 };
    std::copy(ne, ne + 4, t.ne);
    t.nb[0] = type == GGML_TYPE_TQ1_25 ? sizeof(block_tq1_25) : type == GGML_TYPE_TQ1_25_64 ? sizeof(block_tq1_25_64) : 4;
    t.nb[1] = bytes_of(type, ne0);
    t.nb[2] = t.nb[1] * ne1;
    t.nb[3] = t.nb[2] * ne2;
    return t;
}

// One operation by every number of threads, with rows of nb blocks. used = 0: MUL_MAT of columns; else MUL_MAT_ID of tokens with that many
// experts.
static void run(ggml_type type, int64_t nb, int64_t rows, int64_t columns, int64_t experts, int64_t used, bool one_row, bool skewed) {
    const bool of_64 = type == GGML_TYPE_TQ1_25_64;
    const int64_t n = nb * (of_64 ? QK_TQ1_25_64 : QK_TQ1_25);
    const size_t row_size = bytes_of(type, n);
    ggml_tensor w = tensor(type, n, rows, experts, 1);
    ggml_tensor y = used ? tensor(GGML_TYPE_F32, n, one_row ? 1 : used, columns, 1) : tensor(GGML_TYPE_F32, n, columns, 1, 1);
    ggml_tensor id = tensor(GGML_TYPE_I32, used, columns, 1, 1);
    ggml_tensor op = used ? tensor(GGML_TYPE_F32, rows, used, columns, 1) : tensor(GGML_TYPE_F32, rows, columns, 1, 1);
    op.op = used ? GGML_OP_MUL_MAT_ID : GGML_OP_MUL_MAT;

    std::vector<uint8_t> blocks(row_size * (size_t) (rows * experts)), repacked(blocks.size());
    for (uint8_t & b : blocks) {
        b = (uint8_t) generator();
    }
    const size_t block = row_size / (size_t) nb;
    for (size_t end = block; end <= blocks.size(); end += block) {
        const uint16_t d = (uint16_t) (0x3c00 + 0x400 * below(2)); // 1 or 2
        memcpy(&blocks[end - sizeof(d)], &d, sizeof(d));
    }
    std::vector<float> activations((size_t) ggml_nrows(&y) * n), result((size_t) ggml_nrows(&op) * rows);
    for (size_t i = 0; i < activations.size(); ++i) { // a scale of 1 for each 32
        activations[i] = i % TQ1_25_QK8_0 == 0 ? 127.0f : (float) (below(255) - 127);
    }
    std::vector<int32_t> chosen((size_t) (used * columns));
    for (int32_t & e : chosen) {
        e = (int32_t) (skewed ? std::min(below(experts), below(2 * experts) / 2 * below(2)) : below(experts));
    }
    ggml_backend_buffer buffer = {};
    buffer.context = repacked.data();
    buffer.size = repacked.size();
    w.buffer = &buffer;
    w.data = repacked.data();
    y.data = activations.data();
    id.data = chosen.data();
    op.data = result.data();
    op.src[0] = &w;
    op.src[1] = &y;
    op.src[2] = used ? &id : nullptr;

    ggml::cpu::tensor_traits * traits = const_cast<ggml::cpu::tensor_traits *>(ggml::cpu::repack::tq1_25_traits::choose(&w));
    CHECK(traits, "%d rows\n", (int) rows);
    ((ggml::cpu::repack::tensor_traits_base *) traits)->repack(&w, blocks.data(), blocks.size());

    std::vector<tq1_25_q8_0> quantized(activations.size() / TQ1_25_QK8_0);
    tq1_25_quantize_q8_0(activations.data(), quantized.data(), (int64_t) activations.size());
    std::vector<float> expected(result.size());
    for (int64_t c = 0; c < ggml_nrows(&op); ++c) {
        const int64_t row = used && one_row ? c / used : c;
        const int64_t e = used ? chosen[(size_t) c] : 0;
        for (int64_t r = 0; r < rows; ++r) {
            const auto vec_dot = of_64 ? tq1_25_64_vec_dot_scalar : tq1_25_vec_dot_scalar;
            vec_dot(n, &expected[(size_t) (c * rows + r)], &blocks[row_size * (size_t) (e * rows + r)],
                    &quantized[(size_t) (row * n / TQ1_25_QK8_0)]);
        }
    }

    static const int counts[][2] = { { 1, 1 }, { 2, 2 }, { 3, 3 }, { 8, 8 }, { 8, 3 } }; // planned; OpenMP may give fewer
    for (const auto & count : counts) {
        const int planned = count[0], threads = count[1];
        size_t size = 0;
        CHECK(traits->work_size(planned, &op, size), "\n");
        std::fill(result.begin(), result.end(), NAN);
        on_threads(threads, size, [&](ggml_compute_params * params) { CHECK(traits->compute_forward(params, &op), "\n"); });
        CHECK(result == expected, "n %d, %d rows, %d columns, %d experts, %d used, %d threads\n", (int) n, (int) rows, (int) columns,
              (int) experts, (int) used, threads);
    }
}

int main(int argc, char ** argv) {
    if (argc != 2) {
        return 2;
    }
    generator.seed((unsigned) atoi(argv[1]));
    const int tables = tq1_25_best_isa()->max_tables, codes = std::min<int>(tq1_25_best_isa()->max_codes, TQ1_25_CODE_COLUMNS);
    int operations = 0;
    for (bool on_numa : { false, true }) {
        numa = on_numa;
        int turn = numa; // each case meets one type without NUMA, the other with it
        const auto type = [&] { return turn++ % 2 ? GGML_TYPE_TQ1_25_64 : GGML_TYPE_TQ1_25; };
        for (int64_t rows : { 64, 130, 1100 }) {
            for (int64_t columns : { 1, 2, 7, tables, tables + 1, codes, codes + 1, 3 * codes, 50, 80 }) {
                run(type(), rows == 1100 ? 1 : 3, rows, columns, 1, 0, false, false);
                ++operations;
            }
        }
        for (int64_t tokens : { 1, 3, tables, tables + 1, codes + 1, 3 * codes }) {
            for (bool one_row : { false, true }) {
                for (bool skewed : { false, true }) {
                    run(type(), 3, tokens % 2 ? 130 : 64, tokens, 5, 1 + below(3), one_row, skewed);
                    ++operations;
                }
            }
        }
    }
    // matrices that are more than a megabyte are repacked by several threads
    for (ggml_type large : { GGML_TYPE_TQ1_25, GGML_TYPE_TQ1_25_64 }) {
        run(large, 45, 2750, 1, 1, 0, false, false);
        run(large, 45, 1300, 2, 2, 1, false, false);
        operations += 2;
    }
    printf("%d operations\n", operations);
    return 0;
}

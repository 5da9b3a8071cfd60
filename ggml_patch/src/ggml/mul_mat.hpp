// Our types in ggml's repack buffer; ggml-cpu/repack.cpp includes this file. It finds rows and columns and shares the work among
// the threads. repack.c and the kernels do the arithmetic.

#pragma once

#include "../repack.h"
#include "types.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <numeric>
#include <thread>
#include <vector>

#ifdef __linux__
#    include <sys/mman.h>
#    include <unistd.h>
#    ifndef MADV_POPULATE_WRITE // since Linux 5.14; older kernels refuse it
#        define MADV_POPULATE_WRITE 23
#    endif
#endif

namespace ggml::cpu::repack {
// Private to this library. If several variants of ggml-cpu are loaded, they would otherwise share the statics of inline functions, and
// through them the code of the first variant, which this CPU may not run.
namespace {

// MUL_MAT and MUL_MAT_ID of a repacked tensor of our types. The columns of a matrix are the vectors that it multiplies. MUL_MAT has one
// matrix, MUL_MAT_ID one per expert. One column is multiplied by tables, several by codes, wide tables or panels.
class tq1_25_traits : public tensor_traits_base {
    struct work_buffer {
        bool ids;
        int64_t n, rows, columns, experts, tile_rows; // rows of src1; tile_rows in a matrix
        bool all_tables;                       // by tables; else each matrix by codes, panels or wide tables
        bool own_tables;                       // of each thread
        size_t row_size, table_size;
        size_t q8_0, tables, panels;             // offsets
        size_t code_scratch, panel_scratch, wide_scratch; // offsets, one per thread
        size_t y, s, table;                      // offsets of each column's pointers, by expert: activations, result, table
        size_t first, cursor;                    // offsets: each expert's first column, then the end; where to add a column
        size_t size = 0;

        work_buffer(const ggml_tensor * op, int n_threads) {
            const ggml_tensor *src0 = op->src[0], *src1 = op->src[1];
            const tq1_25_isa * isa = tq1_25_best_isa();
            ids = op->op == GGML_OP_MUL_MAT_ID;
            n = src0->ne[0];
            rows = ggml_nrows(src1);
            columns = ggml_nrows(op);
            experts = ids ? src0->ne[2] : 1;
            tile_rows = (src0->ne[1] + TQ1_25_TILE - 1) / TQ1_25_TILE;
            // With few tokens most experts have one column, and experts share the tables of a token.
            const int64_t tokens = op->ne[2];
            all_tables =
                ids ? tokens <= isa->max_tables || (tokens <= TQ1_25_CODE_COLUMNS && columns <= experts) : columns <= isa->max_tables;
            row_size = ggml_row_size(GGML_TYPE_Q8_0, n);
            table_size = (size_t) tq1_25_table_size(isa, n);
            const bool many = !all_tables && columns > isa->max_codes; // perhaps no single expert has enough
            const bool any_panels = many && isa->gemm;
            q8_0 = take(row_size, rows);
            // Lines that one thread writes and others read cost a few threads more time than tables of their own. The buffer holds own
            // tables in any case: there may be fewer threads than planned.
            enum { FEW_THREADS = 4 };
            own_tables = all_tables && !ids && n_threads <= FEW_THREADS;
            const int64_t copies = ids ? 1 : std::min<int64_t>(n_threads, FEW_THREADS);
            tables = take(table_size, all_tables ? copies * rows : 0);
            panels = take((size_t) tq1_25_panel_size(n, 1), any_panels ? columns : 0);
            code_scratch = take(sizeof(tq1_25_code_scratch), all_tables || (any_panels && !ids) ? 0 : n_threads);
            panel_scratch = take(sizeof(tq1_25_panel_scratch), any_panels ? n_threads : 0);
            wide_scratch = take(sizeof(tq1_25_wide_scratch), many && isa->wide_rows ? n_threads : 0);
            y = take(sizeof(void *), columns);
            s = take(sizeof(void *), columns);
            table = take(sizeof(void *), all_tables ? copies * columns : 0);
            first = take(sizeof(int64_t), experts + 1);
            cursor = take(sizeof(int64_t), experts);
        }

        size_t take(size_t bytes, int64_t count) {
            const size_t at = size;
            size = GGML_PAD(at + bytes * (size_t) count, 64);
            return at;
        }
    };

    struct job : work_buffer {
        ggml_compute_params * params;
        ggml_tensor * op;
        const tq1_25_isa * isa = tq1_25_best_isa();
        const tq1_25_kind kind;
        char * base;

        job(ggml_compute_params * params, ggml_tensor * op)
            : work_buffer(op, params->nth), params(params), op(op), kind(kind_of(op->src[0])) {
            base = (char *) GGML_PAD((uintptr_t) params->wdata, 64);
            GGML_ASSERT(base + size <= (char *) params->wdata + params->wsize);
        }

        template <typename T> T * at(size_t offset) const { return (T *) (base + offset); }

        const tq1_25_q8_0 ** columns_y() const { return at<const tq1_25_q8_0 *>(y); }
        float ** columns_s() const { return at<float *>(s); }
        void ** columns_table() const { return at<void *>(table) + (own_tables ? params->ith * columns : 0); }
        int64_t * firsts() const { return at<int64_t>(first); }

        tq1_25_q8_0 * activations(int64_t row_) const { return at<tq1_25_q8_0>(q8_0 + row_size * (size_t) row_); }
        void * table_of(int64_t row_) const { return base + tables + table_size * (size_t) (row_ + (own_tables ? params->ith * rows : 0)); }
        // The panels of an expert are consecutive, each as large as its columns need.
        void * panel_at(int64_t column) const { return base + panels + tq1_25_panel_size(n, 1) * column; }
        bool by_panels(int64_t count) const { return isa->gemm && !all_tables && count > isa->max_codes; }
        // If there is not a tile row for each thread, codes share better: by columns, too.
        bool by_wide(int64_t count) const {
            return isa->wide_rows && !all_tables && count > isa->max_codes && (ids || tq1_25_wide_groups(count) * tile_rows >= params->nth);
        }

        // Calls f(item, begin, end) for this thread's share of the items. If they are fewer than the threads, cuts each along the vector.
        template <typename F> void share(int64_t count, F f) const {
            const int64_t blocks = (n + QK_TQ1_25 - 1) / QK_TQ1_25; // of 128 activations; the last one may have 64
            const int64_t cuts = count < params->nth ? std::min((params->nth + count - 1) / std::max<int64_t>(count, 1), blocks) : 1;
            for (int64_t i = params->ith; i < count * cuts; i += params->nth) {
                const int64_t cut = i % cuts;
                f(i / cuts, blocks * cut / cuts * QK_TQ1_25, std::min(blocks * (cut + 1) / cuts * QK_TQ1_25, n));
            }
        }

        void quantize(int64_t row_, int64_t begin, int64_t end) const {
            const ggml_tensor * src1 = op->src[1];
            const int64_t i1 = row_ % src1->ne[1], i2 = row_ / src1->ne[1] % src1->ne[2], i3 = row_ / src1->ne[1] / src1->ne[2];
            const char * x = (const char *) src1->data + i1 * src1->nb[1] + i2 * src1->nb[2] + i3 * src1->nb[3];
            const auto to_q8_0 = ggml_get_type_traits_cpu(GGML_TYPE_Q8_0)->from_float;
            if (kind != KIND_STQ1_0) {
                to_q8_0((const float *) x + begin, activations(row_) + begin / TQ1_25_QK8_0, end - begin);
                return;
            }
            for (int64_t i = begin; i < end; i += QK_STQ1_0) {
                float ordered[QK_STQ1_0];
                const int64_t count = std::min<int64_t>(QK_STQ1_0, end - i);
                stq1_0_order((const float *) x + i, ordered, count);
                to_q8_0(ordered, activations(row_) + i / TQ1_25_QK8_0, count);
            }
        }

        void find_columns() const {
            for (int64_t c = 0; c < columns; ++c) {
                const int64_t i1 = c % op->ne[1], i2 = c / op->ne[1] % op->ne[2], i3 = c / op->ne[1] / op->ne[2];
                columns_y()[c] = activations(c);
                columns_s()[c] = (float *) ((char *) op->data + i1 * op->nb[1] + i2 * op->nb[2] + i3 * op->nb[3]);
                if (all_tables && !own_tables) {
                    columns_table()[c] = table_of(c);
                }
            }
            firsts()[0] = 0;
            firsts()[1] = columns;
        }

        void find_columns_of_experts() const {
            const ggml_tensor *src1 = op->src[1], *id = op->src[2];
            const auto expert = [&](int64_t token, int64_t k) {
                const int32_t e = *(const int32_t *) ((const char *) id->data + token * id->nb[1] + k * id->nb[0]);
                GGML_ASSERT(e >= 0 && e < experts);
                return e;
            };
            std::fill(firsts(), firsts() + experts + 1, 0);
            for (int64_t token = 0; token < id->ne[1]; ++token) {
                for (int64_t k = 0; k < id->ne[0]; ++k) {
                    ++firsts()[expert(token, k) + 1];
                }
            }
            std::partial_sum(firsts(), firsts() + experts + 1, firsts());
            std::copy(firsts(), firsts() + experts, at<int64_t>(cursor));
            for (int64_t token = 0; token < id->ne[1]; ++token) {
                for (int64_t k = 0; k < id->ne[0]; ++k) {
                    const int64_t e = expert(token, k), row_ = k % src1->ne[1] + token * src1->ne[1];
                    const int64_t c = at<int64_t>(cursor)[e]++;
                    columns_y()[c] = activations(row_);
                    columns_s()[c] = (float *) ((char *) op->data + k * op->nb[1] + token * op->nb[2]);
                    if (all_tables) {
                        columns_table()[c] = table_of(row_);
                    }
                }
            }
        }

        void make_panels_of_experts() const {
            int64_t item = 0;
            for (int64_t e = 0; e < experts; ++e) {
                const int64_t begin = firsts()[e], count = firsts()[e + 1] - begin;
                for (int64_t panel = 0; by_panels(count) && panel < tq1_25_panels(count); ++panel) {
                    if (item++ % params->nth == params->ith) {
                        const int64_t c = begin + tq1_25_first_column(count, panel), last = begin + tq1_25_first_column(count, panel + 1);
                        tq1_25_make_panel(0, n, (int) (last - c), columns_y() + c, panel_at(c));
                    }
                }
            }
        }

        // Quantizes the activations to Q8_0 and makes tables or panels of them.
        void prepare() const {
            if (params->ith == 0) {
                if (ids) {
                    find_columns_of_experts();
                } else {
                    find_columns();
                }
                ggml_threadpool_chunk_set(params->threadpool, params->nth); // for multiply()
            }
            if (all_tables) {
                share(rows, [&](int64_t row_, int64_t begin, int64_t end) {
                    quantize(row_, begin, end);
                    if (!own_tables) {
                        tq1_25_make_table(isa, n, begin, end, activations(row_), table_of(row_));
                    }
                });
            } else if (!ids && by_panels(columns)) {
                share(tq1_25_panels(columns), [&](int64_t panel, int64_t begin, int64_t end) {
                    const int64_t c = tq1_25_first_column(columns, panel);
                    const int count = (int) (tq1_25_first_column(columns, panel + 1) - c);
                    const tq1_25_q8_0 * of[TQ1_25_COLUMNS];
                    for (int k = 0; k < count; ++k) {
                        quantize(c + k, begin, end);
                        of[k] = activations(c + k);
                    }
                    tq1_25_make_panel(begin, end, count, of, panel_at(c));
                });
            } else {
                share(rows, [&](int64_t row_, int64_t begin, int64_t end) { quantize(row_, begin, end); });
                if (by_panels(columns)) { // perhaps an expert's columns too
                    ggml_barrier(params->threadpool); // until activations and columns are there
                    make_panels_of_experts();
                }
            }
            ggml_barrier(params->threadpool);
            for (int64_t c = 0; own_tables && c < columns; ++c) {
                columns_table()[c] = table_of(c);
                tq1_25_make_table(isa, n, 0, n, activations(c), table_of(c));
            }
        }

        // Threads take items in turn; with NUMA, each has fixed ones. Tables: first each thread gets a share of three quarters of the tile
        // rows, since prefetching likes long runs, then threads take one by one, so that all end together. Codes and wide tables: items
        // are groups of columns, times pieces of the tile rows if the groups are few; a piece must be worth the tables that it makes.
        // Panels: items are tile rows, times groups of panels if the tile rows are few.
        void multiply() const {
            const bool numa = ggml_is_numa();
            const int64_t nth = params->nth, each = numa ? tile_rows / nth : tile_rows * 3 / 4 / nth;
            int64_t next = params->ith, before = 0;
            enum { FEWEST_TILE_ROWS = 16, FEWEST_PANELS = 8 }; // worth making tables for, worth decoding for
            const int64_t tiles = std::max(isa->code_tiles, 1),
                          pairs = (tile_rows + tiles - 1) / tiles; // multiplied together
            const auto code_groups = [&](int64_t times) {
                int64_t sum = 0;
                for (int64_t e = 0; e < experts; ++e) {
                    const int64_t count = firsts()[e + 1] - firsts()[e];
                    sum += by_panels(count) ? 0 : groups_of(count, times);
                }
                return std::max<int64_t>(sum, 1);
            };
            const int64_t times = (nth - 1) / (code_groups(1) * pairs) + 1; // enough for each thread
            const int64_t sum = code_groups(times);
            int64_t pieces = std::clamp<int64_t>(std::min((4 * nth - 1) / sum + 1, tile_rows / FEWEST_TILE_ROWS),
                                                 std::min((nth - 1) / sum + 1, pairs), pairs);
            while (pieces < pairs && pieces * sum < 4 * nth && pieces * sum % nth) { // if items are few, as many for each thread
                ++pieces;
            }
            for (int64_t e = 0; e < experts; ++e) {
                const int64_t count = firsts()[e + 1] - firsts()[e];
                if (count == 0) {
                    continue;
                }
                const int64_t panels_ = tq1_25_panels(count);
                const int64_t groups = std::clamp<int64_t>(4 * nth / tile_rows, 1, (panels_ + FEWEST_PANELS - 1) / FEWEST_PANELS);
                const int64_t shares = each > 0 ? nth : 0;
                const int64_t items = all_tables         ? shares + tile_rows - shares * each
                                      : by_panels(count) ? tile_rows * groups
                                                         : pieces * groups_of(count, times);
                for (; next < before + items; next = numa ? next + nth : ggml_threadpool_chunk_add(params->threadpool, 1)) {
                    const int64_t item = next - before;
                    if (all_tables) {
                        const int64_t tile_row = item < shares ? item * each : shares * each + (item - shares);
                        by_table(e, tile_row, item < shares ? tile_row + each : tile_row + 1);
                    } else if (by_panels(count)) {
                        const int64_t tile_row = item / groups, group = item % groups;
                        by_panel(e, tile_row, tile_row + 1, panels_ * group / groups, panels_ * (group + 1) / groups);
                    } else {
                        const int64_t group = item / pieces, piece = item % pieces;
                        by_code(e, groups_of(count, times), group, pairs * piece / pieces * tiles,
                                std::min(pairs * (piece + 1) / pieces * tiles, tile_rows));
                    }
                }
                before += items;
            }
        }

        const void * matrix(int64_t e) const { return (const char *) op->src[0]->data + e * op->src[0]->nb[2]; }

        void by_table(int64_t e, int64_t tile_row, int64_t end) const {
            const int64_t c = firsts()[e];
            tq1_25_mul_tables(isa, kind, op->src[0]->ne[1], n, matrix(e), tile_row, end, (int) (firsts()[e + 1] - c), columns_y() + c,
                              columns_table() + c, columns_s() + c);
        }

        // The number of column groups for wide tables, or for codes: the least, or `times` as many, of at least two columns each.
        int64_t groups_of(int64_t count, int64_t times) const {
            return by_wide(count) ? tq1_25_wide_groups(count) : std::min(tq1_25_code_groups(count) * times, (count + 1) / 2);
        }

        void by_code(int64_t e, int64_t groups, int64_t group, int64_t tile_row, int64_t end) const {
            const int64_t count = firsts()[e + 1] - firsts()[e];
            const bool wide = by_wide(count);
            const auto first = [&](int64_t g) { return wide ? tq1_25_first_of_wide(count, g) : tq1_25_first_of_group(count, groups, g); };
            const int64_t c = firsts()[e] + first(group);
            const int nc = (int) (first(group + 1) - first(group));
            if (wide && nc > isa->max_codes) { // the last group may have fewer
                tq1_25_mul_wide(isa, kind, op->src[0]->ne[1], n, matrix(e), tile_row, end, nc, columns_y() + c, columns_s() + c,
                                at<tq1_25_wide_scratch>(wide_scratch) + params->ith);
            } else {
                tq1_25_mul_codes(isa, kind, op->src[0]->ne[1], n, matrix(e), tile_row, end, nc, columns_y() + c, columns_s() + c,
                                 at<tq1_25_code_scratch>(code_scratch) + params->ith);
            }
        }

        void by_panel(int64_t e, int64_t tile_row, int64_t end, int64_t panel, int64_t last) const {
            const int64_t c = firsts()[e];
            tq1_25_mul_panels(isa, kind, op->src[0]->ne[1], n, matrix(e), tile_row, end, firsts()[e + 1] - c, panel, last, panel_at(c),
                              columns_s() + c, at<tq1_25_panel_scratch>(panel_scratch) + params->ith);
        }
    };

  public:
    static tq1_25_kind kind_of(const ggml_tensor * t) {
        switch (t->type) {
            SHERRY_TYPES(SHERRY_KIND)
            default: GGML_ABORT("%s is not a type of ours", ggml_type_name(t->type));
        }
    }

    // NULL, that is, no repacking, if the CPU has no kernels for it or the tensor does not fill a tile.
    static const ggml::cpu::tensor_traits * choose(const ggml_tensor * t) {
        static const tq1_25_traits traits;
        if (!tq1_25_best_isa()->gemv || t->ne[1] < TQ1_25_TILE) {
            return nullptr;
        }
        return &traits;
    }

    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override {
        if (op->op != GGML_OP_MUL_MAT && op->op != GGML_OP_MUL_MAT_ID) {
            return false;
        }
        size = work_buffer(op, n_threads).size + 64; // for the alignment
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        if (op->op != GGML_OP_MUL_MAT && op->op != GGML_OP_MUL_MAT_ID) {
            return false;
        }
        const ggml_tensor *src0 = op->src[0], *src1 = op->src[1];
        GGML_ASSERT(src1->type == GGML_TYPE_F32 && src1->nb[0] == sizeof(float) && op->nb[0] == sizeof(float));
        GGML_ASSERT(!src0->view_src); // a slice of tiles is not a slice of rows
        GGML_ASSERT(src0->ne[3] == 1 && (op->op == GGML_OP_MUL_MAT_ID ? src1->ne[3] : src0->ne[2]) == 1);
        const job job_(params, op);
        job_.prepare();
        job_.multiply();
        return true;
    }

    // Calls f(i) for all i < count on up to eight threads.
    template <typename F> static void share(int64_t count, F f) {
        static const int64_t most = std::min(std::thread::hardware_concurrency(), 8u); // asked once, since it reads a file
        std::atomic<int64_t> next = 0;
        const auto work = [&] {
            for (int64_t i = next++; i < count; i = next++) {
                f(i);
            }
        };
        std::vector<std::thread> helpers;
        helpers.reserve(8);
        try {
            for (int64_t i = 1; i < std::min(count, most); ++i) {
                helpers.emplace_back(work);
            }
        } catch (const std::exception &) { // no more threads or memory; go on with those there are
        }
        work();
        for (std::thread & helper : helpers) {
            helper.join();
        }
    }

    struct span {
        uintptr_t begin = 0, end = 0;
    };

    static span buffer_of(const ggml_tensor * t) {
        const uintptr_t base = (uintptr_t) ggml_backend_buffer_get_base(t->buffer);
        return { base, base + ggml_backend_buffer_get_size(t->buffer) };
    }

    // Asks the system for the memory of a tensor and of what follows it in its buffer: ahead of writing, since threads that meet in a page
    // would each clear one, and not all at once, since the file's pages are released meanwhile.
    static void get_memory(const ggml_tensor * t) {
#ifdef __linux__
        constexpr uintptr_t large = 2 << 20, ahead = 32 << 20;
        thread_local span of, got;
        const span buffer = buffer_of(t);
        const uintptr_t data = (uintptr_t) t->data, size = ggml_nbytes(t), page = (uintptr_t) sysconf(_SC_PAGESIZE);
        if (of.begin == buffer.begin && of.end == buffer.end && got.begin <= data && data + size <= got.end) {
            return;
        }
        const uintptr_t begin = std::max(data / large * large, buffer.begin / page * page);
        const uintptr_t end = std::min((std::max(data + size, begin + ahead) / large + 1) * large, buffer.end);
        share((int64_t) ((end - 1) / large - begin / large + 1), [&](int64_t i) {
            const uintptr_t from = std::max((begin / large + (uintptr_t) i) * large, begin);
            const uintptr_t to = std::min((from / large + 1) * large, end);
            madvise((void *) from, to - from, MADV_POPULATE_WRITE); // may fail
        });
        of = buffer;
        got = { begin, end };
#else
        (void) t;
#endif
    }

    int repack(ggml_tensor * t, const void * data, size_t size) override {
        GGML_ASSERT(size == ggml_nbytes(t));
        get_memory(t);
        const int64_t n = t->ne[0], matrix = t->ne[1];
        const int64_t run = ((1 << 19) / (int64_t) t->nb[1] / TQ1_25_TILE + 1) * TQ1_25_TILE; // about half a MiB
        const int64_t runs = (matrix + run - 1) / run;
        share(runs * t->ne[2] * t->ne[3], [&](int64_t i) {
            const int64_t begin = i % runs * run, rows = std::min(matrix - begin, run);
            const size_t at = (size_t) (i / runs) * t->nb[2] + (size_t) begin * t->nb[1];
            tq1_25_repack(kind_of(t), rows, n, (const char *) data + at, (char *) t->data + at);
        });
        return 0;
    }

    // The repack buffer's get_tensor: a whole tensor's plain blocks. Upstream's buffer has none.
    static void unpack(ggml_backend_buffer_t, const ggml_tensor * t, void * data, size_t offset, size_t size) {
        if (!sherry_has_type(t->type) || offset != 0 || size != ggml_nbytes(t)) {
            GGML_ABORT("cannot read bytes %zu to %zu of %s, %s repacked: only TQ1_25, TQ1_25_64 and STQ1_0 can be read, and as a whole",
                       offset, offset + size, t->name, ggml_type_name(t->type));
        }
        for (int64_t i = 0; i < t->ne[2] * t->ne[3]; ++i) {
            const size_t at = (size_t) i * t->nb[2];
            tq1_25_unpack(kind_of(t), t->ne[1], t->ne[0], (const char *) t->data + at, (char *) data + at);
        }
    }
};

}  // namespace
}  // namespace ggml::cpu::repack

// rpc-server keeps matrices of our types repacked, as the local CPU does; ggml-rpc.cpp includes this file.
//
// The protocol stays as it is: clients write and read plain blocks. Before a graph runs on a CPU, each matrix that the graph does nothing
// with but multiply is repacked where it lies, since tiles take as many bytes. For that graph its tensor gets a buffer of ggml-cpu's
// repack type over the same memory, and ggml-cpu does the rest. Whatever else touches the bytes finds the plain blocks put back.

#pragma once

#include "rpc_socket.hpp"
#include "types.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

namespace sherry_rpc {
namespace {

// A buffer of the server's CPU with the matrices in it. It stands between upstream's server and upstream's buffer.
class held_buffer {
    struct matrix {
        ggml_tensor tensor; // type, shape and place
        bool repacked;
        bool plain; // stays plain, since some graph reads its blocks
    };

    ggml_backend_buffer_t known;  // the server's, with our functions
    ggml_backend_buffer plain;    // upstream's
    ggml_backend_buffer repacked; // of ggml-cpu's repack type, over the same memory
    char * base;
    std::map<const char *, matrix> matrices; // by address; none overlaps another
    std::vector<char> copy;
    // Each makes prepare() look at a graph again. Thread-local, since a process may run several servers, each on a thread of its own.
    static inline thread_local uint64_t changes = 0;

    static held_buffer * of(ggml_backend_buffer_t buffer) { return (held_buffer *) buffer->context; }
    static void * get_base(ggml_backend_buffer_t buffer) { return of(buffer)->base; }

    // Calls f(tensor) for pieces of a matrix, whole tiles but for the last rows, so that copies stay small. Pieces are tensors themselves.
    template <typename F> void pieces(const ggml_tensor & of, F f) {
        const int64_t tiles = std::max<int64_t>((4 << 20) / (int64_t) of.nb[1] / TQ1_25_TILE, 1), whole = of.ne[1] / TQ1_25_TILE;
        for (int64_t i = 0; i < of.ne[2]; ++i) {
            for (int64_t begin = 0; begin < whole; begin += tiles) {
                const int64_t end = std::min(begin + tiles, whole);
                ggml_tensor piece = of;
                piece.ne[1] = end < whole ? (end - begin) * TQ1_25_TILE : of.ne[1] - begin * TQ1_25_TILE;
                piece.ne[2] = 1;
                piece.nb[2] = piece.nb[3] = piece.nb[1] * (size_t) piece.ne[1];
                piece.data = (char *) of.data + (size_t) i * of.nb[2] + (size_t) begin * TQ1_25_TILE * of.nb[1];
                copy.resize(piece.nb[2]);
                f(piece);
            }
        }
        copy = {};
    }

    void repack(matrix & m) {
        pieces(m.tensor, [&](ggml_tensor & piece) {
            memcpy(copy.data(), piece.data, copy.size());
            repacked.iface.set_tensor(&repacked, &piece, copy.data(), 0, copy.size());
        });
        m.repacked = true;
    }

    void restore(matrix & m) {
        if (m.repacked) {
            pieces(m.tensor, [&](ggml_tensor & piece) {
                repacked.iface.get_tensor(&repacked, &piece, copy.data(), 0, copy.size());
                memcpy(piece.data, copy.data(), copy.size());
            });
        }
        m.repacked = false;
    }

    // Calls f(iterator) for the matrices that have bytes in a range; f may erase its matrix.
    template <typename F> void overlapping(const void * data, size_t size, F f) {
        const char * begin = (const char *) data;
        auto i = matrices.upper_bound(begin);
        if (i != matrices.begin() && std::prev(i)->first + ggml_nbytes(&std::prev(i)->second.tensor) > begin) {
            --i;
        }
        while (i != matrices.end() && i->first < begin + size) {
            f(i++);
        }
    }

    // Before a client's access. A later graph may repack again.
    void forget(const void * data, size_t size) {
        overlapping(data, size, [&](auto i) {
            ++changes;
            restore(i->second);
            matrices.erase(i);
        });
    }

    static bool same(const ggml_tensor & a, const ggml_tensor & b) {
        return a.data == b.data && a.type == b.type && std::equal(a.ne, a.ne + GGML_MAX_DIMS, b.ne);
    }

  public:
    held_buffer(ggml_backend_buffer_t buffer, ggml_backend_buffer_t of_repack_type)
        : known(buffer), plain(*buffer), repacked(*of_repack_type), base((char *) ggml_backend_buffer_get_base(buffer)) {
        repacked.iface.free_buffer = nullptr;
        repacked.iface.get_base = get_base;
        repacked.context = this;
        repacked.size = buffer->size;
        buffer->context = this;
        buffer->iface.get_base = get_base;
        buffer->iface.free_buffer = [](ggml_backend_buffer_t b) {
            of(b)->plain.iface.free_buffer(&of(b)->plain);
            delete of(b);
        };
        buffer->iface.memset_tensor = [](ggml_backend_buffer_t b, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
            of(b)->forget((char *) t->data + offset, size);
            of(b)->plain.iface.memset_tensor(&of(b)->plain, t, value, offset, size);
        };
        buffer->iface.set_tensor = [](ggml_backend_buffer_t b, ggml_tensor * t, const void * data, size_t offset, size_t size) {
            of(b)->forget((char *) t->data + offset, size);
            of(b)->plain.iface.set_tensor(&of(b)->plain, t, data, offset, size);
        };
        buffer->iface.get_tensor = [](ggml_backend_buffer_t b, const ggml_tensor * t, void * data, size_t offset, size_t size) {
            of(b)->forget((char *) t->data + offset, size);
            of(b)->plain.iface.get_tensor(&of(b)->plain, t, data, offset, size);
        };
        buffer->iface.set_tensor_2d = nullptr; // ggml calls set_tensor and get_tensor then
        buffer->iface.get_tensor_2d = nullptr;
        buffer->iface.cpy_tensor = [](ggml_backend_buffer_t b, const ggml_tensor * src, ggml_tensor * dst) {
            if (held_buffer * other = find(src->buffer)) {
                other->forget(src->data, ggml_nbytes(src));
            }
            of(b)->forget(dst->data, std::max(ggml_nbytes(src), ggml_nbytes(dst)));
            return of(b)->plain.iface.cpy_tensor(&of(b)->plain, src, dst);
        };
        buffer->iface.clear = [](ggml_backend_buffer_t b, uint8_t value) {
            ++changes;
            of(b)->matrices.clear();
            of(b)->plain.iface.clear(&of(b)->plain, value);
        };
    }

    // NULL if a buffer, perhaps NULL, is neither such a buffer nor the one that repacked tensors have.
    static held_buffer * find(ggml_backend_buffer_t buffer) { return buffer && buffer->iface.get_base == get_base ? of(buffer) : nullptr; }

    static uint64_t count_changes() { return changes; }

    // A tensor that a graph multiplies by. Returns false if it cannot be repacked.
    bool add(const ggml_tensor * t) {
        const auto i = matrices.find((const char *) t->data);
        if (i != matrices.end() && same(i->second.tensor, *t)) {
            return true;
        }
        bool alone = true;
        overlapping(t->data, ggml_nbytes(t), [&](auto) { alone = false; });
        matrix m = { *t, false, false };
        m.tensor.buffer = &repacked;
        m.tensor.extra = nullptr;
        if (!alone || (uintptr_t) t->data % ggml_backend_buft_get_alignment(repacked.buft) != 0 ||
            repacked.iface.init_tensor(&repacked, &m.tensor) != GGML_STATUS_SUCCESS || !m.tensor.extra) {
            return false;
        }
        matrices.emplace((const char *) t->data, m);
        return true;
    }

    // Bytes that a graph reads or writes in any other way.
    void keep_plain(const void * data, size_t size) {
        overlapping(data, size, [&](auto i) {
            changes += i->second.repacked;
            restore(i->second);
            i->second.plain = true;
        });
    }

    // Undoes use_repacked(): a graph that is computed again may have to read plain blocks this time.
    void use_plain(ggml_tensor * t) const {
        t->buffer = known;
        t->extra = nullptr;
    }

    // Gives a tensor of add() its buffer for the graph; returns the bytes that it repacked for it.
    size_t use_repacked(ggml_tensor * t) {
        matrix & m = matrices.at((const char *) t->data);
        if (m.plain) {
            return 0;
        }
        const bool was = m.repacked;
        if (!was) {
            repack(m);
        }
        t->buffer = &repacked;
        t->extra = m.tensor.extra;
        return was ? 0 : ggml_nbytes(t);
    }
};

// Would ggml-cpu's repack buffer multiply so? What it would not falls to upstream's operation, with upstream's checks. A client may send
// any sizes and strides, so weights and results must be contiguous and not empty: ggml_nbytes() is then what the kernels read and write.
inline bool multiplies(const ggml_tensor * op) {
    const ggml_tensor *w = op->src[0], *x = op->src[1], *ids = op->src[2];
    if ((op->op != GGML_OP_MUL_MAT && op->op != GGML_OP_MUL_MAT_ID) || !w || !x || !sherry_has_type(w->type) || w->view_src ||
        w->op != GGML_OP_NONE || ggml_is_empty(w) || ggml_is_empty(x) || w->ne[0] % ggml_blck_size(w->type) != 0 ||
        w->nb[0] != ggml_type_size(w->type) || !ggml_is_contiguous(w) || w->ne[3] != 1 || x->type != GGML_TYPE_F32 ||
        x->nb[0] != sizeof(float) || op->type != GGML_TYPE_F32 || op->nb[0] != sizeof(float) || !ggml_is_contiguous(op) ||
        x->ne[0] != w->ne[0] || op->ne[0] != w->ne[1]) {
        return false;
    }
    if (op->op == GGML_OP_MUL_MAT) {
        return w->ne[2] == 1 && std::equal(x->ne + 1, x->ne + GGML_MAX_DIMS, op->ne + 1);
    }
    return ids && ids->type == GGML_TYPE_I32 && op->ne[1] == ids->ne[0] && op->ne[2] == ids->ne[1] && x->ne[2] == ids->ne[1] &&
           ids->ne[0] % x->ne[1] == 0 && op->ne[3] == 1 && x->ne[3] == 1;
}

// alloc_buffer: repack what will lie in this buffer, if its device is a CPU with our types. SHERRY_RPC_REPACK=0 turns it off.
inline void hold(ggml_backend_buffer_t buffer, ggml_backend_t backend) {
    const char * wanted = std::getenv("SHERRY_RPC_REPACK");
    ggml_backend_dev_t device = ggml_backend_get_device(backend);
    if ((wanted && strcmp(wanted, "0") == 0) || buffer->size == 0 || buffer->buft != ggml_backend_cpu_buffer_type() ||
        ggml_backend_dev_type(device) != GGML_BACKEND_DEVICE_TYPE_CPU) {
        return;
    }
    const auto extra = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device),
                                                                                              "ggml_backend_dev_get_extra_bufts");
    for (ggml_backend_buffer_type_t * buft = extra ? extra(device) : nullptr; buft && *buft; ++buft) {
        if (strcmp(ggml_backend_buft_name(*buft), "CPU_REPACK") == 0) {
            ggml_backend_buffer_t one = ggml_backend_buft_alloc_buffer(*buft, 1); // for its functions
            if (one && one->iface.get_tensor) {
                new held_buffer(buffer, one); // frees itself with the buffer
            }
            ggml_backend_buffer_free(one);
        }
    }
}

// graph_compute, and graph_recompute with `again`: repacks what this graph only multiplies by.
inline void prepare(ggml_backend_t backend, ggml_cgraph * graph, bool again = false) {
    static thread_local ggml_cgraph * last;
    static thread_local uint64_t prepared;
    if (again && graph == last && held_buffer::count_changes() == prepared) {
        return;
    }
    const bool cpu = ggml_backend_dev_type(ggml_backend_get_device(backend)) == GGML_BACKEND_DEVICE_TYPE_CPU;
    std::vector<ggml_tensor *> weights;
    std::vector<const ggml_tensor *> others;
    for (int i = 0; i < graph->n_nodes; ++i) {
        ggml_tensor * node = graph->nodes[i];
        if (!node) {
            continue;
        }
        others.push_back(node);
        for (int k = 0; k < GGML_MAX_SRC; ++k) {
            ggml_tensor * src = node->src[k];
            held_buffer * buffer = src ? held_buffer::find(src->buffer) : nullptr;
            if (!buffer) {
                continue;
            }
            buffer->use_plain(src);
            if (k == 0 && cpu && multiplies(node) && buffer->add(src)) {
                weights.push_back(src);
            } else {
                others.push_back(src);
            }
        }
    }
    for (const ggml_tensor * t : others) {
        if (held_buffer * buffer = held_buffer::find(t->buffer)) {
            buffer->keep_plain(t->data, ggml_nbytes(t));
        }
    }
    size_t bytes = 0, count = 0;
    for (ggml_tensor * t : weights) {
        const size_t size = held_buffer::find(t->buffer)->use_repacked(t);
        bytes += size;
        count += size > 0;
    }
    last = graph;
    prepared = held_buffer::count_changes();
    if (count > 0) {
        GGML_LOG_INFO("rpc-server: repacked %zu matrices, %.1f MiB\n", count, (double) bytes / (1 << 20));
    }
}

} // namespace
} // namespace sherry_rpc

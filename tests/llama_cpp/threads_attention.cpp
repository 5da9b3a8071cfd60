// Runs attention.hpp on threads without ggml (threads.hpp), under ThreadSanitizer or under AddressSanitizer and UBSan. Operands have the
// exact size that may be read; prefetches do not count. Results are compared with double precision.
// usage: threads_attention SEED, with an instruction set in SHERRY_ISA

#include "threads.hpp"

#include "common.h"

#include <algorithm>
#include <cmath>

#include "isas.h"

// ---- the plans, so that no way of sharing the work is missed ----

static std::atomic<int> tiles, rounds, shared_keys, rounds_of_shared_keys;

static bool counted_plan(const sherry_attention * a, int threads, int64_t scratch, sherry_attention_plan * plan) {
    const bool can = sherry_attention_make_plan(a, threads, scratch, plan);
    tiles += plan->tiles;
    rounds += plan->rounds > 1 && plan->key_parts == 1;
    shared_keys += plan->rounds == 1 && plan->key_parts > 1;
    rounds_of_shared_keys += plan->rounds > 1 && plan->key_parts > 1;
    return can;
}

#define sherry_attention_make_plan counted_plan
#include "ggml/attention.hpp"

// ---- of ggml.c ----

size_t ggml_type_size(ggml_type type) { return type == GGML_TYPE_F32 ? 4 : type == GGML_TYPE_Q8_0 ? sizeof(tq1_25_q8_0) : 2; }
bool ggml_is_empty(const ggml_tensor * t) { return t->ne[0] == 0 || t->ne[1] == 0 || t->ne[2] == 0 || t->ne[3] == 0; }
bool ggml_is_contiguous(const ggml_tensor * t) { // for floats
    return t->nb[1] == 4 * (size_t) t->ne[0] && t->nb[2] == t->nb[1] * (size_t) t->ne[1] && t->nb[3] == t->nb[2] * (size_t) t->ne[2];
}

// ---- of ggml-cpu.c, ggml_graph_plan; test_sanitizers.py compares the lines ----

static size_t work_size(const ggml_tensor * node, int n_tasks) {
    const int64_t neq2 = node->src[0]->ne[2], DK = node->src[1]->ne[0], DV = node->src[2]->ne[0];
    // clang-format off
    size_t prefill  = sizeof(float)*(GGML_FA_TILE_Q*DK + 2*GGML_FA_TILE_Q*GGML_FA_TILE_KV + GGML_FA_TILE_Q*DV + GGML_FA_TILE_KV*DV + GGML_FA_TILE_KV*DK)*n_tasks;
    size_t n_chunks = n_tasks;
    size_t decode   = sizeof(float)*(neq2*n_chunks*(2+DV) + n_tasks*(DK + 2*DV));
    // clang-format on
    return std::max(prefill, decode) + 64 * (size_t) n_tasks; // CACHE_LINE_SIZE
}

// ---- operands ----

static double of_fp16(uint16_t h) {
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    const double x = exponent == 31 ? INFINITY : exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
    return h >> 15 ? -x : x;
}

static double of_bf16(uint16_t h) { return (h >> 15 ? -1 : 1) * ldexp(128 + (h & 127), (h >> 7 & 255) - 134); }

// Random bits of numbers between 2 ^ -low and 4.
static uint16_t random_fp16(int low) { return (uint16_t) (below(2) << 15 | (16 - below(low + 1)) << 10 | below(1024)); }
static uint16_t random_bf16(int low) { return (uint16_t) (below(2) << 15 | (128 - below(low + 1)) << 7 | below(128)); }

// A tensor with strides, in an allocation of its size.
struct operand {
    ggml_tensor t = {};
    std::vector<double> values; // [ne3][ne2][ne1][ne0]

    // `order` lists the axes 1 to 3 from the smallest stride to the greatest
    operand(ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3, const int (&order)[3] = { 1, 2, 3 }) {
        const int64_t ne[] = { ne0, ne1, ne2, ne3 };
        std::copy(ne, ne + 4, t.ne);
        t.type = type;
        t.nb[0] = ggml_type_size(type);
        size_t size = t.nb[0] * (size_t) (type == GGML_TYPE_Q8_0 ? ne0 / TQ1_25_QK8_0 : ne0);
        for (int axis : order) {
            t.nb[axis] = size;
            size *= (size_t) ne[axis];
        }
        t.data = malloc(size);
        values.resize((size_t) (ne0 * ne1 * ne2 * ne3));
    }
    operand(const operand &) = delete;
    ~operand() { free(t.data); }

    char * row(int64_t i1, int64_t i2, int64_t i3) {
        return (char *) t.data + (size_t) i1 * t.nb[1] + (size_t) i2 * t.nb[2] + (size_t) i3 * t.nb[3];
    }
    double * value(int64_t i1, int64_t i2, int64_t i3) { return &values[(size_t) (((i3 * t.ne[2] + i2) * t.ne[1] + i1) * t.ne[0])]; }

    // Fills each row with write(row, its values).
    template <typename Write> void fill(const Write & write) {
        for (int64_t i3 = 0; i3 < t.ne[3]; ++i3) {
            for (int64_t i2 = 0; i2 < t.ne[2]; ++i2) {
                for (int64_t i1 = 0; i1 < t.ne[1]; ++i1) {
                    write(row(i1, i2, i3), value(i1, i2, i3), i1);
                }
            }
        }
    }

    void fill_randomly() {
        fill([&](char * to, double * x, int64_t) {
            for (int64_t i = 0; i < t.ne[0]; ++i) {
                uint16_t * half = (uint16_t *) to + i;
                tq1_25_q8_0 * block = (tq1_25_q8_0 *) to + i / TQ1_25_QK8_0;
                switch (t.type) {
                    case GGML_TYPE_F32:  x[i] = ((float *) to)[i] = (float) (below(2001) - 1000) * 0.001f; break;
                    case GGML_TYPE_F16:  x[i] = of_fp16(*half = random_fp16(8)); break;
                    case GGML_TYPE_BF16: x[i] = of_bf16(*half = random_bf16(8)); break;
                    default:
                        if (i % TQ1_25_QK8_0 == 0) {
                            block->d = (uint16_t) (random_fp16(1) - (6 << 10)); // up to 1 / 16
                        }
                        x[i] = of_fp16(block->d) * (block->qs[i % TQ1_25_QK8_0] = (int8_t) (below(255) - 127));
                }
            }
        });
    }
};

enum mask_kind { NO_MASK, CAUSAL, WINDOW, HOLES, BIASED };

static const uint16_t MINUS_INFINITY = 0xfc00;

static void fill_mask(operand & mask, mask_kind kind, int64_t tokens) {
    const int64_t keys = mask.t.ne[0];
    mask.fill([&](char * to, double * x, int64_t token) {
        const int64_t last = std::max<int64_t>(keys - tokens + token, 0); // the last key that it sees
        const bool sees_nothing = kind == HOLES && below(3) == 0;
        for (int64_t j = 0; j < keys; ++j) {
            const bool seen = kind == CAUSAL || kind == BIASED ? j <= last
                              : kind == WINDOW                 ? j <= last - 5 && j > last - 70
                                                               : !sees_nothing && below(4) != 0;
            x[j] = of_fp16(((uint16_t *) to)[j] = !seen ? MINUS_INFINITY : kind == BIASED ? random_fp16(6) : 0);
        }
    });
}

// ---- the cases ----

struct shape {
    ggml_type k_type, v_type;
    int64_t k_size, v_size, tokens, keys, kv_heads, group, streams;
    mask_kind mask;
    bool own_masks, sinks; // masks for each head
    float max_bias, softcap;
};

// What float arithmetic may be off, to first order, as tests/native/attention_reference.py counts it.
static const double U = ldexp(1, -24);

// The exact result and its bound.
static void expect(const shape & c, operand & q, operand & k, operand & v, operand & mask, const float * sinks, float scale, int parts,
                   std::vector<double> & exact, std::vector<double> & bound) {
    const int64_t heads = c.kv_heads * c.group, chunks = c.keys / SHERRY_ATTENTION_KEYS + 1 + parts;
    const int64_t power = (int64_t) 1 << (int) log2((double) heads);
    exact.clear();
    bound.clear();
    std::vector<double> s((size_t) c.keys + 1), error(s.size());
    for (int64_t row = 0; row < c.streams * c.tokens * heads; ++row) {
        const int64_t stream = row / heads / c.tokens, token = row / heads % c.tokens, head = row % heads, kv_head = head / c.group;
        const double slope = c.max_bias <= 0 ? 1
                             : head < power  ? pow(2, -c.max_bias * (double) (head + 1) / (double) power)
                                             : pow(2, -c.max_bias * (2 * (double) (head - power) + 1) / 2 / (double) power);
        double most = -INFINITY, least = INFINITY, total = 0, errors = 0;
        for (size_t j = 0; j < s.size(); ++j) {
            if (j == (size_t) c.keys) { // the sink
                s[j] = sinks ? sinks[head] : -INFINITY;
                error[j] = 0;
            } else {
                const double *x = q.value(token, head, stream), *y = k.value((int64_t) j, kv_head, stream);
                double dot = 0, magnitude = 0;
                for (int64_t i = 0; i < c.k_size; ++i) {
                    dot += x[i] * y[i];
                    magnitude += fabs(x[i] * y[i]);
                }
                s[j] = scale * dot;
                error[j] = (double) (c.k_size + 3) * U * scale * magnitude;
                if (c.softcap != 0) {
                    s[j] = c.softcap * tanh(s[j] / c.softcap);
                    error[j] += 12 * U * c.softcap;
                }
                if (c.mask != NO_MASK) {
                    const double bias = slope * mask.value(token, head % mask.t.ne[2], stream % mask.t.ne[3])[j];
                    s[j] += bias;
                    error[j] += c.max_bias > 0 && std::isfinite(bias) ? fabs(bias) * (double) (2 * heads + 4) * U : 0;
                }
                error[j] += std::isfinite(s[j]) ? U * fabs(s[j]) : 0;
            }
            most = std::max(most, s[j]);
            least = std::isfinite(s[j]) ? std::min(least, s[j]) : least;
        }
        for (size_t j = 0; j < s.size(); ++j) {
            error[j] += std::isfinite(s[j]) ? U * (4 + 4 * (double) chunks + 1.05 * (most - s[j]) + (most - least)) : 0;
            s[j] = most == -INFINITY ? 0 : exp(s[j] - most);
            total += s[j];
            errors += s[j] * error[j];
        }
        for (int64_t i = 0; i < c.v_size; ++i) {
            double sum = 0, magnitude = 0, off = 0;
            for (int64_t j = 0; j < c.keys; ++j) {
                const double y = v.value(j, kv_head, stream)[i];
                sum += s[(size_t) j] * y;
                magnitude += s[(size_t) j] * fabs(y);
                off += s[(size_t) j] * error[(size_t) j] * fabs(y);
            }
            const double divisor = total == 0 ? 1 : total;
            exact.push_back(sum / divisor);
            off += errors * fabs(sum / divisor) + (double) (2 * c.keys + 2 * chunks + 8) * U * magnitude;
            bound.push_back(1.01 * (off / divisor + ldexp(1, -100)));
        }
    }
}

static int run(const shape & c) {
    const int64_t heads = c.kv_heads * c.group;
    const int apart[3] = { 2, 1, 3 }; // as in the cache: all heads of a key, or token
    operand q(GGML_TYPE_F32, c.k_size, c.tokens, heads, c.streams, apart);
    operand k(c.k_type, c.k_size, c.keys, c.kv_heads, c.streams, apart), v(c.v_type, c.v_size, c.keys, c.kv_heads, c.streams);
    operand mask(GGML_TYPE_F16, c.keys, c.tokens, c.own_masks ? heads : 1, below(2) ? c.streams : 1);
    operand sinks(GGML_TYPE_F32, heads, 1, 1, 1), dst(GGML_TYPE_F32, c.v_size, heads, c.tokens, c.streams);
    for (operand * x : { &q, &k, &v, &sinks }) {
        x->fill_randomly();
    }
    fill_mask(mask, c.mask, c.tokens);
    const float scale = 1.0f / sqrtf((float) c.k_size), params[] = { scale, c.max_bias, c.softcap };
    memcpy(dst.t.op_params, params, sizeof(params));
    dst.t.src[0] = &q.t;
    dst.t.src[1] = &k.t;
    dst.t.src[2] = &v.t;
    dst.t.src[3] = c.mask == NO_MASK ? nullptr : &mask.t;
    dst.t.src[4] = c.sinks ? &sinks.t : nullptr;
    std::vector<double> exact, bound;
    expect(c, q, k, v, mask, c.sinks ? (const float *) sinks.t.data : nullptr, scale, 8, exact, bound);
    int operations = 0;
    for (const auto & [planned, threads] : { std::pair{ 1, 1 }, { 2, 2 }, { 3, 3 }, { 4, 4 }, { 8, 8 }, { 8, 3 } }) {
        float * found = (float *) dst.t.data;
        std::fill(found, found + exact.size(), NAN);
        on_threads(threads, work_size(&dst.t, planned), [&](ggml_compute_params * p) { CHECK(sherry_attention_forward(p, &dst.t), "\n"); });
        for (size_t i = 0; i < exact.size(); ++i) {
            CHECK(fabs(found[i] - exact[i]) <= bound[i], "%d threads, %zu: %g, not %g within %g\n", threads, i, found[i], exact[i],
                  bound[i]);
        }
        ++operations;
    }
    return operations;
}

int main(int argc, char ** argv) {
    if (argc != 2) {
        return 2;
    }
    generator.seed((unsigned) atoi(argv[1]));
    const ggml_type F16 = GGML_TYPE_F16, BF16 = GGML_TYPE_BF16, Q8_0 = GGML_TYPE_Q8_0;
    const shape shapes[] = {
        // types          sizes     tokens keys kv_heads group streams
        { F16, F16, 64, 64, 1, 200, 2, 4, 1, CAUSAL, false, false, 0, 0 }, // decode
        { BF16, BF16, 80, 80, 1, 71, 1, 1, 1, CAUSAL, false, true, 0, 0 }, // one head: threads share the keys
        { Q8_0, Q8_0, 96, 96, 1, 1, 3, 3, 2, NO_MASK, false, true, 0, 0 }, // one key
        { F16, Q8_0, 192, 128, 2, 300, 1, 6, 2, WINDOW, false, false, 0, 20 }, //
        { Q8_0, BF16, 256, 256, 3, 150, 2, 2, 1, HOLES, true, true, 0, 0 }, //
        { BF16, F16, 64, 128, 1, 129, 3, 2, 3, BIASED, true, false, 8, 0 }, //
        { F16, F16, 64, 64, 2, 40, 23, 5, 1, CAUSAL, false, true, 0, 0 }, // several rounds
        { Q8_0, Q8_0, 64, 64, 2, 90, 5, 5, 5, HOLES, false, false, 0, 10 }, //
        { F16, F16, 64, 64, 37, 130, 2, 4, 1, CAUSAL, false, false, 0, 0 }, // prompts
        { BF16, Q8_0, 128, 64, 70, 70, 1, 1, 2, WINDOW, false, true, 0, 0 }, //
        { Q8_0, F16, 96, 112, 20, 65, 3, 3, 1, BIASED, true, true, 8, 30 }, //
        { F16, BF16, 256, 256, 9, 64, 2, 2, 2, HOLES, true, false, 0, 0 }, //
        { F16, F16, 80, 80, 16, 33, 1, 1, 1, NO_MASK, false, false, 0, 0 }, // fewer tiles than threads
    };
    int operations = 0;
    for (bool on_numa : { false, true }) {
        numa = on_numa;
        for (const shape & c : shapes) {
            operations += run(c);
        }
    }
    CHECK(tiles && rounds && shared_keys && rounds_of_shared_keys, "\n");
    printf("%d operations\n", operations);
    return 0;
}

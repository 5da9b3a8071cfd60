// Feeds random bytes to every decoder, encoder and product in ggml_patch/src, plain and repacked, and to attention. Allocations have exactly
// the size that may be touched. Run under AddressSanitizer and UBSan. usage: fuzz_kernels SEED ROUNDS

#include "attention.h"
#include "repack.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t state;

static uint32_t next(void) { // xorshift64*
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t) (state * 2685821657736338717ull >> 32);
}

static void * bytes(size_t n, size_t skew) { // random, skew bytes off an aligned address
    uint8_t * p = malloc(n + skew);
    for (size_t i = 0; i < n + skew; ++i) {
        p[i] = (uint8_t) next();
    }
    return p;
}

// Repacked rows by every product, and their weights. All sizes are exact; prefetches beyond them do not count.
static long repacked(enum tq1_25_kind kind, int64_t nb, size_t skew) {
    const tq1_25_sizes of = tq1_25_sizes_of(kind);
    const int64_t n = nb * of.weights;
    const size_t block = of.block;
    const int64_t units_of_64 = next() % 4 == 0 ? 1 + next() % 2 : 0;
    const int64_t rows = units_of_64 * TQ1_25_TILE + next() % 4, nc = 1 + next() % 40, units = (rows + TQ1_25_TILE - 1) / TQ1_25_TILE;
    uint8_t * blocks = bytes((size_t) (rows * nb) * block, skew);
    uint8_t * x = bytes((size_t) (rows * nb) * block, skew);
    tq1_25_repack(kind, rows, n, blocks + skew, x + skew);
    uint8_t * activations[40];
    const tq1_25_q8_0 * y[40];
    void * tables[40];
    float * s[40];
    for (int64_t c = 0; c < nc; ++c) {
        activations[c] = bytes((size_t) (n / TQ1_25_QK8_0) * sizeof(tq1_25_q8_0), skew);
        y[c] = (const tq1_25_q8_0 *) (activations[c] + skew);
        s[c] = bytes((size_t) rows * sizeof(float), 0);
    }
    void * panels = bytes((size_t) tq1_25_panel_size(n, nc), 0);
    struct tq1_25_panel_scratch * panel_scratch = aligned_alloc(64, (sizeof(*panel_scratch) + 63) / 64 * 64);
    struct tq1_25_code_scratch * code_scratch = aligned_alloc(64, (sizeof(*code_scratch) + 63) / 64 * 64);
    struct tq1_25_wide_scratch * wide_scratch = aligned_alloc(64, (sizeof(*wide_scratch) + 63) / 64 * 64);
    long calls = 0;
    for (const struct tq1_25_isa * isa = tq1_25_isas; isa->name; ++isa) {
        if (!isa->gemv || (isa->supported && !isa->supported())) {
            continue;
        }
        for (int64_t c = 0; c < nc; ++c) {
            tables[c] = aligned_alloc(64, (size_t) tq1_25_table_size(isa, n));
        }
        const int64_t cut = next() % (n / TQ1_25_QK8_0 + 1) * TQ1_25_QK8_0, middle = next() % (uint32_t) (units + 1);
        for (int64_t c = 0; c < nc; ++c) {
            tq1_25_make_table(isa, n, 0, cut, y[c], tables[c]);
            tq1_25_make_table(isa, n, cut, n, y[c], tables[c]);
        }
        tq1_25_mul_tables(isa, kind, rows, n, x + skew, 0, middle, (int) nc, y, tables, s);
        tq1_25_mul_tables(isa, kind, rows, n, x + skew, middle, units, (int) nc, y, tables, s);
        const int64_t groups = tq1_25_code_groups(nc);
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t c = tq1_25_first_of_group(nc, groups, g);
            const int columns = (int) (tq1_25_first_of_group(nc, groups, g + 1) - c);
            tq1_25_mul_codes(isa, kind, rows, n, x + skew, middle, units, columns, y + c, s + c, code_scratch);
            tq1_25_mul_codes(isa, kind, rows, n, x + skew, 0, middle, columns, y + c, s + c, code_scratch);
        }
        calls += 2;
        for (int64_t c = 0; isa->wide_rows && c < nc; c += TQ1_25_WIDE_COLUMNS) {
            const int columns = (int) (nc - c < TQ1_25_WIDE_COLUMNS ? nc - c : TQ1_25_WIDE_COLUMNS);
            tq1_25_mul_wide(isa, kind, rows, n, x + skew, middle, units, columns, y + c, s + c, wide_scratch);
            tq1_25_mul_wide(isa, kind, rows, n, x + skew, 0, middle, columns, y + c, s + c, wide_scratch);
        }
        calls += isa->wide_rows != NULL;
        const int64_t count = tq1_25_panels(nc), between = next() % (uint32_t) (count + 1);
        for (int64_t p = 0; isa->gemm && p < count; ++p) {
            const int64_t c = tq1_25_first_column(nc, p);
            const int columns = (int) (tq1_25_first_column(nc, p + 1) - c);
            uint8_t * panel = (uint8_t *) panels + tq1_25_panel_size(n, c);
            tq1_25_make_panel(0, cut, columns, y + c, panel);
            tq1_25_make_panel(cut, n, columns, y + c, panel);
        }
        if (isa->gemm) {
            tq1_25_mul_panels(isa, kind, rows, n, x + skew, 0, units, nc, between, count, panels, s, panel_scratch);
            tq1_25_mul_panels(isa, kind, rows, n, x + skew, 0, units, nc, 0, between, panels, s, panel_scratch);
            ++calls;
        }
        for (int64_t c = 0; c < nc; ++c) {
            free(tables[c]);
        }
    }
    int64_t begin = 0, end = rows, first = 0, last = nb, channels[40];
    for (int half = 0; half < 2; ++half) { // all weights, then some of them
        float * floats = bytes((size_t) ((end - begin) * (last - first) * of.weights) * sizeof(float), 0);
        tq1_25_decode_rows(kind, rows, n, x + skew, begin, end, first * of.weights, last * of.weights, floats);
        free(floats);
        begin = next() % (uint32_t) (rows + 1);
        end = begin + next() % (uint32_t) (rows + 1 - begin);
        first = next() % (uint32_t) (nb + 1);
        last = first + next() % (uint32_t) (nb + 1 - first);
    }
    for (int64_t c = 0; c < nc; ++c) {
        channels[c] = next() % (uint32_t) n;
    }
    float * of_channels = bytes((size_t) (rows * nc) * sizeof(float), 0);
    tq1_25_decode_columns(kind, rows, n, x + skew, nc, channels, of_channels);
    free(of_channels);
    calls += 3;
    for (int64_t c = 0; c < nc; ++c) {
        free(activations[c]);
        free(s[c]);
    }
    free(panel_scratch);
    free(code_scratch);
    free(wide_scratch);
    free(panels);
    free(x);
    free(blocks);
    return calls;
}

// The codec and the plain dot products of a type.
#define PLAIN(type, QK, kind)                                                                                                      \
    static long plain_##type(long round, int64_t nb, size_t skew) {                                                                \
        const int64_t n = nb * QK;                                                                                                 \
        uint8_t * blocks = bytes((size_t) nb * sizeof(block_##type), skew);                                                        \
        uint8_t * q8_0 = bytes((size_t) (n / TQ1_25_QK8_0) * sizeof(tq1_25_q8_0), skew);                                           \
        float *x = bytes((size_t) n * sizeof(float), 0), *y = bytes((size_t) n * sizeof(float), 0);                                \
        float * importance = bytes((size_t) n * sizeof(float), 0);                                                                 \
        block_##type * b = (block_##type *) (blocks + skew);                                                                       \
        const tq1_25_q8_0 * q = (const tq1_25_q8_0 *) (q8_0 + skew);                                                               \
        long calls = 0;                                                                                                            \
        type##_dequantize(b, y, n);                                                                                                \
        type##_validate(b, (size_t) nb);                                                                                           \
        for (const struct tq1_25_isa * isa = tq1_25_isas; isa->name; ++isa) {                                                      \
            if (!isa->supported || isa->supported()) {                                                                             \
                float s;                                                                                                           \
                isa->vec_dot[kind](n, &s, b, q);                                                                                   \
                ++calls;                                                                                                           \
            }                                                                                                                      \
        }                                                                                                                          \
        /* floats of any bits, then finite ones: the first are mostly refused */                                                   \
        for (int finite = 0; finite < 2; ++finite) {                                                                               \
            for (int64_t i = 0; finite && i < n; ++i) {                                                                            \
                x[i] = ((float) (int32_t) next()) * 1e-8f;                                                                         \
            }                                                                                                                      \
            int64_t bad = -1;                                                                                                      \
            const enum tq1_25_status status = type##_quantize(x, b, n, &bad);                                                      \
            if ((status == TQ1_25_OK) != (bad == -1) || bad >= nb || (finite && status != TQ1_25_OK)) {                            \
                fprintf(stderr, "round %ld: status %d with block %lld of %lld\n", round, status, (long long) bad, (long long) nb); \
                exit(1);                                                                                                           \
            }                                                                                                                      \
            type##_quantize_weighted(x, importance, b, n, NULL);                                                                   \
            quantize_##type(x, b, 1, n, importance);                                                                               \
            tq1_25_quantize_q8_0(x, (tq1_25_q8_0 *) (q8_0 + skew), n);                                                             \
            calls += 4;                                                                                                            \
        }                                                                                                                          \
        free(blocks);                                                                                                              \
        free(q8_0);                                                                                                                \
        free(x);                                                                                                                   \
        free(y);                                                                                                                   \
        free(importance);                                                                                                          \
        return calls;                                                                                                              \
    }

PLAIN(tq1_25, QK_TQ1_25, KIND_TQ1_25)
PLAIN(tq1_25_64, QK_TQ1_25_64, KIND_TQ1_25_64)
PLAIN(stq1_0, QK_STQ1_0, KIND_STQ1_0)

static long ordered(int64_t nb) {
    const int64_t n = nb * QK_STQ1_0;
    float *x = bytes((size_t) n * sizeof(float), 0), *y = bytes((size_t) n * sizeof(float), 0);
    stq1_0_order(x, y, n);
    free(x);
    free(y);
    return 1;
}

// Attention of random bytes, including NaNs.
static long attention(long round, size_t skew) {
    static const int64_t sizes[] = { 32, 64, 96, 128, 192, 256 };
    struct sherry_attention a;
    memset(&a, 0, sizeof(a));
    a.k_type = (int) (next() % 3);
    a.v_type = (int) (next() % 3);
    a.k_size = sizes[next() % 6];
    a.v_size = sizes[next() % 6];
    a.tokens = next() % 2 ? 1 + next() % 3 : 1 + next() % 30;
    a.keys = 1 + next() % 150;
    a.kv_heads = 1 + next() % 3;
    a.heads = a.kv_heads * (1 + next() % 6);
    a.streams = 1 + next() % 2;
    a.kv_streams = 1 + next() % a.streams;
    a.mask_heads = next() % 2 ? a.heads : 1;
    a.mask_streams = next() % 2 ? a.streams : 1;
    a.scale = 0.1f;
    a.max_bias = next() % 2 ? 8.0f : 0.0f;
    a.softcap = next() % 2 ? 5.0f : 0.0f;
    a.dst_stride = a.v_size * (int64_t) sizeof(float);
    const int64_t of_k = a.k_type == SHERRY_ATTENTION_Q8_0 ? a.k_size / TQ1_25_QK8_0 * (int64_t) sizeof(tq1_25_q8_0) : 2 * a.k_size;
    const int64_t of_v = a.v_type == SHERRY_ATTENTION_Q8_0 ? a.v_size / TQ1_25_QK8_0 * (int64_t) sizeof(tq1_25_q8_0) : 2 * a.v_size;
    const int64_t rows[] = { a.tokens, a.keys, a.keys, a.tokens }, heads[] = { a.heads, a.kv_heads, a.kv_heads, a.mask_heads };
    const int64_t streams[] = { a.streams, a.kv_streams, a.kv_streams, a.mask_streams };
    const int64_t row[] = { 4 * a.k_size, of_k, of_v, 2 * a.keys }, results = a.streams * a.tokens * a.heads * a.v_size;
    int64_t * strides[] = { a.q_stride, a.k_stride, a.v_stride, a.mask_stride };
    uint8_t *memory[4], *sinks = bytes((size_t) a.heads * sizeof(float), 0), *dst = bytes((size_t) results * sizeof(float), 0);
    for (int i = 0; i < 4; ++i) {
        const int by_row = next() % 2; // all heads of a row together, or all rows of a head
        strides[i][0] = by_row ? row[i] * heads[i] : row[i];
        strides[i][1] = by_row ? row[i] : row[i] * rows[i];
        strides[i][2] = row[i] * rows[i] * heads[i];
        memory[i] = bytes((size_t) (strides[i][2] * streams[i]), i == 0 ? 0 : skew);
    }
    a.q = (const char *) memory[0];
    a.k = (const char *) memory[1] + skew;
    a.v = (const char *) memory[2] + skew;
    a.mask = next() % 4 ? (const char *) memory[3] + skew : NULL;
    a.sinks = next() % 2 ? (const float *) sinks : NULL;
    a.dst = (char *) dst;
    const int threads = 1 + (int) (next() % 5);
    const int64_t scratch = ((256 * (a.k_size + a.v_size) + 8192) * 4 / (1 + next() % 2) + 63) / 64 * 64;
    float * all = aligned_alloc(64, (size_t) (threads * scratch));
    long calls = 0;
    for (const struct tq1_25_isa * isa = tq1_25_isas; isa->name; ++isa) {
        struct sherry_attention_plan plan;
        if (!isa->attention || (isa->supported && !isa->supported())) {
            continue;
        }
        if (!sherry_attention_make_plan(&a, threads, scratch, &plan)) {
            fprintf(stderr, "round %ld: no plan\n", round);
            exit(1);
        }
        for (int64_t i = 0; i < plan.items; ++i) {
            sherry_attention_tile(isa->attention, &a, &plan, i, all + i % threads * plan.scratch);
        }
        for (int64_t i = 0; i < plan.rounds; ++i) {
            for (int t = 0; t < threads; ++t) {
                sherry_attention_part(isa->attention, &a, &plan, i, t, all);
            }
            for (int t = 0; plan.key_parts > 1 && t < threads; ++t) {
                sherry_attention_join(&a, &plan, i, t, all);
            }
        }
        ++calls;
    }
    for (int i = 0; i < 4; ++i) {
        free(memory[i]);
    }
    free(sinks);
    free(dst);
    free(all);
    return calls;
}

int main(int argc, char ** argv) {
    if (argc != 3) {
        return 2;
    }
    state = strtoull(argv[1], NULL, 10) * 2 + 1;
    const long rounds = atol(argv[2]);
    long calls = 0;
    for (long round = 0; round < rounds; ++round) {
        const int64_t nb = next() % 9;
        const size_t skew = next() % 2 * 2; // blocks are aligned to two bytes and no more
        calls += plain_tq1_25(round, nb, skew) + plain_tq1_25_64(round, nb, skew) + plain_stq1_0(round, nb, skew) + ordered(nb);
        if (round % 5 == 0) {
            calls += repacked((enum tq1_25_kind)(round / 5 % TQ1_25_KINDS), 1 + next() % 20, skew);
            calls += attention(round, skew);
        }
    }
    printf("%ld calls\n", calls);
    return 0;
}

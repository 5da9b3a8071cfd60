// Times matrix products in one thread. By one vector, with weights from memory: each type's vec_dot row by row, and our types' repacked rows
// with each instruction set. By more vectors: our types by tables, codes, wide tables and panels. Also the CPU's peak rate of multiplications.
// usage: bench_matmul MIB TYPE...     runs a round for each line of input, so that the caller can measure other things in between
// prints "vector NAME RATE", "columns TYPE ISA KERNEL COLUMNS RATE", "tables ISA COLUMNS" and "codes ISA COLUMNS" (the limits in use),
// "peak ISA RATE" and "end"; rates are 1e9 multiply-adds per second

#define _GNU_SOURCE // madvise

#include "ggml-cpu.h"
#include "ggml.h"
#include "sherry/repack.h"

#include "bench.h"

#include <stdbool.h>
#include <stdio.h>
#include <sys/mman.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum {
    N = 2048, // weights of a row
    DIFFERENT = 256, // distinct rows
    MOST = 512, // columns
    FEW = 64, // products with up to so many columns use the whole matrix, so that weights come from memory
    SOME_ROWS = 2048, // those with more use so many rows
    HUGE_PAGE = 2 << 20,
    MAX_TYPES = 64,
    PEAK_CHAINS = 12, // independent sums
};

static void * allocate(size_t size) {
    size = (size + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    void * p = aligned_alloc(HUGE_PAGE, size);
    if (!p) {
        fprintf(stderr, "no memory for %zu MiB\n", size >> 20);
        exit(1);
    }
    madvise(p, size, MADV_HUGEPAGE);
    return p;
}

static float * floats(size_t n, float least) { return noise(allocate(n * sizeof(float)), n, least); }

// ---- peak rate: nothing but multiplications, in registers ----

#if defined(__x86_64__)
#ifdef __clang__
#    define UNROLL _Pragma("unroll")
#else
#    define UNROLL _Pragma("GCC unroll 16") // without it the sums are in memory
#endif
#define PEAK(name, isa, bytes, type, set1, multiply)                                              \
    __attribute__((target(isa))) static double name(void) {                                       \
        type sum[PEAK_CHAINS];                                                                    \
        type x = set1(1);                                                                         \
        UNROLL for (int c = 0; c < PEAK_CHAINS; ++c) { sum[c] = set1((char) c); }                 \
        enum { TIMES = 1 << 20 };                                                                 \
        const double start = now();                                                               \
        for (int i = 0; i < TIMES; ++i) {                                                         \
            UNROLL for (int c = 0; c < PEAK_CHAINS; ++c) {                                        \
                __asm__ volatile("" : "+v"(x)); /* so that the compiler cannot reuse a product */ \
                multiply;                                                                         \
                __asm__ volatile("" : "+v"(sum[c]));                                              \
            }                                                                                     \
        }                                                                                         \
        return (double) bytes * PEAK_CHAINS * TIMES / (now() - start) * 1e-9;                     \
    }
PEAK(peak_avx512vnni, "avx512f,avx512bw,avx512vnni", 64, __m512i, _mm512_set1_epi8, sum[c] = _mm512_dpbusd_epi32(sum[c], x, x))
PEAK(peak_avx512, "avx512f,avx512bw", 64, __m512i, _mm512_set1_epi8, sum[c] = _mm512_add_epi16(sum[c], _mm512_maddubs_epi16(x, x)))
PEAK(peak_avxvnni, "avx2,avxvnni", 32, __m256i, _mm256_set1_epi8, sum[c] = _mm256_dpbusd_avx_epi32(sum[c], x, x))
PEAK(peak_avx2, "avx2", 32, __m256i, _mm256_set1_epi8, sum[c] = _mm256_add_epi16(sum[c], _mm256_maddubs_epi16(x, x)))
#endif

static double peak(const char * isa) {
#if defined(__x86_64__)
    if (!strcmp(isa, "zen4") || !strcmp(isa, "avx512vnni")) {
        return peak_avx512vnni();
    }
    return !strcmp(isa, "avx512") ? peak_avx512() : !strcmp(isa, "avxvnni") ? peak_avxvnni() : !strcmp(isa, "avx2") ? peak_avx2() : 0;
#else
    (void) isa;
    return 0;
#endif
}

// ---- matrices ----

struct matrix {
    enum ggml_type type;
    enum tq1_25_kind kind; // or TQ1_25_KINDS
    int64_t rows;
    char *data, *tiles; // tiles: of our types
    char * y; // MOST activation rows
    size_t row_size, y_size;
};

static struct matrix make(enum ggml_type type, size_t bytes, const float * x, const float * y, const float * importance) {
    const enum ggml_type other = ggml_get_type_traits_cpu(type)->vec_dot_type;
    struct matrix m = { .type = type, .kind = kind_of(type), .row_size = ggml_row_size(type, N), .y_size = ggml_row_size(other, N) };
    m.rows = (int64_t) (bytes / m.row_size) / DIFFERENT * DIFFERENT;
    m.data = allocate((size_t) m.rows * m.row_size);
    ggml_quantize_chunk(type, x, m.data, 0, DIFFERENT, N, importance);
    for (int64_t r = DIFFERENT; r < m.rows; r += DIFFERENT) {
        memcpy(m.data + (size_t) r * m.row_size, m.data, DIFFERENT * m.row_size);
    }
    if (m.kind != TQ1_25_KINDS) {
        m.tiles = allocate((size_t) m.rows * m.row_size);
        tq1_25_repack(m.kind, m.rows, N, m.data, m.tiles);
    }
    m.y = allocate(MOST * m.y_size);
    for (int c = 0; c < MOST; ++c) {
        ggml_get_type_traits_cpu(other)->from_float(y + (size_t) c * N, m.y + (size_t) c * m.y_size, N);
    }
    return m;
}

static void by_vec_dot(const struct matrix * m, float * s) {
    const ggml_vec_dot_t dot = ggml_get_type_traits_cpu(m->type)->vec_dot;
    const double start = now();
    for (int64_t r = 0; r < m->rows; ++r) {
        dot(N, s + r, 0, m->data + (size_t) r * m->row_size, 0, m->y, 0, 1);
    }
    printf("vector %s %.3f\n", ggml_type_name(m->type), (double) N * (double) m->rows / (now() - start) * 1e-9);
}

struct columns {
    const tq1_25_q8_0 * y[MOST];
    float * s[MOST];
    void * tables[MOST];
    void * panels;
    struct tq1_25_panel_scratch * panel_scratch;
    struct tq1_25_code_scratch * code_scratch;
    struct tq1_25_wide_scratch * wide_scratch;
};

static double by_tables(const struct tq1_25_isa * isa, const struct matrix * m, int64_t rows, int nc, struct columns * c) {
    const double start = now();
    for (int k = 0; k < nc; ++k) {
        tq1_25_make_table(isa, N, 0, N, c->y[k], c->tables[k]);
    }
    tq1_25_mul_tables(isa, m->kind, rows, N, m->tiles, 0, rows / TQ1_25_TILE, nc, c->y, c->tables, c->s);
    return (double) N * (double) rows * nc / (now() - start) * 1e-9;
}

static double by_codes(const struct tq1_25_isa * isa, const struct matrix * m, int64_t rows, int nc, struct columns * c) {
    const double start = now();
    const int64_t groups = tq1_25_code_groups(nc);
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t k = tq1_25_first_of_group(nc, groups, g), last = tq1_25_first_of_group(nc, groups, g + 1);
        tq1_25_mul_codes(isa, m->kind, rows, N, m->tiles, 0, rows / TQ1_25_TILE, (int) (last - k), c->y + k, c->s + k, c->code_scratch);
    }
    return (double) N * (double) rows * nc / (now() - start) * 1e-9;
}

static double by_panels(const struct tq1_25_isa * isa, const struct matrix * m, int64_t rows, int nc, struct columns * c) {
    const double start = now();
    for (int64_t p = 0; p < tq1_25_panels(nc); ++p) {
        const int64_t k = tq1_25_first_column(nc, p);
        tq1_25_make_panel(0, N, (int) (tq1_25_first_column(nc, p + 1) - k), c->y + k, (char *) c->panels + tq1_25_panel_size(N, k));
    }
    tq1_25_mul_panels(isa, m->kind, rows, N, m->tiles, 0, rows / TQ1_25_TILE, nc, 0, tq1_25_panels(nc), c->panels, c->s, c->panel_scratch);
    return (double) N * (double) rows * nc / (now() - start) * 1e-9;
}

// As llama.cpp does it: groups of few columns, left over by the others, go by codes. Up to max_codes columns in all, where llama.cpp uses no
// wide tables, they are timed nonetheless.
static double by_wide(const struct tq1_25_isa * isa, const struct matrix * m, int64_t rows, int nc, struct columns * c) {
    const double start = now();
    for (int64_t g = 0; g < tq1_25_wide_groups(nc); ++g) {
        const int64_t k = tq1_25_first_of_wide(nc, g), end = rows / TQ1_25_TILE;
        const int count = (int) (tq1_25_first_of_wide(nc, g + 1) - k);
        if (count > isa->max_codes || nc <= isa->max_codes) {
            tq1_25_mul_wide(isa, m->kind, rows, N, m->tiles, 0, end, count, c->y + k, c->s + k, c->wide_scratch);
        } else {
            tq1_25_mul_codes(isa, m->kind, rows, N, m->tiles, 0, end, count, c->y + k, c->s + k, c->code_scratch);
        }
    }
    return (double) N * (double) rows * nc / (now() - start) * 1e-9;
}

static void repacked(const struct tq1_25_isa * isa, const struct matrix * m, int nc, float * s, struct columns * c) {
    const int64_t rows = nc <= FEW ? m->rows : SOME_ROWS < m->rows ? SOME_ROWS : m->rows;
    const char * type = ggml_type_name(m->type);
    for (int k = 0; k < nc; ++k) {
        c->y[k] = (const tq1_25_q8_0 *) (m->y + (size_t) k * m->y_size);
        c->s[k] = s + (size_t) k * (size_t) rows;
    }
    if (nc == 1) {
        printf("vector %s-%s %.3f\n", type, isa->name, by_tables(isa, m, rows, nc, c));
    }
    if (nc <= FEW) {
        printf("columns %s %s tables %d %.3f\n", type, isa->name, nc, by_tables(isa, m, rows, nc, c));
    }
    printf("columns %s %s codes %d %.3f\n", type, isa->name, nc, by_codes(isa, m, rows, nc, c));
    if (isa->wide_rows) {
        printf("columns %s %s wide %d %.3f\n", type, isa->name, nc, by_wide(isa, m, rows, nc, c));
    }
    if (isa->gemm) {
        printf("columns %s %s panels %d %.3f\n", type, isa->name, nc, by_panels(isa, m, rows, nc, c));
    }
}

int main(int argc, char ** argv) {
    const long mib = argc > 2 ? atol(argv[1]) : 0;
    if (mib < 1 || mib > 65536 || argc - 2 > MAX_TYPES) {
        fprintf(stderr, "usage: %s MIB TYPE...     (1 to 65536 MiB of weights of each type)\n", argv[0]);
        return 2;
    }
    ggml_cpu_init();
    const float *x = floats((size_t) N * DIFFERENT, -0.5f), *y = floats((size_t) N * MOST, -0.5f), *importance = floats(N, 0.5f);
    struct matrix types[MAX_TYPES];
    int count = 0;
    int64_t most_rows = 0;
    for (int a = 2; a < argc; ++a) {
        const enum ggml_type type = type_of(argv[a], N);
        if (type == GGML_TYPE_COUNT) {
            fprintf(stderr, "%s: no such type, or rows of %d are not whole blocks of it\n", argv[a], N);
            return 1;
        }
        types[count] = make(type, (size_t) mib << 20, x, y, importance);
        most_rows = types[count].rows > most_rows ? types[count].rows : most_rows;
        ++count;
    }
    float * s = allocate(sizeof(float) * ((size_t) most_rows * FEW + (size_t) SOME_ROWS * MOST));
    struct columns c = { .panels = allocate((size_t) tq1_25_panel_size(N, MOST)) };
    c.panel_scratch = allocate(sizeof(*c.panel_scratch));
    c.code_scratch = allocate(sizeof(*c.code_scratch));
    c.wide_scratch = allocate(sizeof(*c.wide_scratch));
    for (int k = 0; k < FEW; ++k) {
        c.tables[k] = aligned_alloc(64, (size_t) N / TQ1_25_QK8_0 * (TQ1_25_TABLE + sizeof(float))); // for any instruction set
    }
    static const int some[] = { 1, 2, 3, 4, 8, 12, 16, 24, 32, FEW, 128, MOST };

    int round = 0;
    for (int in = getchar(); in != EOF; in = getchar()) {
        if (in != '\n') {
            continue;
        }
        // The order alternates, since what comes first runs on a machine that was busy with something else.
        const bool types_first = round++ % 2 == 0;
        for (int t = 0; t < count && types_first; ++t) {
            by_vec_dot(&types[t], s);
        }
        for (const struct tq1_25_isa * isa = tq1_25_isas; isa->name; ++isa) {
            if (!isa->gemv || (isa->supported && !isa->supported())) {
                continue;
            }
            for (size_t i = 0; i < sizeof(some) / sizeof(some[0]); ++i) {
                for (int j = 0; j < count; ++j) { // types take turns here too
                    const int t = types_first ? j : count - 1 - j;
                    if (types[t].tiles) {
                        repacked(isa, &types[t], some[i], s, &c);
                    }
                }
            }
            printf("tables %s %d\ncodes %s %d\n", isa->name, isa->max_tables, isa->name, isa->max_codes);
            printf("peak %s %.3f\n", isa->name, peak(isa->name));
        }
        for (int t = 0; t < count && !types_first; ++t) {
            by_vec_dot(&types[t], s);
        }
        puts("end");
        fflush(stdout);
    }
    return 0;
}

// Tests the AVX-VNNI kernels on a CPU that has the same multiplication in AVX-512: panels must give exactly the sums of the scalar dot
// product, on inputs whose sums are exact. usage: avxvnni SEED

#include "repack.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint32_t state;
static uint32_t next(void) { return (state = state * 1664525u + 1013904223u) >> 8; }

int main(int argc, char ** argv) {
    if (argc != 2) {
        return 2;
    }
    state = (uint32_t) atoi(argv[1]);
    const struct tq1_25_isa * isa = tq1_25_isas;
    while (isa->name && strcmp(isa->name, "avxvnni") != 0) {
        ++isa;
    }
    if (!isa->name || !isa->gemm) {
        return 3;
    }
    struct tq1_25_panel_scratch * scratch = aligned_alloc(64, (sizeof(*scratch) + 63) / 64 * 64);
    long compared = 0;
    for (int round = 0; round < 80; ++round) {
        const enum tq1_25_kind kind = round % 2 ? KIND_TQ1_25_64 : KIND_TQ1_25;
        const size_t block = tq1_25_sizes_of(kind).block;
        const int64_t nb = 1 + next() % 40, n = nb * tq1_25_sizes_of(kind).weights, rows = 1 + next() % 200, nc = 1 + next() % 20;
        uint8_t * x = malloc((size_t) (rows * nb) * block);
        void * tiles = malloc((size_t) (rows * nb) * block);
        for (int64_t i = 0; i < rows * nb; ++i) {
            for (size_t k = 0; k < block; ++k) {
                x[(size_t) i * block + k] = (uint8_t) next();
            }
            const uint16_t d = (uint16_t) (0x3c00 + 0x400 * (next() % 2)); // 1 or 2
            memcpy(x + (size_t) (i + 1) * block - sizeof(d), &d, sizeof(d));
        }
        tq1_25_repack(kind, rows, n, x, tiles);
        tq1_25_q8_0 * y = malloc((size_t) (nc * n / TQ1_25_QK8_0) * sizeof(*y));
        for (int64_t i = 0; i < nc * n / TQ1_25_QK8_0; ++i) {
            for (int k = 0; k < TQ1_25_QK8_0; ++k) {
                y[i].qs[k] = (int8_t) (round % 8 < 2 ? -128 : (int) (next() % 256) - 128);
            }
            y[i].d = (uint16_t) (0x3c00 + 0x400 * (next() % 2));
        }
        const tq1_25_q8_0 * of[20];
        float *s[20], *sums = malloc((size_t) (rows * nc) * sizeof(float));
        for (int64_t c = 0; c < nc; ++c) {
            of[c] = y + c * n / TQ1_25_QK8_0;
            s[c] = sums + c * rows;
        }
        uint8_t * panels = malloc((size_t) tq1_25_panel_size(n, nc));
        const int64_t count = tq1_25_panels(nc);
        for (int64_t p = 0; p < count; ++p) {
            const int64_t c = tq1_25_first_column(nc, p);
            tq1_25_make_panel(0, n, (int) (tq1_25_first_column(nc, p + 1) - c), of + c, panels + tq1_25_panel_size(n, c));
        }
        tq1_25_mul_panels(isa, kind, rows, n, tiles, 0, (rows + TQ1_25_TILE - 1) / TQ1_25_TILE, nc, 0, count, panels, s, scratch);
        for (int64_t c = 0; c < nc; ++c) {
            for (int64_t r = 0; r < rows; ++r, ++compared) {
                float expected;
                (kind == KIND_TQ1_25_64 ? tq1_25_64_vec_dot_scalar : tq1_25_vec_dot_scalar)(n, &expected, x + (size_t) (r * nb) * block,
                                                                                            of[c]);
                if (s[c][r] != expected) {
                    fprintf(stderr, "kind %d, n %d, row %d of %d, column %d of %d: %g, not %g\n", (int) kind, (int) n, (int) r, (int) rows,
                            (int) c, (int) nc, (double) s[c][r], (double) expected);
                    return 1;
                }
            }
        }
        free(panels);
        free(sums);
        free(y);
        free(tiles);
        free(x);
    }
    free(scratch);
    printf("%ld compared\n", compared);
    return 0;
}

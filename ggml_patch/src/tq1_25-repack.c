// Repacked TQ1_25: the layout, the activations of the block product, and products of many rows and columns.

#include "tq1_25.h"

#include <string.h>

// ---- layout ----

// Up to 64 rows of nb blocks, block i of each, to a tile; rows that are not there are zero.
static void make_tile(const block_tq1_25 * x, int64_t nb, int64_t i, int rows, tq1_25_tile * y) {
    if (rows < TQ1_25_TILE) {
        memset(y, 0, sizeof(*y));
    }
    for (int r = 0; r < rows; ++r) {
        const block_tq1_25 * block = x + nb * r + i;
        for (int j = 0; j < QK_TQ1_25 / TQ1_25_QK8_0; ++j) {
            for (int k = 0; k < 4; ++k) {
                y->part[j].qs[k][r] = block->qs[4 * j + k];
            }
            y->part[j].sign[r] = block->sign[j];
        }
    }
    for (int place = 0; place < TQ1_25_TILE; ++place) {
        if (TQ1_25_ROW(place) < rows) {
            y->d[place] = x[nb * TQ1_25_ROW(place) + i].d;
        }
    }
}

void tq1_25_repack(int64_t rows, int64_t n, const block_tq1_25 * x, void * y) {
    const int64_t nb = n / QK_TQ1_25;
    tq1_25_tile * tile = (tq1_25_tile *) y;
    for (; rows >= TQ1_25_TILE; rows -= TQ1_25_TILE, x += nb * TQ1_25_TILE) {
        for (int64_t i = 0; i < nb; ++i) {
            make_tile(x, nb, i, TQ1_25_TILE, tile++);
        }
    }
    memcpy(tile, x, (size_t) (rows * nb) * sizeof(*x));
}

// ---- matrix by vectors ----

int64_t tq1_25_table_size(int64_t n) {
    const int64_t size = n / TQ1_25_QK8_0 * (int64_t) (TQ1_25_TABLE + sizeof(float));
    return (size + 63) / 64 * 64;
}

// They follow the tables.
static float * scales(int64_t n, void * table) {
    return (float *) ((int8_t *) table + n / TQ1_25_QK8_0 * TQ1_25_TABLE);
}

void tq1_25_make_table(const struct tq1_25_isa * isa, int64_t n, int64_t begin, int64_t end, const tq1_25_q8_0 * y, void * table) {
    begin /= TQ1_25_QK8_0;
    end /= TQ1_25_QK8_0;
    isa->table(end - begin, y + begin, (int8_t *) table + begin * TQ1_25_TABLE, scales(n, table) + begin);
}

int64_t tq1_25_wide_size(const struct tq1_25_isa * isa, int64_t n, int nc) {
    return isa->widen ? n / TQ1_25_QK8_0 * TQ1_25_WIDE * nc : 0;
}

void tq1_25_widen(const struct tq1_25_isa * isa, int64_t n, int nc, void * const * tables, void * wide) {
    for (int c = 0; isa->widen && c < nc; ++c) {
        isa->widen(n / TQ1_25_QK8_0, (const int8_t *) tables[c], (int8_t *) wide + tq1_25_wide_size(isa, n, c));
    }
}

void tq1_25_mul_tables(const struct tq1_25_isa * isa, int64_t rows, int64_t n, const void * x, int64_t begin, int64_t end,
                       int nc, const tq1_25_q8_0 * const * y, void * const * tables, const void * wide, float * const * s) {
    const int64_t nb = n / QK_TQ1_25, whole = rows / TQ1_25_TILE;
    for (int64_t t = begin; t < end; ++t) {
        const tq1_25_tile * tiles = (const tq1_25_tile *) x + t * nb;
        for (int c = 0; c < nc; ++c) {
            float * to = s[c] + t * TQ1_25_TILE;
            if (t < whole) {
                const int8_t * table = isa->widen ? (const int8_t *) wide + tq1_25_wide_size(isa, n, c) : (const int8_t *) tables[c];
                isa->gemv(n, to, tiles, table, scales(n, tables[c]));
                continue;
            }
            for (int64_t r = 0; r < rows % TQ1_25_TILE; ++r) {
                isa->vec_dot(n, to + r, (const block_tq1_25 *) tiles + r * nb, y[c]);
            }
        }
    }
}

// ---- matrix by matrix ----

int64_t tq1_25_panel_size(int64_t n, int64_t nc) {
    return n / TQ1_25_QK8_0 * nc * (int64_t) (TQ1_25_QK8_0 + sizeof(int32_t) + sizeof(float));
}

void tq1_25_make_panel(const struct tq1_25_isa * isa, int64_t begin, int64_t end, int nc, const tq1_25_q8_0 * const * y, void * panel) {
    int8_t * to = (int8_t *) panel + tq1_25_panel_size(begin, nc);
    for (int64_t j = begin / TQ1_25_QK8_0; j < end / TQ1_25_QK8_0; ++j) {
        for (int c = 0; c < nc; ++c) {
            const tq1_25_q8_0 * block = y[c] + j;
            int8_t * column = to + TQ1_25_GROUP * c;
            int32_t sum = 0;
            for (int k = 0; k < TQ1_25_QK8_0; ++k) {
                sum += block->qs[k];
            }
            for (int g = 0; g < TQ1_25_QK8_0 / TQ1_25_GROUP; ++g, column += TQ1_25_GROUP * nc) {
                memcpy(column, block->qs + TQ1_25_GROUP * g, TQ1_25_GROUP);
            }
            const uint32_t bias = (uint32_t) -sum & isa->bias_mask;
            const float    d    = tq1_25_fp16_to_float(block->d);
            memcpy(column, &bias, sizeof(bias));
            memcpy(column + sizeof(bias) * (size_t) nc, &d, sizeof(d));
        }
        to += tq1_25_panel_size(TQ1_25_QK8_0, nc);
    }
}

void tq1_25_decode_scales(const tq1_25_tile * x, tq1_25_decoded * w) {
    for (int place = 0; place < TQ1_25_TILE; ++place) {
        w->d[TQ1_25_ROW(place)] = tq1_25_fp16_to_float(x->d[place]);
    }
}

void tq1_25_mul_panels(const struct tq1_25_isa * isa, int64_t rows, int64_t n, const void * x, int64_t begin, int64_t end,
                       int64_t nc, int64_t first, int64_t last, const void * panels, float * const * s, struct tq1_25_scratch * scratch) {
    const int64_t nb = n / QK_TQ1_25, whole = rows / TQ1_25_TILE;
    for (int64_t t = begin; t < end; ++t) {
        const tq1_25_tile * tiles = (const tq1_25_tile *) x + t * nb;
        const int left = t < whole ? TQ1_25_TILE : (int) (rows % TQ1_25_TILE);
        for (int64_t i = 0; i < nb; i += TQ1_25_DEPTH) {
            const int64_t depth = nb - i < TQ1_25_DEPTH ? nb - i : TQ1_25_DEPTH;
            const tq1_25_tile * part = tiles + i;
            if (left < TQ1_25_TILE) {
                part = scratch->tiles;
                for (int64_t k = 0; k < depth; ++k) {
                    make_tile((const block_tq1_25 *) tiles, nb, i + k, left, &scratch->tiles[k]);
                }
            }
            isa->decode(depth, part, scratch->decoded);
            for (int64_t p = first; p < last; ++p) {
                const int64_t c = tq1_25_first_column(nc, p);
                const int columns = (int) (tq1_25_first_column(nc, p + 1) - c);
                const int8_t * panel = (const int8_t *) panels + tq1_25_panel_size(n, c) + tq1_25_panel_size(i * QK_TQ1_25, columns);
                isa->gemm(depth, columns, scratch->sums[0], scratch->decoded, panel);
                for (int k = 0; k < columns; ++k) {
                    float * to = s[c + k] + t * TQ1_25_TILE;
                    for (int r = 0; r < left; ++r) {
                        to[r] = scratch->sums[k][r] + (i > 0 ? to[r] : 0.0f);
                    }
                }
            }
        }
    }
}

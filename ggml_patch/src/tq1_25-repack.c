// Repacked TQ1_25: the layout, the activations of the block product, and products of many rows and columns.

#include "tq1_25.h"

#include <string.h>

#if defined(__SSE2__) || defined(_M_X64)
#    define SSE2
#    include <immintrin.h>
#endif

#ifdef _MSC_VER
#    define PREFETCH(p)       ((void) (p))
#    define PREFETCH_WRITE(p) ((void) (p))
#else
#    define PREFETCH(p)       __builtin_prefetch(p, 0, 2)
#    define PREFETCH_WRITE(p) __builtin_prefetch(p, 1)
#endif

enum { PARTS = QK_TQ1_25 / TQ1_25_QK8_0 }; // Q8_0 blocks that meet a block of weights

// ---- layout ----

// To the L2 cache: what comes next is further than hardware looks. An address behind the matrix does no harm.
static inline void prefetch_tile(const tq1_25_tile * x) {
    for (size_t i = 0; i < sizeof(*x); i += 64) {
        PREFETCH((const char *) x + i);
    }
}

static void put_row(const block_tq1_25 * x, tq1_25_tile * y, int row) {
    for (int j = 0; j < PARTS; ++j) {
        for (int k = 0; k < 4; ++k) {
            y->part[j].qs[k][row] = x->qs[4 * j + k];
        }
        y->part[j].sign[row] = x->sign[j];
    }
    y->d[TQ1_25_PLACE(row)] = x->d;
}

#ifdef SSE2
// Sixteen rows of sixteen bytes to rows of bytes at the same place: each round doubles the rows
// whose bytes are neighbours.
static inline void transpose(__m128i a[16]) {
    __m128i b[16];
    for (int round = 0; round < 2; ++round) {
        for (int r = 0; r < 8; ++r) {
            b[2 * r]     = _mm_unpacklo_epi8(a[r], a[r + 8]);
            b[2 * r + 1] = _mm_unpackhi_epi8(a[r], a[r + 8]);
        }
        for (int r = 0; r < 8; ++r) {
            a[2 * r]     = _mm_unpacklo_epi8(b[r], b[r + 8]);
            a[2 * r + 1] = _mm_unpackhi_epi8(b[r], b[r + 8]);
        }
    }
}
#endif

// Sixteen rows, the first a multiple of sixteen, nb blocks from one to the next.
static void put_sixteen(const block_tq1_25 * x, int64_t nb, tq1_25_tile * y, int row) {
#ifdef SSE2
    __m128i a[16];
    for (int r = 0; r < 16; ++r) {
        a[r] = _mm_loadu_si128((const __m128i *) x[nb * r].qs);
    }
    transpose(a);
    for (int k = 0; k < 16; ++k) {
        _mm_storeu_si128((__m128i *) (y->part[k / 4].qs[k % 4] + row), a[k]);
    }
    enum { LAST = sizeof(*x) - 16 }; // the last sixteen bytes: ten of qs, sign, d
    for (int r = 0; r < 16; ++r) {
        a[r] = _mm_loadu_si128((const __m128i *) ((const char *) &x[nb * r] + LAST));
    }
    transpose(a); // what isn't stored isn't computed: the compiler sees to it
    for (int j = 0; j < 4; ++j) {
        _mm_storeu_si128((__m128i *) (y->part[j].sign + row), a[10 + j]);
    }
    for (int h = 0; h < 2; ++h) { // rows 8h and on: even ones to a place, odd ones sixteen further
        __m128i d = h ? _mm_unpackhi_epi8(a[14], a[15]) : _mm_unpacklo_epi8(a[14], a[15]);
        d = _mm_shufflehi_epi16(_mm_shufflelo_epi16(d, 0xd8), 0xd8);
        d = _mm_shuffle_epi32(d, 0xd8);
        _mm_storel_epi64((__m128i *) (y->d + TQ1_25_PLACE(row + 8 * h)), d);
        _mm_storel_epi64((__m128i *) (y->d + TQ1_25_PLACE(row + 8 * h + 1)), _mm_unpackhi_epi64(d, d));
    }
#else
    for (int r = 0; r < 16; ++r) {
        put_row(x + nb * r, y, row + r);
    }
#endif
}

// Past the caches where it can be: what is written is not read soon, and lines need not be fetched to be written (two thirds
// of the time).
static void put_tile(const tq1_25_tile * x, tq1_25_tile * y) {
#ifdef SSE2
    if ((uintptr_t) y % 16 == 0) {
        for (size_t i = 0; i < sizeof(*x); i += 16) {
            _mm_stream_si128((__m128i *) ((char *) y + i), _mm_loadu_si128((const __m128i *) ((const char *) x + i)));
        }
        return;
    }
#endif
    memcpy(y, x, sizeof(*x));
}

void tq1_25_repack(int64_t rows, int64_t n, const block_tq1_25 * x, void * y) {
    const int64_t nb = n / QK_TQ1_25;
    tq1_25_tile * tiles = (tq1_25_tile *) y;
    for (; rows >= TQ1_25_TILE; rows -= TQ1_25_TILE, x += TQ1_25_TILE * nb) {
        for (int64_t i = 0; i < nb; ++i, ++tiles) {
            prefetch_tile((const tq1_25_tile *) (x + TQ1_25_TILE * (nb + i))); // as many bytes of the next 64 rows
            tq1_25_tile tile;
            for (int row = 0; row < TQ1_25_TILE; row += 16) {
                put_sixteen(x + nb * row + i, nb, &tile, row);
            }
            put_tile(&tile, tiles);
        }
    }
#ifdef SSE2
    _mm_sfence(); // others are to see what was streamed
#endif
    memcpy(tiles, x, (size_t) (rows * nb) * sizeof(*x));
}

// ---- matrix by vectors ----

int64_t tq1_25_table_size(const struct tq1_25_isa * isa, int64_t n) {
    const int64_t size = n / QK_TQ1_25 * (isa->table_size + PARTS * (int64_t) sizeof(float));
    return (size + 63) / 64 * 64;
}

// They follow the tables.
static float * scales(const struct tq1_25_isa * isa, int64_t n, void * table) {
    return (float *) ((int8_t *) table + n / QK_TQ1_25 * isa->table_size);
}

void tq1_25_make_table(const struct tq1_25_isa * isa, int64_t n, int64_t begin, int64_t end, const tq1_25_q8_0 * y, void * table) {
    const int64_t from = begin / QK_TQ1_25, nb = end / QK_TQ1_25 - from;
    isa->table(nb, y + PARTS * from, (int8_t *) table + from * isa->table_size, isa->table_size, scales(isa, n, table) + PARTS * from, PARTS);
}

void tq1_25_mul_tables(const struct tq1_25_isa * isa, int64_t rows, int64_t n, const void * x, int64_t begin, int64_t end,
                       int nc, const tq1_25_q8_0 * const * y, void * const * tables, float * const * s) {
    const int64_t nb = n / QK_TQ1_25, whole = rows / TQ1_25_TILE;
    for (int64_t t = begin; t < end; ++t) {
        const tq1_25_tile * tiles = (const tq1_25_tile *) x + t * nb;
        for (int c = 0; c < nc; ++c) {
            float * to = s[c] + t * TQ1_25_TILE;
            if (t < whole) {
                isa->gemv(n, to, tiles, (const int8_t *) tables[c], scales(isa, n, tables[c]));
                continue;
            }
            for (int64_t r = 0; r < rows % TQ1_25_TILE; ++r) {
                isa->vec_dot(n, to + r, (const block_tq1_25 *) tiles + r * nb, y[c]);
            }
        }
    }
}

// ---- matrix by several vectors ----

// Block i of the rows that are left over, as a tile whose other rows are zero.
static void leftover_tile(int64_t rows, int64_t nb, const block_tq1_25 * x, int64_t i, tq1_25_tile * tile) {
    memset(tile, 0, sizeof(*tile));
    for (int64_t r = 0; r < rows; ++r) {
        put_row(x + r * nb + i, tile, (int) r);
    }
}

void tq1_25_mul_codes(const struct tq1_25_isa * isa, int64_t rows, int64_t n, const void * x, int64_t begin, int64_t end,
                      int nc, const tq1_25_q8_0 * const * y, float * const * s, struct tq1_25_code_scratch * scratch) {
    const int64_t nb = n / QK_TQ1_25, whole = rows / TQ1_25_TILE, size = isa->table_size, tiles = isa->code_tiles;
    const int64_t depth = TQ1_25_CODE_PAIRS / nc; // blocks of a row at a time
    for (int64_t i = 0; i < nb; i += depth) {
        const int64_t blocks = nb - i < depth ? nb - i : depth;
        for (int c = 0; c < nc; ++c) {
            isa->table(blocks, y[c] + PARTS * i, scratch->tables + c * size, nc * size, scratch->d + PARTS * c, PARTS * nc);
        }
        for (int64_t t = begin; t < end; t += tiles) {
            const int64_t count = end - t < tiles ? end - t : tiles;
            memset(scratch->sums, 0, sizeof(float) * (size_t) (nc * tiles * TQ1_25_TILE));
            for (int c = 0; c < nc; ++c) {
                for (int64_t r = t * TQ1_25_TILE; r < (t + count) * TQ1_25_TILE && r < rows; r += 16) {
                    PREFETCH(s[c] + r); // else the stores wait for each of these lines; to L2, since L1 is for tables
                }
            }
            for (int64_t k = 0; k < blocks; ++k) {
                const tq1_25_tile * of[2];
                for (int64_t u = 0; u < tiles; ++u) { // without a second one, the first one twice
                    const int64_t       row = u < count ? t + u : t;
                    const tq1_25_tile * tile = (const tq1_25_tile *) x + row * nb;
                    of[u] = row < whole ? tile + i + k : &scratch->tile;
                    if (row < whole) {
                        prefetch_tile(tile + tiles * nb + i + k);
                    } else {
                        leftover_tile(rows % TQ1_25_TILE, nb, (const block_tq1_25 *) tile, i + k, &scratch->tile);
                    }
                }
                isa->expand(of, &scratch->codes);
                isa->lookup(&scratch->codes, nc, scratch->tables + k * nc * size, scratch->d + PARTS * k * nc, scratch->sums);
            }
            for (int c = 0; c < nc; ++c) {
                for (int64_t u = 0; u < count; ++u) {
                    const float * sums = scratch->sums + (c * tiles + u) * TQ1_25_TILE;
                    float *       to   = s[c] + (t + u) * TQ1_25_TILE;
                    if (t + u < whole) {
                        isa->store(to, sums, i > 0);
                        continue;
                    }
                    isa->store(scratch->rows, sums, false);
                    for (int64_t r = 0; r < rows % TQ1_25_TILE; ++r) {
                        to[r] = scratch->rows[r] + (i > 0 ? to[r] : 0.0f);
                    }
                }
            }
        }
    }
}

// ---- matrix by matrix ----

int64_t tq1_25_panel_size(int64_t n, int64_t nc) {
    return n / TQ1_25_QK8_0 * nc * (int64_t) (TQ1_25_QK8_0 + sizeof(int32_t) + sizeof(float));
}

static int32_t sum_of(const int8_t q[TQ1_25_QK8_0]) {
#ifdef SSE2 // a panel takes a quarter less than with the loop
    const __m128i top = _mm_set1_epi8(-128), zero = _mm_setzero_si128(); // q + 128, unsigned
    const __m128i a = _mm_xor_si128(_mm_loadu_si128((const __m128i *) q), top);
    const __m128i b = _mm_xor_si128(_mm_loadu_si128((const __m128i *) (q + 16)), top);
    const __m128i s = _mm_add_epi64(_mm_sad_epu8(a, zero), _mm_sad_epu8(b, zero));
    return _mm_cvtsi128_si32(s) + _mm_extract_epi16(s, 4) - 128 * TQ1_25_QK8_0;
#else
    int32_t sum = 0;
    for (int k = 0; k < TQ1_25_QK8_0; ++k) {
        sum += q[k];
    }
    return sum;
#endif
}

void tq1_25_make_panel(int64_t begin, int64_t end, int nc, const tq1_25_q8_0 * const * y, void * panel) {
    int8_t * to = (int8_t *) panel + tq1_25_panel_size(begin, nc);
    for (int64_t j = begin / TQ1_25_QK8_0; j < end / TQ1_25_QK8_0; ++j) {
        for (int c = 0; c < nc; ++c) {
            const tq1_25_q8_0 * block = y[c] + j;
            int8_t * column = to + TQ1_25_GROUP * c;
            const int32_t sum = sum_of(block->qs);
            for (int g = 0; g < TQ1_25_QK8_0 / TQ1_25_GROUP; ++g, column += TQ1_25_GROUP * nc) {
                memcpy(column, block->qs + TQ1_25_GROUP * g, TQ1_25_GROUP);
            }
            const int32_t bias = -sum;
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
                       int64_t nc, int64_t first, int64_t last, const void * panels, float * const * s, struct tq1_25_panel_scratch * scratch) {
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
                    leftover_tile(left, nb, (const block_tq1_25 *) tiles, i + k, &scratch->tiles[k]);
                }
            }
            isa->decode(depth, part, scratch->decoded);
            for (int64_t p = first; p < last; ++p) {
                const int64_t c = tq1_25_first_column(nc, p);
                const int columns = (int) (tq1_25_first_column(nc, p + 1) - c);
                const int8_t * panel = (const int8_t *) panels + tq1_25_panel_size(n, c) + tq1_25_panel_size(i * QK_TQ1_25, columns);
                for (int k = 0; k < columns; ++k) {
                    for (int r = 0; r < left; r += 16) {
                        PREFETCH_WRITE(s[c + k] + t * TQ1_25_TILE + r); // else the sums wait for each of these lines
                    }
                }
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

// Repacks rows, prepares activations, and multiplies many rows by many columns with an instruction set's kernels.

#include "repack.h"

#include "internal.h"

#include <string.h>

// Vectors of sixteen bytes, which every x86-64 and 64-bit ARM CPU has.
#if defined(__SSE2__) || defined(_M_X64)
#    define SSE2
#    include <immintrin.h>
typedef __m128i bytes;
#    define LOAD(p) _mm_loadu_si128((const __m128i *) (p))
#    define STORE(p, v) _mm_storeu_si128((__m128i *) (p), v)
#    define ZIP_LOWER(a, b) _mm_unpacklo_epi8(a, b)
#    define ZIP_UPPER(a, b) _mm_unpackhi_epi8(a, b)
#elif defined(TQ1_25_ARM)
#    include <arm_neon.h>
typedef uint8x16_t bytes;
#    define LOAD(p) vld1q_u8((const uint8_t *) (p))
#    define STORE(p, v) vst1q_u8((uint8_t *) (p), v)
#    define ZIP_LOWER(a, b) vzip1q_u8(a, b)
#    define ZIP_UPPER(a, b) vzip2q_u8(a, b)
#endif

// ---- repacking ----

static inline tq1_25_sizes sizes_of(enum tq1_25_kind kind) {
    static const tq1_25_sizes of_kinds[TQ1_25_KINDS] = {
        { QK_TQ1_25, sizeof(block_tq1_25), sizeof(tq1_25_tile), PARTS, 1 },
        { QK_STQ1_0, sizeof(block_stq1_0), sizeof(stq1_0_tile), PARTS_STQ1_0 / 2, 2 },
        { QK_TQ1_25_64, sizeof(block_tq1_25_64), sizeof(tq1_25_64_tile), PARTS_64, 1 },
    };
    return of_kinds[kind];
}

tq1_25_sizes tq1_25_sizes_of(enum tq1_25_kind kind) { return sizes_of(kind); }

static inline tq1_25_unit unit_of(tq1_25_sizes of, const void * tile, int64_t i) {
    const tq1_25_part * part = (const tq1_25_part *) tile;
    const tq1_25_unit unit = { part + of.parts * i, (const uint16_t *) (part + of.parts * of.units) };
    return unit;
}

// Hardware does not prefetch this far ahead. Addresses past the end of the matrix do no harm.
static inline void prefetch(const void * x, size_t size) {
    for (size_t i = 0; i < size; i += 64) {
        PREFETCH((const char *) x + i);
    }
}

// Writes a block into a row of a tile.
static void put_row(enum tq1_25_kind kind, const void * x, void * y, int row) {
    const tq1_25_sizes of = sizes_of(kind);
    const int parts = of.parts * of.units;
    const uint8_t *qs = (const uint8_t *) x, *sign = qs + GROUPS / 2 * parts, *d = sign + parts;
    tq1_25_part * part = (tq1_25_part *) y;
    for (int j = 0; j < parts; ++j) {
        for (int k = 0; k < 4; ++k) {
            part[j].qs[k][row] =
                kind != KIND_STQ1_0 ? qs[4 * j + k] : (uint8_t) (stq1_0_slot(qs, 8 * j + k) | stq1_0_slot(qs, 8 * j + 4 + k) << 4);
        }
        part[j].sign[row] = sign[j];
    }
    memcpy((uint16_t *) (part + parts) + TQ1_25_PLACE(row), d, sizeof(uint16_t));
}

#ifdef LOAD
// Transposes sixteen rows of sixteen bytes. Each half round doubles the number of rows whose bytes are neighbours.
static inline void transpose(bytes a[16]) {
    bytes b[16];
    for (int round = 0; round < 2; ++round) {
        for (int r = 0; r < 8; ++r) {
            b[2 * r] = ZIP_LOWER(a[r], a[r + 8]);
            b[2 * r + 1] = ZIP_UPPER(a[r], a[r + 8]);
        }
        for (int r = 0; r < 8; ++r) {
            a[2 * r] = ZIP_LOWER(b[r], b[r + 8]);
            a[2 * r + 1] = ZIP_UPPER(b[r], b[r + 8]);
        }
    }
}

// Loads and transposes sixteen bytes of each of sixteen rows. The compiler drops results that the caller does not use.
static inline void load_transposed(const char * x, size_t stride, bytes a[16]) {
    for (int r = 0; r < 16; ++r) {
        a[r] = LOAD(x + stride * (size_t) r);
    }
    transpose(a);
}

// The same with whole blocks of twelve bytes.
static inline void load_twelve(const char * x, size_t stride, bytes a[16]) {
    for (int r = 0; r < 16; ++r, x += stride) {
        uint32_t end;
        memcpy(&end, x + 8, sizeof(end));
#    ifdef SSE2
        a[r] = _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i *) x), _mm_cvtsi32_si128((int) end));
#    else
        a[r] = vcombine_u8(vld1_u8((const uint8_t *) x), vcreate_u8(end));
#    endif
    }
    transpose(a);
}

// STQ1_0 has two consecutive groups in a byte, a tile two groups that are four apart. These join the low or the high nibbles of two bytes.
static inline bytes low_nibbles(bytes first, bytes second) {
#    ifdef SSE2
    const bytes low = _mm_set1_epi8(15);
    return _mm_or_si128(_mm_and_si128(first, low), _mm_slli_epi16(_mm_and_si128(second, low), 4));
#    else
    return vsliq_n_u8(first, second, 4);
#    endif
}

static inline bytes high_nibbles(bytes first, bytes second) {
#    ifdef SSE2
    const bytes low = _mm_set1_epi8(15);
    return _mm_or_si128(_mm_and_si128(_mm_srli_epi16(first, 4), low), _mm_andnot_si128(low, second));
#    else
    return vsriq_n_u8(second, first, 4);
#    endif
}

// Stores the scales of eight rows, even and odd rows separately.
static inline void put_scales(bytes eight, uint16_t * even, uint16_t * odd) {
#    ifdef SSE2
    eight = _mm_shufflehi_epi16(_mm_shufflelo_epi16(eight, 0xd8), 0xd8);
    eight = _mm_shuffle_epi32(eight, 0xd8);
    _mm_storel_epi64((__m128i *) even, eight);
    _mm_storel_epi64((__m128i *) odd, _mm_unpackhi_epi64(eight, eight));
#    else
    const uint16x8_t d = vreinterpretq_u16_u8(eight);
    vst1_u16(even, vget_low_u16(vuzp1q_u16(d, d)));
    vst1_u16(odd, vget_low_u16(vuzp2q_u16(d, d)));
#    endif
}
#endif

// Writes the blocks of sixteen rows, which are `stride` bytes apart, into a tile. The first row is a multiple of sixteen.
static inline void put_sixteen(enum tq1_25_kind kind, const char * x, size_t stride, void * y, int row) {
#ifdef LOAD
    const tq1_25_sizes of = sizes_of(kind);
    const int parts = of.parts * of.units;
    tq1_25_part * part = (tq1_25_part *) y;
    uint16_t * d = (uint16_t *) (part + parts);
    bytes a[16];
    for (int j = 0; j < parts; ++j) {
        if (kind == KIND_TQ1_25_64 && j == 0) {
            load_twelve(x, stride, a);
        } else if (kind != KIND_TQ1_25_64 && j % 4 == 0) {
            load_transposed(x + 4 * j, stride, a);
        }
        const bytes * b = a + j % 4 * 4;
        for (int k = 0; k < 4; ++k) {
            const bytes slots = kind != KIND_STQ1_0 ? b[k]
                                : k % 2             ? high_nibbles(b[k / 2], b[2 + k / 2])
                                                    : low_nibbles(b[k / 2], b[2 + k / 2]);
            STORE(part[j].qs[k] + row, slots);
        }
    }
    const bytes * end = a + 10; // d, after the signs
    if (kind != KIND_TQ1_25_64) {
        load_transposed(x + of.block - 16, stride, a);
        end = a + 14;
    }
    for (int j = 0; j < parts; ++j) {
        STORE(part[j].sign + row, end[j - parts]);
    }
    put_scales(ZIP_LOWER(end[0], end[1]), d + TQ1_25_PLACE(row), d + TQ1_25_PLACE(row + 1));
    put_scales(ZIP_UPPER(end[0], end[1]), d + TQ1_25_PLACE(row + 8), d + TQ1_25_PLACE(row + 9));
#else
    for (int r = 0; r < 16; ++r) {
        put_row(kind, x + stride * (size_t) r, y, row + r);
    }
#endif
}

// Bypasses the caches where possible. Tiles are not read soon, and lines need not be fetched before they are written: two thirds of the
// time.
static void put_tile(const void * x, void * y, size_t size) {
#ifdef SSE2
    if ((uintptr_t) y % 16 == 0) {
        for (size_t i = 0; i < size; i += 16) {
            _mm_stream_si128((__m128i *) ((char *) y + i), _mm_loadu_si128((const __m128i *) ((const char *) x + i)));
        }
        return;
    }
#endif
    memcpy(y, x, size);
}

void tq1_25_repack(enum tq1_25_kind kind, int64_t rows, int64_t n, const void * x, void * y) {
    const tq1_25_sizes of = sizes_of(kind);
    const int64_t nb = n / of.weights;
    const char * from = (const char *) x;
    char * to = (char *) y;
    for (; rows >= TQ1_25_TILE; rows -= TQ1_25_TILE, from += of.tile * (size_t) nb) {
        for (int64_t i = 0; i < nb; ++i, to += of.tile) {
            prefetch(from + of.tile * (size_t) (nb + i), of.tile); // the same part of the next 64 rows
            stq1_0_tile tile; // of any type
            for (int row = 0; row < TQ1_25_TILE; row += 16) {
                const char * sixteen = from + of.block * (size_t) (nb * row + i);
                switch (kind) { // constant kinds
                    case KIND_STQ1_0:    put_sixteen(KIND_STQ1_0, sixteen, of.block * (size_t) nb, &tile, row); break;
                    case KIND_TQ1_25_64: put_sixteen(KIND_TQ1_25_64, sixteen, of.block * (size_t) nb, &tile, row); break;
                    default:             put_sixteen(KIND_TQ1_25, sixteen, of.block * (size_t) nb, &tile, row);
                }
            }
            put_tile(&tile, to, of.tile);
        }
    }
#ifdef SSE2
    _mm_sfence(); // makes the streamed tiles visible to other threads
#endif
    memcpy(to, from, (size_t) (rows * nb) * of.block);
}

// Reads the block of a row from a tile: the inverse of put_row.
static void get_row(enum tq1_25_kind kind, const void * x, int row, void * y) {
    const tq1_25_sizes of = sizes_of(kind);
    const int parts = of.parts * of.units;
    uint8_t *qs = (uint8_t *) y, *sign = qs + GROUPS / 2 * parts, *d = sign + parts;
    const tq1_25_part * part = (const tq1_25_part *) x;
    for (int j = 0; j < parts; ++j) {
        for (int k = 0; k < 4; ++k) {
            const int shift = k / 2 * 4, even = part[j].qs[2 * k % 4][row] >> shift & 15,
                      odd = part[j].qs[2 * k % 4 + 1][row] >> shift & 15;
            qs[4 * j + k] = kind != KIND_STQ1_0 ? part[j].qs[k][row] : (uint8_t) (even | odd << 4);
        }
        sign[j] = part[j].sign[row];
    }
    memcpy(d, (const uint16_t *) (part + parts) + TQ1_25_PLACE(row), sizeof(uint16_t));
}

void tq1_25_unpack(enum tq1_25_kind kind, int64_t rows, int64_t n, const void * x, void * y) {
    const tq1_25_sizes of = sizes_of(kind);
    const int64_t nb = n / of.weights;
    const char * from = (const char *) x;
    char * to = (char *) y;
    for (; rows >= TQ1_25_TILE; rows -= TQ1_25_TILE, to += of.tile * (size_t) nb) {
        for (int64_t i = 0; i < nb; ++i, from += of.tile) {
            for (int row = 0; row < TQ1_25_TILE; ++row) {
                get_row(kind, from, row, to + of.block * (size_t) (nb * row + i));
            }
        }
    }
    memcpy(to, from, (size_t) (rows * nb) * of.block);
}

void stq1_0_order(const float * x, float * y, int64_t n) {
    for (int64_t i = 0; i < n; i += STQ1_0_CHUNK, x += STQ1_0_CHUNK, y += STQ1_0_CHUNK) {
#ifdef SSE2 // the plain loop takes 5 % of a prompt's time
        for (int g = 0; g < STQ1_0_LANE; g += 4) {
            __m128 a = _mm_loadu_ps(x + g), b = _mm_loadu_ps(x + STQ1_0_LANE + g);
            __m128 c = _mm_loadu_ps(x + 2 * STQ1_0_LANE + g), d = _mm_loadu_ps(x + 3 * STQ1_0_LANE + g);
            _MM_TRANSPOSE4_PS(a, b, c, d);
            float * to = y + TQ1_25_GROUP * g;
            _mm_storeu_ps(to, a);
            _mm_storeu_ps(to + 4, b);
            _mm_storeu_ps(to + 8, c);
            _mm_storeu_ps(to + 12, d);
        }
#elif defined(TQ1_25_ARM)
        for (int g = 0; g < STQ1_0_LANE; g += 4) {
            const float32x4x4_t by_lane = { { vld1q_f32(x + g), vld1q_f32(x + STQ1_0_LANE + g), vld1q_f32(x + 2 * STQ1_0_LANE + g),
                                              vld1q_f32(x + 3 * STQ1_0_LANE + g) } };
            vst4q_f32(y + TQ1_25_GROUP * g, by_lane);
        }
#else
        for (int g = 0; g < STQ1_0_LANE; ++g) {
            for (int lane = 0; lane < TQ1_25_GROUP; ++lane) {
                y[TQ1_25_GROUP * g + lane] = x[STQ1_0_LANE * lane + g];
            }
        }
#endif
    }
}

// ---- weights ----

// Block i of the leftover rows as a tile whose other rows are zero.
static void leftover_tile(enum tq1_25_kind kind, int64_t rows, int64_t nb, const void * x, int64_t i, stq1_0_tile * tile) {
    const tq1_25_sizes of = sizes_of(kind);
    memset(tile, 0, of.tile);
    for (int64_t r = 0; r < rows; ++r) {
        put_row(kind, (const char *) x + of.block * (size_t) (r * nb + i), tile, (int) r);
    }
}

// Block i of tile row t; leftover rows become a tile in `scratch`.
static const void * tile_at(enum tq1_25_kind kind, int64_t rows, int64_t nb, const void * x, int64_t t, int64_t i, stq1_0_tile * scratch) {
    const size_t size = sizes_of(kind).tile;
    const char * tiles = (const char *) x + size * (size_t) (t * nb);
    if (t < rows / TQ1_25_TILE) {
        return tiles + size * (size_t) i;
    }
    leftover_tile(kind, rows % TQ1_25_TILE, nb, tiles, i, scratch);
    return scratch;
}

// The code of group g of a part's row.
static inline int code_at(const tq1_25_part * part, int row, int g) {
    return (part->sign[row] >> g & 1) << 4 | (part->qs[g % 4][row] >> g / 4 * 4 & 15);
}

static inline int lane_of(int code, int lane) { return tq1_25_lanes[lane][code & 15] * (code & 16 ? -1 : 1); }

// Row `row` of a tile as floats. `patterns` holds the four weights of each code.
static inline void decode_row(enum tq1_25_kind kind, const void * tile, int row, const float * patterns, float * y) {
    const tq1_25_sizes of = sizes_of(kind);
    const int parts = of.parts * of.units;
    const tq1_25_part * part = (const tq1_25_part *) tile;
    const float d = tq1_25_fp16_to_float(((const uint16_t *) (part + parts))[TQ1_25_PLACE(row)]);
    for (int j = 0; j < parts; ++j) {
        for (int g = 0; g < GROUPS; ++g) {
            const float * pattern = patterns + TQ1_25_GROUP * code_at(part + j, row, g);
            float * to = kind == KIND_STQ1_0 ? y + STQ1_0_FIRST(GROUPS * j + g) : y + TQ1_25_QK8_0 * j + TQ1_25_GROUP * g;
            for (int lane = 0; lane < TQ1_25_GROUP; ++lane) {
                to[lane * (kind == KIND_STQ1_0 ? STQ1_0_LANE : 1)] = pattern[lane] * d;
            }
        }
    }
}

void tq1_25_decode_rows(enum tq1_25_kind kind, int64_t rows, int64_t n, const void * x, int64_t begin, int64_t end, int64_t first,
                        int64_t last, float * y) {
    const int64_t weights = sizes_of(kind).weights, nb = n / weights;
    float patterns[32 * TQ1_25_GROUP];
    for (int code = 0; code < 32; ++code) {
        for (int lane = 0; lane < TQ1_25_GROUP; ++lane) {
            patterns[TQ1_25_GROUP * code + lane] = (float) lane_of(code, lane);
        }
    }
    for (int64_t row = begin, to; row < end; row = to) {
        const int64_t t = row / TQ1_25_TILE, start = t * TQ1_25_TILE;
        to = end < start + TQ1_25_TILE ? end : start + TQ1_25_TILE;
        for (int64_t i = first / weights; i < last / weights; ++i) {
            stq1_0_tile scratch; // of any type
            const void * tile = tile_at(kind, rows, nb, x, t, i, &scratch);
            for (int64_t r = row; r < to; ++r) {
                float * out = y + (r - begin) * (last - first) + (i * weights - first);
                switch (kind) { // constant kinds
                    case KIND_STQ1_0:    decode_row(KIND_STQ1_0, tile, (int) (r - start), patterns, out); break;
                    case KIND_TQ1_25_64: decode_row(KIND_TQ1_25_64, tile, (int) (r - start), patterns, out); break;
                    default:             decode_row(KIND_TQ1_25, tile, (int) (r - start), patterns, out);
                }
            }
        }
    }
}

void tq1_25_decode_columns(enum tq1_25_kind kind, int64_t rows, int64_t n, const void * x, int64_t nc, const int64_t * columns, float * y) {
    const tq1_25_sizes of = sizes_of(kind);
    const int parts = of.parts * of.units;
    for (int64_t start = 0; start < rows; start += TQ1_25_TILE) {
        for (int64_t c = 0; c < nc; ++c) {
            stq1_0_tile scratch; // of any type
            const tq1_25_part * part =
                (const tq1_25_part *) tile_at(kind, rows, n / of.weights, x, start / TQ1_25_TILE, columns[c] / of.weights, &scratch);
            const int i = (int) (columns[c] % of.weights), in_chunk = i % STQ1_0_CHUNK;
            const int lane = kind == KIND_STQ1_0 ? in_chunk / STQ1_0_LANE : i % TQ1_25_GROUP;
            const int group = kind == KIND_STQ1_0 ? i / STQ1_0_CHUNK * STQ1_0_LANE + in_chunk % STQ1_0_LANE : i / TQ1_25_GROUP;
            const uint16_t * d = (const uint16_t *) (part + parts);
            for (int row = 0; row < TQ1_25_TILE && start + row < rows; ++row) {
                const int w = lane_of(code_at(part + group / GROUPS, row, group % GROUPS), lane);
                y[(start + row) * nc + c] = (float) w * tq1_25_fp16_to_float(d[TQ1_25_PLACE(row)]);
            }
        }
    }
}

// ---- tables ----

int64_t tq1_25_table_size(const struct tq1_25_isa * isa, int64_t n) {
    const int64_t size = n / TQ1_25_QK8_0 * (isa->table_size + (int64_t) sizeof(float));
    return (size + 63) / 64 * 64;
}

// The scales follow the tables.
static float * scales(const struct tq1_25_isa * isa, int64_t n, void * table) {
    return (float *) ((int8_t *) table + n / TQ1_25_QK8_0 * isa->table_size);
}

void tq1_25_make_table(const struct tq1_25_isa * isa, int64_t n, int64_t begin, int64_t end, const tq1_25_q8_0 * y, void * table) {
    const int64_t from = begin / TQ1_25_QK8_0, nq = end / TQ1_25_QK8_0 - from;
    isa->table(nq, y + from, (int8_t *) table + from * isa->table_size, scales(isa, n, table) + from);
}

void tq1_25_mul_tables(const struct tq1_25_isa * isa, enum tq1_25_kind kind, int64_t rows, int64_t n, const void * x, int64_t begin,
                       int64_t end, int nc, const tq1_25_q8_0 * const * y, void * const * tables, float * const * s) {
    const tq1_25_sizes of = sizes_of(kind);
    const int64_t nb = n / of.weights, whole = rows / TQ1_25_TILE, left = rows % TQ1_25_TILE;
    const int parts = of.parts * of.units;
    for (int64_t t = begin; t < end; ++t) {
        const char * tiles = (const char *) x + of.tile * (size_t) (t * nb);
        for (int c = 0; c < nc; ++c) {
            float * to = s[c] + t * TQ1_25_TILE;
            const int8_t * table = (const int8_t *) tables[c];
            const float * d = scales(isa, n, tables[c]);
            if (t < whole) {
                isa->gemv(parts, n, to, tiles, table, d);
            } else if (kind != KIND_STQ1_0) {
                for (int64_t r = 0; r < left; ++r) {
                    isa->vec_dot[kind](n, to + r, tiles + of.block * (size_t) (r * nb), y[c]);
                }
            } else { // STQ1_0's plain dot product needs activations in their original order
                float sums[TQ1_25_TILE];
                stq1_0_tile tile;
                for (int64_t i = 0; i < nb; ++i) {
                    leftover_tile(kind, left, nb, tiles, i, &tile);
                    isa->gemv(parts, of.weights, sums, &tile, table + parts * i * isa->table_size, d + parts * i);
                    for (int64_t r = 0; r < left; ++r) {
                        to[r] = sums[r] + (i > 0 ? to[r] : 0.0f);
                    }
                }
            }
        }
    }
}

// ---- codes ----

void tq1_25_mul_codes(const struct tq1_25_isa * isa, enum tq1_25_kind kind, int64_t rows, int64_t n, const void * x, int64_t begin,
                      int64_t end, int nc, const tq1_25_q8_0 * const * y, float * const * s, struct tq1_25_code_scratch * scratch) {
    const tq1_25_sizes of = sizes_of(kind);
    const int64_t nb = n / of.weights, units = nb * of.units; // in a row
    const int64_t whole = rows / TQ1_25_TILE, size = isa->table_size * of.parts, tiles = isa->code_tiles;
    const int64_t depth = TQ1_25_CODE_TABLES / of.parts / nc / of.units * of.units; // units at a time
    for (int64_t i = 0; i < units; i += depth) {
        const int64_t deep = units - i < depth ? units - i : depth;
        for (int64_t k = 0; k < deep; ++k) {
            for (int c = 0; c < nc; ++c) {
                isa->table(of.parts, y[c] + of.parts * (i + k), scratch->tables + (k * nc + c) * size,
                           scratch->d + (k * nc + c) * of.parts);
            }
        }
        for (int64_t t = begin; t < end; t += tiles) {
            const int64_t count = end - t < tiles ? end - t : tiles;
            memset(scratch->sums, 0, sizeof(float) * (size_t) (nc * tiles * TQ1_25_TILE));
            for (int c = 0; c < nc; ++c) {
                for (int64_t r = t * TQ1_25_TILE; r < (t + count) * TQ1_25_TILE && r < rows; r += 16) {
                    PREFETCH(s[c] + r); // else the stores wait for these lines; to L2, since L1 is for tables
                }
            }
            for (int64_t k = 0; k < deep; ++k) {
                const int64_t block = (i + k) / of.units, unit = (i + k) % of.units;
                tq1_25_unit units_of[2];
                for (int64_t u = 0; u < tiles; ++u) { // the first one twice if there is no second
                    const int64_t row = u < count ? t + u : t;
                    const char * tile = (const char *) x + of.tile * (size_t) (row * nb);
                    if (row < whole) {
                        units_of[u] = unit_of(of, tile + of.tile * (size_t) block, unit);
                        prefetch((const char *) units_of[u].part + of.tile * (size_t) (tiles * nb), of.tile / (size_t) of.units);
                    } else {
                        if (unit == 0) {
                            leftover_tile(kind, rows % TQ1_25_TILE, nb, tile, block, &scratch->tile);
                        }
                        units_of[u] = unit_of(of, &scratch->tile, unit);
                    }
                }
                isa->expand(of.parts, units_of, &scratch->codes);
                isa->lookup(of.parts, &scratch->codes, nc, scratch->tables + k * nc * size, scratch->d + k * nc * of.parts, scratch->sums);
            }
            for (int c = 0; c < nc; ++c) {
                for (int64_t u = 0; u < count; ++u) {
                    const float * sums = scratch->sums + (c * tiles + u) * TQ1_25_TILE;
                    float * to = s[c] + (t + u) * TQ1_25_TILE;
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

// ---- wide tables ----

void tq1_25_mul_wide(const struct tq1_25_isa * isa, enum tq1_25_kind kind, int64_t rows, int64_t n, const void * x, int64_t begin,
                     int64_t end, int nc, const tq1_25_q8_0 * const * y, float * const * s, struct tq1_25_wide_scratch * scratch) {
    const tq1_25_sizes of = sizes_of(kind);
    const int64_t nb = n / of.weights, parts = of.parts * of.units, whole = rows / TQ1_25_TILE, left = rows % TQ1_25_TILE;
    const int64_t width = TQ1_25_TILE * TQ1_25_WIDE_COLUMNS; // sums of a tile
    for (int64_t t = begin; t < end; t += TQ1_25_WIDE_TILES) {
        const int64_t count = end - t < TQ1_25_WIDE_TILES ? end - t : TQ1_25_WIDE_TILES;
        memset(scratch->sums, 0, sizeof(float) * (size_t) (count * width));
        for (int64_t j = 0; j < parts * nb; ++j) {
            const tq1_25_q8_0 * blocks[TQ1_25_WIDE_COLUMNS];
            for (int c = 0; c < nc; ++c) {
                blocks[c] = y[c] + j;
            }
            isa->wide_table(nc, blocks, scratch->table, scratch->d);
            for (int64_t k = 0; k < count; ++k) {
                const char * tile = (const char *) x + of.tile * (size_t) ((t + k) * nb + (t + k < whole ? j / parts : 0));
                if (t + k == whole) {
                    if (j % parts == 0) {
                        leftover_tile(kind, left, nb, tile, j / parts, &scratch->tile);
                    }
                    tile = (const char *) &scratch->tile;
                }
                const tq1_25_part * part = (const tq1_25_part *) tile + j % parts;
                prefetch((const char *) part + of.tile * (size_t) nb, sizeof(*part));
                isa->wide_rows(nc, part, (const uint16_t *) ((const tq1_25_part *) tile + parts), scratch->table, scratch->d,
                               scratch->sums + k * width);
            }
        }
        for (int64_t k = 0; k < count; ++k) {
            float * to[TQ1_25_WIDE_COLUMNS];
            for (int c = 0; c < nc; ++c) {
                to[c] = t + k < whole ? s[c] + (t + k) * TQ1_25_TILE : scratch->rows[c];
            }
            isa->wide_store(nc, scratch->sums + k * width, to);
            for (int c = 0; c < nc && t + k == whole; ++c) {
                memcpy(s[c] + whole * TQ1_25_TILE, scratch->rows[c], sizeof(float) * (size_t) left);
            }
        }
    }
}

// ---- panels ----

int64_t tq1_25_panel_size(int64_t n, int64_t nc) {
    return n / TQ1_25_QK8_0 * nc * (int64_t) (TQ1_25_QK8_0 + sizeof(int32_t) + sizeof(float));
}

static int32_t sum_of(const int8_t q[TQ1_25_QK8_0]) {
#ifdef SSE2 // makes a panel in three quarters of the plain loop's time
    const __m128i top = _mm_set1_epi8(-128), zero = _mm_setzero_si128(); // q + 128, unsigned
    const __m128i a = _mm_xor_si128(_mm_loadu_si128((const __m128i *) q), top);
    const __m128i b = _mm_xor_si128(_mm_loadu_si128((const __m128i *) (q + 16)), top);
    const __m128i s = _mm_add_epi64(_mm_sad_epu8(a, zero), _mm_sad_epu8(b, zero));
    return _mm_cvtsi128_si32(s) + _mm_extract_epi16(s, 4) - 128 * TQ1_25_QK8_0;
#elif defined(TQ1_25_ARM)
    return vaddlvq_s8(vld1q_s8(q)) + vaddlvq_s8(vld1q_s8(q + 16));
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
            const float d = tq1_25_fp16_to_float(block->d);
            memcpy(column, &bias, sizeof(bias));
            memcpy(column + sizeof(bias) * (size_t) nc, &d, sizeof(d));
        }
        to += tq1_25_panel_size(TQ1_25_QK8_0, nc);
    }
}

void tq1_25_decode_scales(const uint16_t * d, float * to) {
    for (int place = 0; place < TQ1_25_TILE; ++place) {
        to[TQ1_25_ROW(place)] = tq1_25_fp16_to_float(d[place]);
    }
}

void tq1_25_mul_panels(const struct tq1_25_isa * isa, enum tq1_25_kind kind, int64_t rows, int64_t n, const void * x, int64_t begin,
                       int64_t end, int64_t nc, int64_t first, int64_t last, const void * panels, float * const * s,
                       struct tq1_25_panel_scratch * scratch) {
    const tq1_25_sizes of = sizes_of(kind);
    const int64_t nb = n / of.weights, units = nb * of.units, whole = rows / TQ1_25_TILE;
    const int64_t most = TQ1_25_DEPTH / of.parts; // units at a time
    for (int64_t t = begin; t < end; ++t) {
        const char * tiles = (const char *) x + of.tile * (size_t) (t * nb);
        const int left = t < whole ? TQ1_25_TILE : (int) (rows % TQ1_25_TILE);
        for (int64_t i = 0; i < units; i += most) {
            const int64_t depth = units - i < most ? units - i : most;
            for (int64_t k = 0; k < depth; ++k) {
                const int64_t block = (i + k) / of.units, unit = (i + k) % of.units;
                const void * tile = tiles + of.tile * (size_t) block;
                if (left < TQ1_25_TILE) {
                    if (unit == 0) {
                        leftover_tile(kind, left, nb, tiles, block, &scratch->tile);
                    }
                    tile = &scratch->tile;
                }
                isa->decode(of.parts, unit_of(of, tile, unit), scratch->decoded + TQ1_25_DECODED(of.parts) * k);
            }
            for (int64_t p = first; p < last; ++p) {
                const int64_t c = tq1_25_first_column(nc, p);
                const int columns = (int) (tq1_25_first_column(nc, p + 1) - c);
                const int8_t * panel =
                    (const int8_t *) panels + tq1_25_panel_size(n, c) + tq1_25_panel_size(i * of.parts * TQ1_25_QK8_0, columns);
                for (int k = 0; k < columns; ++k) {
                    for (int r = 0; r < left; r += 16) {
                        PREFETCH_WRITE(s[c + k] + t * TQ1_25_TILE + r); // else the stores wait for these lines
                    }
                }
                isa->gemm(of.parts, depth, columns, scratch->sums[0], scratch->decoded, panel);
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

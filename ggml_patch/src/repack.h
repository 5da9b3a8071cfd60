// Products of repacked matrices, split into ranges that threads can share.

#pragma once

#include "isas.h"

#ifdef __cplusplus
extern "C" {
#endif

// The sizes of a kind.
typedef struct {
    int64_t weights;    // in a block
    size_t block, tile; // bytes
    int parts, units;   // parts in a unit, units in a tile
} tq1_25_sizes;

tq1_25_sizes tq1_25_sizes_of(enum tq1_25_kind kind);

// Repacks blocks of rows into tiles, as many bytes. x and y must not overlap.
void tq1_25_repack(enum tq1_25_kind kind, int64_t rows, int64_t n, const void * x, void * y);
// The inverse: tiles back into blocks.
void tq1_25_unpack(enum tq1_25_kind kind, int64_t rows, int64_t n, const void * x, void * y);

// Decodes rows begin .. end - 1 of a repacked matrix: y[end - begin][last - first] receives weights first .. last - 1 of each, multiples
// of the block.
void tq1_25_decode_rows(enum tq1_25_kind kind, int64_t rows, int64_t n, const void * x, int64_t begin, int64_t end, int64_t first,
                        int64_t last, float * y);
// Decodes weights columns[0 .. nc - 1] of all rows: y[rows][nc].
void tq1_25_decode_columns(enum tq1_25_kind kind, int64_t rows, int64_t n, const void * x, int64_t nc, const int64_t * columns, float * y);

// Puts n activations into the order of STQ1_0's groups. x and y must not overlap.
void stq1_0_order(const float * x, float * y, int64_t n);

// The functions below work on tile rows begin .. end - 1 out of the (rows + 63) / 64 of a repacked matrix x, and on vectors of n Q8_0
// activations. Different ranges write different parts of a result.

// ---- tables ----

// Makes the tables, tq1_25_table_size bytes aligned to 64, of activations begin .. end - 1, multiples of 32.
int64_t tq1_25_table_size(const struct tq1_25_isa * isa, int64_t n);
void tq1_25_make_table(const struct tq1_25_isa * isa, int64_t n, int64_t begin, int64_t end, const tq1_25_q8_0 * y, void * table);

// s[c][row] for columns c < nc, from their activations y[c] and tables[c].
void tq1_25_mul_tables(const struct tq1_25_isa * isa, enum tq1_25_kind kind, int64_t rows, int64_t n, const void * x, int64_t begin,
                       int64_t end, int nc, const tq1_25_q8_0 * const * y, void * const * tables, float * const * s);

// ---- codes ----

#define TQ1_25_CODE_COLUMNS 16 // vectors at a time
#define TQ1_25_CODE_TABLES 512 // Q8_0 blocks, of all vectors, whose tables exist at a time: 256 KB of the L2 cache

// Columns are spread over groups of at most TQ1_25_CODE_COLUMNS, evenly and in pairs: the least number of groups, and a group's first
// column.
static inline int64_t tq1_25_code_groups(int64_t nc) { return (nc + TQ1_25_CODE_COLUMNS - 1) / TQ1_25_CODE_COLUMNS; }
static inline int64_t tq1_25_first_of_group(int64_t nc, int64_t groups, int64_t group) {
    const int64_t first = (nc * group / groups + 1) / 2 * 2;
    return first < nc ? first : nc;
}

// One per thread, aligned to 64 bytes.
struct tq1_25_code_scratch {
    int8_t tables[TQ1_25_CODE_TABLES * TQ1_25_TABLE];
    float d[TQ1_25_CODE_TABLES];
    float sums[TQ1_25_CODE_COLUMNS * 2 * TQ1_25_TILE];
    float rows[TQ1_25_TILE];
    tq1_25_codes codes;
    stq1_0_tile tile; // the leftover rows, of any type
};

// s[c][row] for columns c < nc, 0 < nc <= TQ1_25_CODE_COLUMNS, from their activations y[c].
void tq1_25_mul_codes(const struct tq1_25_isa * isa, enum tq1_25_kind kind, int64_t rows, int64_t n, const void * x, int64_t begin,
                      int64_t end, int nc, const tq1_25_q8_0 * const * y, float * const * s, struct tq1_25_code_scratch * scratch);

// ---- wide tables ----

// Columns in groups of 32. If 17 to 24 columns remain, they form two groups: sixteen, and the rest. The number of groups, and a group's
// first column. Codes multiply groups of up to max_codes columns.
static inline int64_t tq1_25_wide_groups(int64_t nc) {
    const int64_t left = nc % TQ1_25_WIDE_COLUMNS;
    return nc / TQ1_25_WIDE_COLUMNS + (left > 0) + (left > 16 && left <= 24);
}
static inline int64_t tq1_25_first_of_wide(int64_t nc, int64_t group) {
    const int64_t whole = nc / TQ1_25_WIDE_COLUMNS * TQ1_25_WIDE_COLUMNS, first = group * TQ1_25_WIDE_COLUMNS;
    return first <= whole ? first : group < tq1_25_wide_groups(nc) ? whole + 16 : nc;
}

#define TQ1_25_WIDE_TILES 32 // tile rows for which a table is made: 256 KB of sums, in the L2 cache

// One per thread, aligned to 64 bytes.
struct tq1_25_wide_scratch {
    int16_t table[TQ1_25_WIDE_TABLE];
    float d[TQ1_25_WIDE_COLUMNS];
    float sums[TQ1_25_WIDE_TILES * TQ1_25_TILE * TQ1_25_WIDE_COLUMNS];
    float rows[TQ1_25_WIDE_COLUMNS][TQ1_25_TILE]; // the leftover rows' results
    stq1_0_tile tile;                             // and their weights, of any type
};

// s[c][row] for columns c < nc, 0 < nc <= TQ1_25_WIDE_COLUMNS, from their activations y[c].
void tq1_25_mul_wide(const struct tq1_25_isa * isa, enum tq1_25_kind kind, int64_t rows, int64_t n, const void * x, int64_t begin,
                     int64_t end, int nc, const tq1_25_q8_0 * const * y, float * const * s, struct tq1_25_wide_scratch * scratch);

// ---- panels ----

// Columns are spread evenly over as few panels as possible, on ARM in pairs: the number of panels, and a panel's first column.
static inline int64_t tq1_25_panels(int64_t nc) { return (nc + TQ1_25_COLUMNS - 1) / TQ1_25_COLUMNS; }
static inline int64_t tq1_25_first_column(int64_t nc, int64_t panel) {
#ifdef TQ1_25_ARM // five columns take as many instructions there as six
    return tq1_25_first_of_group(nc, tq1_25_panels(nc), panel);
#else
    return nc * panel / tq1_25_panels(nc);
#endif
}

// Makes a panel, tq1_25_panel_size bytes aligned to 4, of nc <= TQ1_25_COLUMNS columns, from activations begin .. end - 1, multiples of 32.
int64_t tq1_25_panel_size(int64_t n, int64_t nc);
void tq1_25_make_panel(int64_t begin, int64_t end, int nc, const tq1_25_q8_0 * const * y, void * panel);

#define TQ1_25_DEPTH 64 // parts of a row that are decoded at once, for all columns: 132 or 136 KB
TQ1_25_ASSERT(TQ1_25_DEPTH % (QK_STQ1_0 / TQ1_25_QK8_0) == 0, "both units of an STQ1_0 tile are decoded from it");

// One per thread, aligned to 64 bytes.
struct tq1_25_panel_scratch {
    uint8_t decoded[TQ1_25_DEPTH / (QK_TQ1_25_64 / TQ1_25_QK8_0) * TQ1_25_DECODED(QK_TQ1_25_64 / TQ1_25_QK8_0)]; // most units, most scales
    stq1_0_tile tile; // the leftover rows, of any type
    float sums[TQ1_25_COLUMNS][TQ1_25_TILE];
};

// s[c][row] for the columns c of panels first .. last - 1 among the consecutive panels of all nc columns.
void tq1_25_mul_panels(const struct tq1_25_isa * isa, enum tq1_25_kind kind, int64_t rows, int64_t n, const void * x, int64_t begin,
                       int64_t end, int64_t nc, int64_t first, int64_t last, const void * panels, float * const * s,
                       struct tq1_25_panel_scratch * scratch);

#ifdef __cplusplus
}
#endif

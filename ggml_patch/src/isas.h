// The kernels of each instruction set, and the choice among the sets.

#pragma once

#include "attention.h"
#include "tile.h"

#if defined(__x86_64__) || defined(_M_X64)
#    define TQ1_25_X86
#elif defined(__aarch64__) && !defined(__AARCH64EB__)
#    define TQ1_25_ARM // 64-bit, little-endian, GCC or Clang (MSVC names it differently)
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Function types, by which arch/*/kernels.h declares kernels.

// *s = sum over blocks i of d_w[i] * sum over the block's Q8_0 blocks j of d_y[j] * (integer sum of 32 products), for rows of n weights
typedef void tq1_25_vec_dot_t(int64_t n, float * s, const void * x, const tq1_25_q8_0 * y);
// Makes the consecutive tables of nq Q8_0 blocks and stores their scales.
typedef void tq1_25_table_t(int64_t nq, const tq1_25_q8_0 * y, int8_t * table, float * d);

// Kernels of repacked rows serve every type. `parts` tells how often the weights' scale changes: the number of Q8_0 blocks that meet a
// tile (gemv: 2, 4 or 8) or a unit (the others: 2 or 4).

// s[64]: the dot products of a row of tiles, n weights per row, with a vector's consecutive tables and scales.
typedef void tq1_25_gemv_t(int parts, int64_t n, float * s, const void * x, const int8_t * table, const float * d);
// Spreads code_tiles units to codes.
typedef void tq1_25_expand_t(int parts, const tq1_25_unit x[2], tq1_25_codes * codes);
// Adds to sums[nc][64 * code_tiles] the products of these codes with the tables of nc columns, in an order of the kernel's own.
typedef void tq1_25_lookup_t(int parts, const tq1_25_codes * codes, int nc, const int8_t * table, const float * d, float * sums);
// Moves, or adds, 64 of those sums to s in the order of the rows.
typedef void tq1_25_store_t(float * s, const float * sums, bool add);
// Makes the wide table, aligned to 64 bytes, of one Q8_0 block of each of nc columns, and stores their scales: d[16], or with more columns
// d[TQ1_25_WIDE_COLUMNS].
typedef void tq1_25_wide_table_t(int nc, const tq1_25_q8_0 * const * y, int16_t * table, float * d);
// Adds the products of a part, whose rows have the scales dx, to the sums of 64 rows, in an order of the kernel's own.
typedef void tq1_25_wide_rows_t(int nc, const tq1_25_part * x, const uint16_t * dx, const int16_t * table, const float * d, float * sums);
// s[c][64]: those sums in the order of the rows.
typedef void tq1_25_wide_store_t(int nc, const float * sums, float * const * s);
// Decodes a unit to TQ1_25_DECODED(parts) bytes.
typedef void tq1_25_decode_t(int parts, tq1_25_unit x, uint8_t * w);
// s[64 * c + r]: the dot products of 64 rows, `units` decoded units, with the nc columns of a panel. s is aligned to 64 bytes.
typedef void tq1_25_gemm_t(int parts, int64_t units, int nc, float * s, const uint8_t * w, const int8_t * panel);
// Does this CPU have the instruction set?
typedef int tq1_25_has_t(void);

struct tq1_25_isa {
    const char * name;
    tq1_25_vec_dot_t * vec_dot[TQ1_25_KINDS];
    tq1_25_has_t * supported; // NULL: by every CPU

    // "scalar" has no kernels for repacked rows: the rest is 0, and weights stay as they are in the file.

    // Use tables up to max_tables columns, codes up to max_codes, panels or wide tables beyond. scripts/bench/kernels.py measures the
    // limits; max_codes with panels, and max_tables on ARM, are estimated from instruction counts (docs/kernels.md,
    // scripts/bench/count_arm.py).
    int max_tables, max_codes;

    int64_t table_size; // bytes per Q8_0 block
    tq1_25_table_t * table;
    tq1_25_gemv_t * gemv;

    int code_tiles; // 1 or 2 at a time
    tq1_25_expand_t * expand;
    tq1_25_lookup_t * lookup;
    tq1_25_store_t * store;

    tq1_25_wide_table_t * wide_table; // NULL without wide tables, like the next two
    tq1_25_wide_rows_t * wide_rows;
    tq1_25_wide_store_t * wide_store;

    tq1_25_decode_t * decode; // NULL without panels
    tq1_25_gemm_t * gemm; // NULL without panels

    const struct sherry_attention_kernels * attention; // NULL: llama.cpp's own
};

// The sets compiled in, best first. "scalar" is the last; then comes a NULL name.
extern const struct tq1_25_isa tq1_25_isas[];

// The best set that this CPU has, or the one that the environment variable SHERRY_ISA names; chosen once. Ends the process with a message
// if the named set is unknown or this CPU lacks it.
const struct tq1_25_isa * tq1_25_best_isa(void);

// Every build has these.
tq1_25_vec_dot_t tq1_25_vec_dot_scalar, tq1_25_64_vec_dot_scalar, stq1_0_vec_dot_scalar;

// The best set's dot products of one row (nrc = 1), with the signature of ggml's table.
void ggml_vec_dot_tq1_25_q8_0(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc);
void ggml_vec_dot_tq1_25_64_q8_0(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc);
void ggml_vec_dot_stq1_0_q8_0(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc);

#ifdef __cplusplus
}
#endif

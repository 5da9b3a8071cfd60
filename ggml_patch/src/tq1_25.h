// TQ1_25: 3:4 sparse ternary weights, 128 in 22 bytes; STQ1_0: 256 in 42. The blocks, their codecs and their dot products.
//
// These files are compiled by llama.cpp's build and by the Python bindings alike. They take plain pointers and know
// of ggml no more than the layout of a Q8_0 block. Lengths are in weights and are multiples of 128, for STQ1_0 of 256;
// pointers are aligned as their types are, to two bytes for blocks.

#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32) && defined(GGML_SHARED)
#    ifdef GGML_BUILD
#        define TQ1_25_API __declspec(dllexport)
#    else
#        define TQ1_25_API __declspec(dllimport)
#    endif
#else
#    define TQ1_25_API
#endif

#ifdef __cplusplus
extern "C" {
#    define TQ1_25_ASSERT static_assert
#else
#    define TQ1_25_ASSERT _Static_assert
#endif

#define TQ1_25_TYPE_ID 125 // GGML_TYPE_TQ1_25, and LLAMA_FTYPE_MOSTLY_TQ1_25

#define QK_TQ1_25 128                // weights of a block
#define TQ1_25_GROUP 4               // consecutive weights of which exactly one is 0
#define TQ1_25_GROUPS (QK_TQ1_25 / TQ1_25_GROUP)

// 1.375 bits a weight
typedef struct {
    uint8_t  qs[TQ1_25_GROUPS / 2];   // slots: group g is in byte 4*(g/8) + g%4, low nibble where g%8 < 4, else high
    uint8_t  sign[TQ1_25_GROUPS / 8]; // group g is bit g%8 of byte g/8
    uint16_t d;                       // scale, fp16
} block_tq1_25;
TQ1_25_ASSERT(sizeof(block_tq1_25) == TQ1_25_GROUPS / 2 + TQ1_25_GROUPS / 8 + sizeof(uint16_t), "block_tq1_25 has padding");

#define STQ1_0_TYPE_ID 43 // GGML_TYPE_STQ1_0, and LLAMA_FTYPE_MOSTLY_STQ1_0

#define QK_STQ1_0 256
#define STQ1_0_GROUPS (QK_STQ1_0 / TQ1_25_GROUP)
#define STQ1_0_LANE 16                          // weights from one lane of a group to the next
#define STQ1_0_CHUNK (TQ1_25_GROUP * STQ1_0_LANE) // weights of 16 groups that follow one another

// 1.3125 bits a weight: the layout of llama.cpp's pull request 22836
typedef struct {
    uint8_t  qs[STQ1_0_GROUPS / 2];   // slots: group g is in byte g/2, low nibble where g is even
    uint8_t  sign[STQ1_0_GROUPS / 8]; // group g is bit g%8 of byte g/8
    uint16_t d;                       // scale, fp16
} block_stq1_0;
TQ1_25_ASSERT(sizeof(block_stq1_0) == STQ1_0_GROUPS / 2 + STQ1_0_GROUPS / 8 + sizeof(uint16_t), "block_stq1_0 has padding");

// Lane 0 of group g of a block; the others are STQ1_0_LANE weights apart.
#define STQ1_0_FIRST(g) ((g) / STQ1_0_LANE * STQ1_0_CHUNK + (g) % STQ1_0_LANE)

#define TQ1_25_QK8_0 32 // activations of a Q8_0 block

// ggml's block_q8_0
typedef struct {
    uint16_t d; // scale, fp16
    int8_t   qs[TQ1_25_QK8_0];
} tq1_25_q8_0;
TQ1_25_ASSERT(sizeof(tq1_25_q8_0) == sizeof(uint16_t) + TQ1_25_QK8_0, "tq1_25_q8_0 has padding");

// ---- codec (tq1_25.c) ----

enum tq1_25_status {
    TQ1_25_OK         = 0,
    TQ1_25_NOT_FINITE = 1, // a weight is NaN or infinite
    TQ1_25_OVERFLOW   = 2, // a block's mean magnitude rounds to infinity in fp16
};

// Sparse-AbsMean of n weights: n/128 blocks to y, all of them. Returns the status of the first block that TQ1_25
// cannot hold and its index in *bad (which may be NULL); such a block's scale is a NaN, which llama.cpp's own check of
// tensor data refuses.
TQ1_25_API enum tq1_25_status tq1_25_quantize(const float * x, block_tq1_25 * y, int64_t n, int64_t * bad);

// The same for the importance-weighted squared error: w holds a weight's importance for each of n weights.
TQ1_25_API enum tq1_25_status tq1_25_quantize_weighted(const float * x, const float * w, block_tq1_25 * y, int64_t n, int64_t * bad);

// n weights from n/128 blocks; any bytes decode.
TQ1_25_API void tq1_25_dequantize(const block_tq1_25 * x, float * y, int64_t n);

// Are all scales of nb blocks finite and not negative? If not, says on stderr which is the first that isn't.
TQ1_25_API bool tq1_25_validate(const void * x, size_t nb);

// The same for STQ1_0.
TQ1_25_API enum tq1_25_status stq1_0_quantize(const float * x, block_stq1_0 * y, int64_t n, int64_t * bad);
TQ1_25_API enum tq1_25_status stq1_0_quantize_weighted(const float * x, const float * w, block_stq1_0 * y, int64_t n, int64_t * bad);
TQ1_25_API void stq1_0_dequantize(const block_stq1_0 * x, float * y, int64_t n);
TQ1_25_API bool stq1_0_validate(const void * x, size_t nb);

// n activations, n a multiple of 32, to Q8_0: scale max|x| / 127, halves away from zero; the bytes of ggml's reference.
TQ1_25_API void tq1_25_quantize_q8_0(const float * x, tq1_25_q8_0 * y, int64_t n);

// Tells the system that these bytes of a mapped file are not needed for now; they can still be read. They stay in the
// page cache, no longer in this process. Never for bytes that are not of a file.
TQ1_25_API void tq1_25_release(const void * x, size_t size);

// The codec in the shapes of ggml's tables.
TQ1_25_API void   quantize_row_tq1_25_ref(const float * x, void * y, int64_t n);
TQ1_25_API void   dequantize_row_tq1_25(const void * x, float * y, int64_t n);
TQ1_25_API size_t quantize_tq1_25(const float * x, void * y, int64_t nrows, int64_t n_per_row, const float * imatrix);
TQ1_25_API void   quantize_row_stq1_0_ref(const float * x, void * y, int64_t n);
TQ1_25_API void   dequantize_row_stq1_0(const void * x, float * y, int64_t n);
TQ1_25_API size_t quantize_stq1_0(const float * x, void * y, int64_t nrows, int64_t n_per_row, const float * imatrix);

// ---- dot products (tq1_25-dot.c and a file an instruction set) ----

// *s = sum over blocks i of d_w[i] * sum over j of d_y[4i+j] * (integer sum of the 32 products), n weights
typedef void (*tq1_25_vec_dot_t)(int64_t n, float * s, const block_tq1_25 * x, const tq1_25_q8_0 * y);
typedef void (*stq1_0_vec_dot_t)(int64_t n, float * s, const block_stq1_0 * x, const tq1_25_q8_0 * y);

// ---- repacked (tq1_25-repack.c, tq1_25-lookup-*.c, tq1_25-gemm-*.c) ----
//
// At load, 64 rows are interleaved, so that one instruction meets the same place of each. A matrix of `rows` rows of n
// weights takes as many bytes as before: rows / 64 rows of tiles, each a tile a block that follow one another, then
// the rows that are left over, up to 63, as the plain blocks they were.
//
// STQ1_0's weights come in the order of the groups, so that what multiplies is the same for both types; its activations go
// through Q8_0 in that order (stq1_0_order).

#define TQ1_25_TILE 64

// 64 rows, the 32 weights of each that meet one Q8_0 block: eight groups
typedef struct {
    uint8_t qs[TQ1_25_QK8_0 / TQ1_25_GROUP / 2][TQ1_25_TILE]; // byte i: slots of groups i and 4+i
    uint8_t sign[TQ1_25_TILE];                                // a bit a group
} tq1_25_part;

// 64 rows, a block of each: 22 cache lines
typedef struct {
    tq1_25_part part[QK_TQ1_25 / TQ1_25_QK8_0];
    uint16_t    d[TQ1_25_TILE]; // of the row TQ1_25_ROW(place)
} tq1_25_tile;
TQ1_25_ASSERT(sizeof(tq1_25_tile) == TQ1_25_TILE * sizeof(block_tq1_25), "tq1_25_tile has padding");

// 42 cache lines
typedef struct {
    tq1_25_part part[QK_STQ1_0 / TQ1_25_QK8_0];
    uint16_t    d[TQ1_25_TILE];
} stq1_0_tile;
TQ1_25_ASSERT(sizeof(stq1_0_tile) == TQ1_25_TILE * sizeof(block_stq1_0), "stq1_0_tile has padding");

enum tq1_25_kind { KIND_TQ1_25 = 0, KIND_STQ1_0 = 1, TQ1_25_KINDS = 2 };

// 128 weights in the order of the groups of each of 64 rows: a tile of TQ1_25, half of one of STQ1_0.
typedef struct {
    const tq1_25_part * part; // QK_TQ1_25 / TQ1_25_QK8_0 of them
    const uint16_t *    d;
} tq1_25_rows;

// The row whose scale is at a place of tq1_25_tile.d: the order in which sums come out of the lookup. A place is
// upper eight of sixteen, odd, sixteen, pair: h o kk mm; its row kk h mm o.
#define TQ1_25_ROW(place) (((place) >> 2 & 3) << 4 | ((place) >> 5) << 3 | ((place) & 3) << 1 | ((place) >> 4 & 1))
#define TQ1_25_PLACE(row) (((row) >> 3 & 1) << 5 | ((row) & 1) << 4 | (row) >> 4 << 2 | ((row) >> 1 & 3)) // its inverse

// Matrix by vector. For four activations a group of weights has one of 32 sums t, one for each code; they are tabulated
// once for a vector, and a row's share is looked up. AVX-512 has 32 int16 of each group, by sign << 4 | slot. AVX2 has bytes:
// t = TQ1_25_SPLIT * high + low, both small enough for a byte to hold eight of them, which is as many as share a scale:
// |t| <= 3 * 128, |high| <= 14, |low| <= 14; 16 high parts of each group by slot, then 16 low ones.
#define TQ1_25_SPLIT      28
#define TQ1_25_TABLE_AVX2 (TQ1_25_GROUPS * 32) // bytes, of 128 activations
#define TQ1_25_TABLE      (TQ1_25_GROUPS * 64) // AVX-512's and NEON's, and the most that there is

// Matrix by several vectors. The same lookup, with the codes of one or two tiles spread to bytes for all of the vectors.
typedef union {
    struct { // AVX-512
        uint8_t code[TQ1_25_GROUPS][2][TQ1_25_TILE]; // group, tile, row: sign << 4 | slot, the upper bits may be anything
        uint8_t after[TQ1_25_TILE];                  // is read, and does not count
        float   d[2][TQ1_25_TILE];                   // in the order of the sums
    } two;
    struct { // AVX2
        uint8_t slot[TQ1_25_GROUPS][TQ1_25_TILE];
        uint8_t mask[TQ1_25_GROUPS][TQ1_25_TILE];                        // 255 where the sign is negative
        uint8_t negative[QK_TQ1_25 / TQ1_25_QK8_0][TQ1_25_TILE];         // how many groups of a part are
        float   d[TQ1_25_TILE];                                          // in the order of the sums
    } one;
    struct { // NEON
        uint8_t code[TQ1_25_GROUPS][TQ1_25_TILE]; // sign << 4 | slot
        float   d[TQ1_25_TILE];
    } neon;
} tq1_25_codes;

#define TQ1_25_CODE_COLUMNS 16                   // vectors at a time
#define TQ1_25_CODE_PAIRS   128                  // vectors times blocks whose tables are there at a time: 256 KB of the L2 cache

// Matrix by matrix. Weights plus one as bytes, so unsigned as the multiplications want them: 64 rows, a block of each.
typedef struct {
    uint8_t w[TQ1_25_TILE / 16][TQ1_25_GROUPS][16][TQ1_25_GROUP]; // sixteen rows, group, row, lane
    float   d[TQ1_25_TILE];
} tq1_25_decoded;

// Activations of up to six vectors, the columns of a panel. For each Q8_0 block of them: eight groups by nc columns by
// four int8; nc int32, minus the sum of the block, which takes the one from the weights again; nc floats, the scales.
#define TQ1_25_COLUMNS 6

struct tq1_25_isa {
    const char *     name;
    tq1_25_vec_dot_t vec_dot;
    stq1_0_vec_dot_t vec_dot_stq1_0;
    int (*supported)(void); // by this CPU; NULL: everywhere

    // The rest is 0 where there are no kernels for repacked rows.

    // Up to how many columns tables are the fastest, and from there on codes; then panels. scripts/bench/kernels.py measures it; where there
    // are panels, the second is counted from instructions (ggml_patch/README.md), and for ARM the first is, too (scripts/bench/count_arm.py).
    int max_tables, max_codes;

    // Tables of nb times 128 activations, table_size bytes each, and their scales, a float a Q8_0 block; strides in bytes and floats.
    int64_t table_size;
    void (*table)(int64_t nb, const tq1_25_q8_0 * y, int8_t * table, int64_t table_stride, float * d, int64_t d_stride);
    // The 64 dot products of a row of tiles of a kind, rows of n weights; tables and scales follow one another.
    void (*gemv[TQ1_25_KINDS])(int64_t n, float * s, const void * x, const int8_t * table, const float * d);

    int code_tiles; // 1 or 2 at a time
    void (*expand)(const tq1_25_rows x[2], tq1_25_codes * codes);
    // Adds to sums[c][64 * code_tiles], in an order of its own, what a block of each row and of nc columns makes.
    void (*lookup)(const tq1_25_codes * codes, int nc, const int8_t * tables, const float * d, float * sums);
    // 64 of the sums to their rows.
    void (*store)(float * s, const float * sums, bool add);

    // NULL where there are no panels.
    void (*decode)(tq1_25_rows x, tq1_25_decoded * w);
    // s[64 * c + r]: the dot products of 64 rows, nb decoded tiles, with the nc columns of a panel. s is aligned to 64 bytes.
    void (*gemm)(int64_t nb, int nc, float * s, const tq1_25_decoded * w, const int8_t * panel);
};

// Those compiled in, the best first; the last is "scalar". Ends with a NULL name.
extern const struct tq1_25_isa tq1_25_isas[];

// The best that this CPU has, or the one that SHERRY_ISA in the environment names; chosen once. A name that is not
// there or that this CPU lacks ends the process with a message.
const struct tq1_25_isa * tq1_25_best_isa(void);

void tq1_25_vec_dot_scalar(int64_t n, float * s, const block_tq1_25 * x, const tq1_25_q8_0 * y);
void stq1_0_vec_dot_scalar(int64_t n, float * s, const block_stq1_0 * x, const tq1_25_q8_0 * y);
// Compilers that know AVX-VNNI.
#if !defined(__GNUC__) || (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#    define TQ1_25_AVXVNNI
#endif

#if defined(__x86_64__) || defined(_M_X64)
void tq1_25_vec_dot_avx2(int64_t n, float * s, const block_tq1_25 * x, const tq1_25_q8_0 * y);
void tq1_25_vec_dot_avx512(int64_t n, float * s, const block_tq1_25 * x, const tq1_25_q8_0 * y);
void tq1_25_vec_dot_avx512vnni(int64_t n, float * s, const block_tq1_25 * x, const tq1_25_q8_0 * y);
void stq1_0_vec_dot_avx2(int64_t n, float * s, const block_stq1_0 * x, const tq1_25_q8_0 * y);
void stq1_0_vec_dot_avx512(int64_t n, float * s, const block_stq1_0 * x, const tq1_25_q8_0 * y);
void stq1_0_vec_dot_avx512vnni(int64_t n, float * s, const block_stq1_0 * x, const tq1_25_q8_0 * y);
void tq1_25_table_avx2(int64_t nb, const tq1_25_q8_0 * y, int8_t * table, int64_t table_stride, float * d, int64_t d_stride);
void tq1_25_gemv_avx2(int64_t n, float * s, const void * x, const int8_t * table, const float * d);
void stq1_0_gemv_avx2(int64_t n, float * s, const void * x, const int8_t * table, const float * d);
void tq1_25_gemv_avx512(int64_t n, float * s, const void * x, const int8_t * table, const float * d);
void stq1_0_gemv_avx512(int64_t n, float * s, const void * x, const int8_t * table, const float * d);
void tq1_25_expand_avx2(const tq1_25_rows x[2], tq1_25_codes * codes);
void tq1_25_lookup_avx2(const tq1_25_codes * codes, int nc, const int8_t * table, const float * d, float * sums);
void tq1_25_store_avx2(float * s, const float * sums, bool add);
void tq1_25_table_avx512(int64_t nb, const tq1_25_q8_0 * y, int8_t * table, int64_t table_stride, float * d, int64_t d_stride);
void tq1_25_expand_avx512(const tq1_25_rows x[2], tq1_25_codes * codes);
void tq1_25_lookup_avx512(const tq1_25_codes * codes, int nc, const int8_t * table, const float * d, float * sums);
void tq1_25_store_avx512(float * s, const float * sums, bool add);
void tq1_25_decode_avxvnni(tq1_25_rows x, tq1_25_decoded * w);
void tq1_25_decode_avx512vnni(tq1_25_rows x, tq1_25_decoded * w);
void tq1_25_gemm_avxvnni(int64_t nb, int nc, float * s, const tq1_25_decoded * w, const int8_t * panel);
void tq1_25_gemm_avx512vnni(int64_t nb, int nc, float * s, const tq1_25_decoded * w, const int8_t * panel);
#endif

#if defined(__aarch64__) && !defined(__AARCH64EB__)
#    define TQ1_25_ARM // 64-bit, little-endian; GCC or Clang: MSVC has another name for it
// Compilers that know these in one function of a build that lacks them; older ones of Clang do not.
#    if defined(__ARM_FEATURE_DOTPROD) || (defined(__clang__) ? __clang_major__ >= 16 : __GNUC__ >= 8)
#        define TQ1_25_DOTPROD
#    endif
#    if defined(TQ1_25_DOTPROD) && (defined(__ARM_FEATURE_MATMUL_INT8) || (defined(__clang__) ? __clang_major__ >= 16 : __GNUC__ >= 10))
#        define TQ1_25_I8MM
#    endif
void tq1_25_vec_dot_neon(int64_t n, float * s, const block_tq1_25 * x, const tq1_25_q8_0 * y);
void tq1_25_vec_dot_dotprod(int64_t n, float * s, const block_tq1_25 * x, const tq1_25_q8_0 * y);
void stq1_0_vec_dot_neon(int64_t n, float * s, const block_stq1_0 * x, const tq1_25_q8_0 * y);
void stq1_0_vec_dot_dotprod(int64_t n, float * s, const block_stq1_0 * x, const tq1_25_q8_0 * y);
void tq1_25_table_neon(int64_t nb, const tq1_25_q8_0 * y, int8_t * table, int64_t table_stride, float * d, int64_t d_stride);
void tq1_25_gemv_neon(int64_t n, float * s, const void * x, const int8_t * table, const float * d);
void stq1_0_gemv_neon(int64_t n, float * s, const void * x, const int8_t * table, const float * d);
void tq1_25_expand_neon(const tq1_25_rows x[2], tq1_25_codes * codes);
void tq1_25_lookup_neon(const tq1_25_codes * codes, int nc, const int8_t * table, const float * d, float * sums);
void tq1_25_store_neon(float * s, const float * sums, bool add);
void tq1_25_decode_dotprod(tq1_25_rows x, tq1_25_decoded * w);
void tq1_25_decode_i8mm(tq1_25_rows x, tq1_25_decoded * w);
void tq1_25_gemm_dotprod(int64_t nb, int nc, float * s, const tq1_25_decoded * w, const int8_t * panel);
void tq1_25_gemm_i8mm(int64_t nb, int nc, float * s, const tq1_25_decoded * w, const int8_t * panel);
#endif

// In the shape of ggml's table: the best instruction set's; one row (nrc = 1).
void ggml_vec_dot_tq1_25_q8_0(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc);
void ggml_vec_dot_stq1_0_q8_0(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc);

// Blocks of rows to tiles, as many bytes; x and y do not overlap.
void tq1_25_repack(enum tq1_25_kind kind, int64_t rows, int64_t n, const void * x, void * y);

// n activations in the order of STQ1_0's groups; x and y do not overlap.
void stq1_0_order(const float * x, float * y, int64_t n);

// What follows works on tile rows begin .. end - 1 of a repacked matrix x, of which there are (rows + 63) / 64, and on
// vectors of n Q8_0 activations. Threads share the work by ranges; each part of a result is written by one.

// The tables of a vector, aligned to 64 bytes: their bytes, and those of activations begin .. end - 1, multiples of 128.
int64_t tq1_25_table_size(const struct tq1_25_isa * isa, int64_t n);
void tq1_25_make_table(const struct tq1_25_isa * isa, int64_t n, int64_t begin, int64_t end, const tq1_25_q8_0 * y, void * table);

// s[c][row] for columns c < nc, from their activations y[c] and tables[c].
void tq1_25_mul_tables(const struct tq1_25_isa * isa, enum tq1_25_kind kind, int64_t rows, int64_t n, const void * x, int64_t begin, int64_t end,
                       int nc, const tq1_25_q8_0 * const * y, void * const * tables, float * const * s);

// nc columns are spread over groups of at most TQ1_25_CODE_COLUMNS, evenly but for pairs: the least number of groups, and the
// first column of one of them.
static inline int64_t tq1_25_code_groups(int64_t nc) { return (nc + TQ1_25_CODE_COLUMNS - 1) / TQ1_25_CODE_COLUMNS; }
static inline int64_t tq1_25_first_of_group(int64_t nc, int64_t groups, int64_t group) {
    const int64_t first = (nc * group / groups + 1) / 2 * 2;
    return first < nc ? first : nc;
}

struct tq1_25_code_scratch { // of a thread; aligned to 64 bytes
    int8_t       tables[TQ1_25_CODE_PAIRS * TQ1_25_TABLE];
    float        d[TQ1_25_CODE_PAIRS * (QK_TQ1_25 / TQ1_25_QK8_0)];
    float        sums[TQ1_25_CODE_COLUMNS * 2 * TQ1_25_TILE];
    float        rows[TQ1_25_TILE];
    tq1_25_codes codes;
    stq1_0_tile  tile; // of the rows that are left over, of either type
};

// s[c][row] for columns c < nc, 0 < nc <= TQ1_25_CODE_COLUMNS, from their activations y[c].
void tq1_25_mul_codes(const struct tq1_25_isa * isa, enum tq1_25_kind kind, int64_t rows, int64_t n, const void * x, int64_t begin, int64_t end,
                      int nc, const tq1_25_q8_0 * const * y, float * const * s, struct tq1_25_code_scratch * scratch);

// nc columns are spread over as few panels as can be, evenly, on ARM but for pairs: the first column of a panel, in 0 .. nc.
static inline int64_t tq1_25_panels(int64_t nc) { return (nc + TQ1_25_COLUMNS - 1) / TQ1_25_COLUMNS; }
static inline int64_t tq1_25_first_column(int64_t nc, int64_t panel) {
#ifdef TQ1_25_ARM // five columns take as many instructions there as six
    return tq1_25_first_of_group(nc, tq1_25_panels(nc), panel);
#else
    return nc * panel / tq1_25_panels(nc);
#endif
}

// A panel of nc columns, nc <= TQ1_25_COLUMNS, aligned to 4 bytes: its bytes, and those of activations begin .. end - 1, multiples of 32.
int64_t tq1_25_panel_size(int64_t n, int64_t nc);
void tq1_25_make_panel(int64_t begin, int64_t end, int nc, const tq1_25_q8_0 * const * y, void * panel);

#define TQ1_25_DEPTH 16 // blocks of a row that are decoded at once, for all columns: 132 KB
TQ1_25_ASSERT(TQ1_25_DEPTH % 2 == 0, "both halves of a block of STQ1_0 are decoded from one tile");

struct tq1_25_panel_scratch { // of a thread; aligned to 64 bytes
    tq1_25_decoded decoded[TQ1_25_DEPTH];
    stq1_0_tile    tile; // of the rows that are left over, of either type
    float          sums[TQ1_25_COLUMNS][TQ1_25_TILE];
};

// s[c][row] for the columns c of panels first .. last - 1, of all nc columns' panels, which follow one another.
void tq1_25_mul_panels(const struct tq1_25_isa * isa, enum tq1_25_kind kind, int64_t rows, int64_t n, const void * x, int64_t begin, int64_t end,
                       int64_t nc, int64_t first, int64_t last, const void * panels, float * const * s, struct tq1_25_panel_scratch * scratch);

// ---- shared by the above ----

// The lanes of the 16 slots with a positive sign (format.md, "The block"): slot = zero lane << 2 | signs of the others.
#define TQ1_25_LANE0 { 0, 0, 0, 0,  1, 1, 1, 1,  1, 1, 1, 1,  1, 1, 1, 1 }
#define TQ1_25_LANE1 { 1, 1, 1, 1,  0, 0, 0, 0,  1,-1, 1,-1,  1,-1, 1,-1 }
#define TQ1_25_LANE2 { 1,-1, 1,-1,  1,-1, 1,-1,  0, 0, 0, 0,  1, 1,-1,-1 }
#define TQ1_25_LANE3 { 1, 1,-1,-1,  1, 1,-1,-1,  1, 1,-1,-1,  0, 0, 0, 0 }

static inline int tq1_25_slot(const block_tq1_25 * x, int g) {
    return x->qs[4 * (g / 8) + g % 4] >> (g % 8 < 4 ? 0 : 4) & 15;
}

static inline int tq1_25_negative(const block_tq1_25 * x, int g) {
    return x->sign[g / 8] >> (g % 8) & 1;
}

static inline int stq1_0_slot(const block_stq1_0 * x, int g) {
    return x->qs[g / 2] >> 4 * (g % 2) & 15;
}

static inline int stq1_0_negative(const block_stq1_0 * x, int g) {
    return x->sign[g / 8] >> (g % 8) & 1;
}

// fp16 to float, exact, by integer and float operations that any compiler has.
static inline float tq1_25_fp16_to_float(uint16_t h) {
    union { uint32_t u; float f; } out, magic = { (254 - 15) << 23 };
    const uint32_t sign = (uint32_t) (h & 0x8000) << 16;
    out.u = (uint32_t) (h & 0x7fff) << 13;
    out.f *= magic.f; // moves the exponent's bias; also right for subnormals
    if ((h & 0x7c00) == 0x7c00) {
        out.u |= 0xffu << 23;
    }
    out.u |= sign;
    return out.f;
}

// Scales of a tile to those of its rows.
void tq1_25_decode_scales(const uint16_t * d, tq1_25_decoded * w);

// Both types' entries in ggml's tables of types, in ggml.c and ggml-cpu.c.
#define GGML_TRAITS_3_4_SPARSE \
    GGML_TRAITS_ENTRY(GGML_TYPE_TQ1_25, "tq1_25", QK_TQ1_25, block_tq1_25, dequantize_row_tq1_25, quantize_row_tq1_25_ref) \
    GGML_TRAITS_ENTRY(GGML_TYPE_STQ1_0, "stq1_0", QK_STQ1_0, block_stq1_0, dequantize_row_stq1_0, quantize_row_stq1_0_ref)
#define GGML_TRAITS_ENTRY(id, name, weights, block, dequantize, quantize) \
    [id] = { .type_name = name, .blck_size = weights, .type_size = sizeof(block), .is_quantized = true, .to_float = dequantize, \
             .from_float_ref = quantize },
#define GGML_CPU_TRAITS_3_4_SPARSE \
    GGML_CPU_TRAITS_ENTRY(GGML_TYPE_TQ1_25, quantize_row_tq1_25_ref, ggml_vec_dot_tq1_25_q8_0) \
    GGML_CPU_TRAITS_ENTRY(GGML_TYPE_STQ1_0, quantize_row_stq1_0_ref, ggml_vec_dot_stq1_0_q8_0)
#define GGML_CPU_TRAITS_ENTRY(id, quantize, dot) \
    [id] = { .from_float = quantize, .vec_dot = dot, .vec_dot_type = GGML_TYPE_Q8_0, .nrows = 1 },

#ifdef __cplusplus
}
#endif

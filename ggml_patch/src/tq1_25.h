// TQ1_25 packs 128 3:4 sparse ternary weights into 22 bytes, TQ1_25_64 packs 64 into 12, STQ1_0 packs 256 into 42. This header defines
// their blocks and codecs.
//
// llama.cpp and the Python bindings compile the same files. They take plain pointers and know nothing of ggml beyond the layout of
// a Q8_0 block. Lengths count weights and are multiples of the type's block. Pointers need the alignment of their type: two bytes for
// blocks.

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
#    define TQ1_25_ASSERT static_assert
extern "C" {
#else
#    define TQ1_25_ASSERT _Static_assert
#endif

// ---- format ----

#define TQ1_25_GROUP 4 // weights in a group; exactly one of them is 0

#define TQ1_25_TYPE_ID 125 // GGML_TYPE_TQ1_25 and LLAMA_FTYPE_MOSTLY_TQ1_25
#define QK_TQ1_25 128      // weights in a block
#define TQ1_25_GROUPS (QK_TQ1_25 / TQ1_25_GROUP)

// 1.375 bits per weight. A group is four consecutive weights.
typedef struct {
    uint8_t qs[TQ1_25_GROUPS / 2];   // slots: group g is in byte 4*(g/8) + g%4, in the low nibble if g%8 < 4, else in the high one
    uint8_t sign[TQ1_25_GROUPS / 8]; // group g is bit g%8 of byte g/8
    uint16_t d;                      // scale, fp16
} block_tq1_25;
TQ1_25_ASSERT(sizeof(block_tq1_25) == TQ1_25_GROUPS / 2 + TQ1_25_GROUPS / 8 + sizeof(uint16_t), "block_tq1_25 has padding");

#define TQ1_25_64_TYPE_ID 126 // GGML_TYPE_TQ1_25_64 and LLAMA_FTYPE_MOSTLY_TQ1_25_64
#define QK_TQ1_25_64 64       // weights in a block
#define TQ1_25_64_GROUPS (QK_TQ1_25_64 / TQ1_25_GROUP)

// 1.5 bits per weight, for rows that are not a multiple of 128 and for groups of 64. Two of these blocks with equal scales hold what one of TQ1_25 holds.
typedef struct {
    uint8_t qs[TQ1_25_64_GROUPS / 2];   // as in block_tq1_25
    uint8_t sign[TQ1_25_64_GROUPS / 8]; // as in block_tq1_25
    uint16_t d;                         // scale, fp16
} block_tq1_25_64;
TQ1_25_ASSERT(sizeof(block_tq1_25_64) == TQ1_25_64_GROUPS / 2 + TQ1_25_64_GROUPS / 8 + sizeof(uint16_t), "block_tq1_25_64 has padding");

#define STQ1_0_TYPE_ID 43 // GGML_TYPE_STQ1_0 and LLAMA_FTYPE_MOSTLY_STQ1_0
#define QK_STQ1_0 256     // weights in a block
#define STQ1_0_GROUPS (QK_STQ1_0 / TQ1_25_GROUP)
#define STQ1_0_LANE 16                            // distance between the weights of a group
#define STQ1_0_CHUNK (TQ1_25_GROUP * STQ1_0_LANE) // weights in 16 consecutive groups

// 1.3125 bits per weight, as in llama.cpp's pull request 22836. The weights of a group lie STQ1_0_LANE apart.
typedef struct {
    uint8_t qs[STQ1_0_GROUPS / 2];   // slots: group g is in byte g/2, in the low nibble if g is even
    uint8_t sign[STQ1_0_GROUPS / 8]; // group g is bit g%8 of byte g/8
    uint16_t d;                      // scale, fp16
} block_stq1_0;
TQ1_25_ASSERT(sizeof(block_stq1_0) == STQ1_0_GROUPS / 2 + STQ1_0_GROUPS / 8 + sizeof(uint16_t), "block_stq1_0 has padding");

// The weight in lane 0 of group g.
#define STQ1_0_FIRST(g) ((g) / STQ1_0_LANE * STQ1_0_CHUNK + (g) % STQ1_0_LANE)

// The weights of a group by lane and slot, for a positive sign. slot = zero lane << 2 | the signs of the
// third and second non-zero weights, relative to the first.
// clang-format off
static const int8_t tq1_25_lanes[TQ1_25_GROUP][16] = {
    { 0, 0, 0, 0,  1, 1, 1, 1,  1, 1, 1, 1,  1, 1, 1, 1 },
    { 1, 1, 1, 1,  0, 0, 0, 0,  1,-1, 1,-1,  1,-1, 1,-1 },
    { 1,-1, 1,-1,  1,-1, 1,-1,  0, 0, 0, 0,  1, 1,-1,-1 },
    { 1, 1,-1,-1,  1, 1,-1,-1,  1, 1,-1,-1,  0, 0, 0, 0 },
};
// clang-format on

// The slot of group g in a block's qs, of TQ1_25 and TQ1_25_64 or of STQ1_0, and whether its bit in `sign` is set, in any of them.
static inline int tq1_25_slot(const uint8_t * qs, int g) { return qs[4 * (g / 8) + g % 4] >> (g % 8 < 4 ? 0 : 4) & 15; }
static inline int stq1_0_slot(const uint8_t * qs, int g) { return qs[g / 2] >> 4 * (g % 2) & 15; }
static inline int tq1_25_negative(const uint8_t * sign, int g) { return sign[g / 8] >> (g % 8) & 1; }

#define TQ1_25_QK8_0 32 // activations in a Q8_0 block

// ggml's block_q8_0
typedef struct {
    uint16_t d; // scale, fp16
    int8_t qs[TQ1_25_QK8_0];
} tq1_25_q8_0;
TQ1_25_ASSERT(sizeof(tq1_25_q8_0) == sizeof(uint16_t) + TQ1_25_QK8_0, "tq1_25_q8_0 has padding");

// ---- codec (tq1_25.c) ----

enum tq1_25_status {
    TQ1_25_OK = 0,
    TQ1_25_NOT_FINITE = 1, // a weight is NaN or infinite
    TQ1_25_OVERFLOW = 2, // a block's mean magnitude rounds to infinity in fp16
};

// For each type, by the prefix of its names:
//
// *_quantize: quantizes n weights with Sparse-AbsMean. Returns the status of the first block that the type cannot hold and stores its
// index in *bad (bad may be NULL). Such a block gets a NaN as its scale, which llama.cpp's own check of tensor data refuses.
//
// *_quantize_weighted: minimizes the squared error weighted by importance instead. w holds the importance of each of the n weights.
//
// *_dequantize: decodes blocks to n weights. Any bytes decode.
//
// *_validate: returns whether the scales of all nb blocks are finite and not negative. If not, reports the first bad one on stderr.
//
// The others: the same with the signatures of ggml's tables.
TQ1_25_API enum tq1_25_status tq1_25_quantize(const float * x, block_tq1_25 * y, int64_t n, int64_t * bad);
TQ1_25_API enum tq1_25_status tq1_25_quantize_weighted(const float * x, const float * w, block_tq1_25 * y, int64_t n, int64_t * bad);
TQ1_25_API void tq1_25_dequantize(const block_tq1_25 * x, float * y, int64_t n);
TQ1_25_API bool tq1_25_validate(const void * x, size_t nb);
TQ1_25_API void quantize_row_tq1_25_ref(const float * x, void * y, int64_t n);
TQ1_25_API void dequantize_row_tq1_25(const void * x, float * y, int64_t n);
TQ1_25_API size_t quantize_tq1_25(const float * x, void * y, int64_t nrows, int64_t n_per_row, const float * imatrix);

TQ1_25_API enum tq1_25_status tq1_25_64_quantize(const float * x, block_tq1_25_64 * y, int64_t n, int64_t * bad);
TQ1_25_API enum tq1_25_status tq1_25_64_quantize_weighted(const float * x, const float * w, block_tq1_25_64 * y, int64_t n, int64_t * bad);
TQ1_25_API void tq1_25_64_dequantize(const block_tq1_25_64 * x, float * y, int64_t n);
TQ1_25_API bool tq1_25_64_validate(const void * x, size_t nb);
TQ1_25_API void quantize_row_tq1_25_64_ref(const float * x, void * y, int64_t n);
TQ1_25_API void dequantize_row_tq1_25_64(const void * x, float * y, int64_t n);
TQ1_25_API size_t quantize_tq1_25_64(const float * x, void * y, int64_t nrows, int64_t n_per_row, const float * imatrix);

TQ1_25_API enum tq1_25_status stq1_0_quantize(const float * x, block_stq1_0 * y, int64_t n, int64_t * bad);
TQ1_25_API enum tq1_25_status stq1_0_quantize_weighted(const float * x, const float * w, block_stq1_0 * y, int64_t n, int64_t * bad);
TQ1_25_API void stq1_0_dequantize(const block_stq1_0 * x, float * y, int64_t n);
TQ1_25_API bool stq1_0_validate(const void * x, size_t nb);
TQ1_25_API void quantize_row_stq1_0_ref(const float * x, void * y, int64_t n);
TQ1_25_API void dequantize_row_stq1_0(const void * x, float * y, int64_t n);
TQ1_25_API size_t quantize_stq1_0(const float * x, void * y, int64_t nrows, int64_t n_per_row, const float * imatrix);

// Quantizes n activations, a multiple of 32, to Q8_0 with scale max|x| / 127. Halves round away from zero, as in ggml's reference.
TQ1_25_API void tq1_25_quantize_q8_0(const float * x, tq1_25_q8_0 * y, int64_t n);

// Tells the system that these bytes of a mapped file are not needed for now. They leave this process, stay in the page cache and can
// still be read. Only for bytes of a file.
TQ1_25_API void tq1_25_release(const void * x, size_t size);

// Asks for large pages, before anything is in this memory. With fewer TLB misses repacked weights are read 6 % faster, and a long context's
// keys and values, whose rows lie far apart, up to 47 % (Zen 4, 2 threads).
TQ1_25_API void tq1_25_ask_for_large_pages(void * x, size_t size);

#ifdef __cplusplus
}
#endif

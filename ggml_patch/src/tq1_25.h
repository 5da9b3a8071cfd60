// TQ1_25: 3:4 sparse ternary weights, 128 in 22 bytes. The block, its codec and its dot products.
//
// These files are compiled by llama.cpp's build and by the Python bindings alike. They take plain pointers and know
// of ggml no more than the layout of a Q8_0 block. Lengths are in weights and are multiples of 128; pointers are
// aligned as their types are, to two bytes for blocks.

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

// n activations, n a multiple of 32, to Q8_0: scale max|x| / 127, halves away from zero; the bytes of ggml's reference.
TQ1_25_API void tq1_25_quantize_q8_0(const float * x, tq1_25_q8_0 * y, int64_t n);

// The same in the shapes of ggml's tables.
TQ1_25_API void   quantize_row_tq1_25_ref(const float * x, void * y, int64_t n);
TQ1_25_API void   dequantize_row_tq1_25(const void * x, float * y, int64_t n);
TQ1_25_API size_t quantize_tq1_25(const float * x, void * y, int64_t nrows, int64_t n_per_row, const float * imatrix);

// ---- dot products (tq1_25-dot.c and a file an instruction set) ----

// *s = sum over blocks i of d_w[i] * sum over j of d_y[4i+j] * (integer sum of the 32 products), n weights
typedef void (*tq1_25_vec_dot_t)(int64_t n, float * s, const block_tq1_25 * x, const tq1_25_q8_0 * y);

struct tq1_25_isa {
    const char *     name;
    tq1_25_vec_dot_t vec_dot;
    int (*supported)(void); // by this CPU; NULL: everywhere
};

// Those compiled in, the best first; the last is "scalar". Ends with a NULL name.
extern const struct tq1_25_isa tq1_25_isas[];

// The best that this CPU has, or the one that SHERRY_ISA in the environment names; chosen once. A name that is not
// there or that this CPU lacks ends the process with a message.
const struct tq1_25_isa * tq1_25_best_isa(void);

void tq1_25_vec_dot_scalar(int64_t n, float * s, const block_tq1_25 * x, const tq1_25_q8_0 * y);
#if defined(__x86_64__) || defined(_M_X64)
void tq1_25_vec_dot_avx2(int64_t n, float * s, const block_tq1_25 * x, const tq1_25_q8_0 * y);
void tq1_25_vec_dot_avx512(int64_t n, float * s, const block_tq1_25 * x, const tq1_25_q8_0 * y);
void tq1_25_vec_dot_avx512vnni(int64_t n, float * s, const block_tq1_25 * x, const tq1_25_q8_0 * y);
#endif

// In the shape of ggml's table: the best instruction set's; one row (nrc = 1).
void ggml_vec_dot_tq1_25_q8_0(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc);

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

#ifdef __cplusplus
}
#endif

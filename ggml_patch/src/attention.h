// Attention with a running softmax, ggml's FLASH_ATTN_EXT, over keys and values in F16, BF16 or Q8_0. docs/kernels.md explains it.

#pragma once

#include "tq1_25.h"

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SHERRY_ATTENTION_KEYS 64      // keys at a time
#define SHERRY_ATTENTION_PANEL 16     // rows that share each load of a key, and values of a row that share each load of a probability
#define SHERRY_ATTENTION_MAX_SIZE 256 // of a head

enum sherry_attention_type {
    SHERRY_ATTENTION_F16,
    SHERRY_ATTENTION_BF16,
    SHERRY_ATTENTION_Q8_0,
};

// The operands. Strides are in bytes, from one token (or key), head and stream to the next; a row's elements are adjacent.
struct sherry_attention {
    const char * q;      // float [streams][heads][tokens][k_size]
    const char * k;      // [kv_streams][kv_heads][keys][k_size]
    const char * v;      // [kv_streams][kv_heads][keys][v_size]
    const char * mask;   // fp16 [mask_streams][mask_heads][tokens][keys], added to the scores; NULL: none
    const float * sinks; // [heads], each one more score, of a value 0; NULL: none
    char * dst;          // float [streams][tokens][heads][v_size], dst_stride bytes per row
    int k_type, v_type;  // enum sherry_attention_type
    int64_t k_size, v_size;
    int64_t tokens, keys, heads, kv_heads, streams, kv_streams, mask_heads, mask_streams;
    int64_t q_stride[3], k_stride[3], v_stride[3], mask_stride[3], dst_stride;
    float scale;    // of q times k
    float max_bias; // of ALiBi; 0: none
    float softcap;  // scores become softcap * tanh(score / softcap); 0: none
};

// The kernels of an instruction set.
struct sherry_attention_kernels {
    // s[keys][rows] = q[rows][size] times k, for rows of 1, 2 or 4. Writes whole vectors: s has room for 16 floats more.
    void (*scores)(int type, int rows, int64_t keys, int64_t size, const float * q, const char * k, int64_t stride, float * s);
    // Turns scores, plus a mask of the same layout or NULL, into exp(score - m), 0 where the mask is -infinity, for rows of 1, 2, 4 or SHERRY_ATTENTION_PANEL;
    // keys * rows is a multiple of 16. Updates the rows' maxima m and sums; factor = exp(m before - m).
    void (*softmax)(int rows, int64_t keys, float * s, const float * mask, float softcap, float * m, float * sum, float * factor);
    // o[rows][size] = factor[rows] * o + s times v, for rows of 1, 2 or 4; factor NULL: 1.
    void (*values)(int type, int rows, int64_t keys, int64_t size, const float * s, const char * v, int64_t stride, const float * factor,
                   float * o);
    // Tiles: y[size / PANEL][KEYS][PANEL] = x[keys][size] as floats.
    void (*widen)(int type, int64_t keys, int64_t size, const char * x, int64_t stride, float * y);
    // s[keys][PANEL] = q[size][PANEL] times widened k, for an even number of keys.
    void (*tile_scores)(int64_t keys, int64_t size, const float * q, const float * k, float * s);
    // o[PANEL][size] = factor[PANEL] * o + s[keys][PANEL] times widened v; factor NULL: 1.
    void (*tile_values)(int64_t keys, int64_t size, const float * s, const float * v, const float * factor, float * o);
};

// How threads share the work. Many rows (of queries) per head of keys are multiplied in tiles, items that threads take one by one. Few
// rows are multiplied straight from the cache; each thread takes a share of the heads and, if heads are fewer than threads, of the keys.
struct sherry_attention_plan {
    bool tiles;
    int threads;
    int64_t scratch;    // floats per thread
    int64_t rows;       // tiles: rows of an item, a multiple of SHERRY_ATTENTION_PANEL
    int64_t items;      // tiles
    int64_t head_parts; // direct: shares of the pairs of stream and head of keys; head_parts * key_parts = threads
    int64_t key_parts;  // direct: shares of the keys
    int64_t at_once;    // direct: pairs of a thread per round
    int64_t rounds;     // direct
};

// Plans for this many threads, with `scratch` bytes for each, a multiple of 64. False if these operands are not for this code: head sizes
// that are not a multiple of 16 (of 32 for Q8_0) or above SHERRY_ATTENTION_MAX_SIZE, empty axes, or too little scratch.
bool sherry_attention_make_plan(const struct sherry_attention * a, int threads, int64_t scratch, struct sherry_attention_plan * plan);

// Tiles: one item. Items write different rows of dst. `scratch` is the thread's, aligned to 64 bytes.
void sherry_attention_tile(const struct sherry_attention_kernels * kernels, const struct sherry_attention * a,
                           const struct sherry_attention_plan * plan, int64_t item, float * scratch);

// Direct: a thread's part of a round. `scratch` is that of all threads. With several key_parts all threads must meet, join, and meet
// again before the next round.
void sherry_attention_part(const struct sherry_attention_kernels * kernels, const struct sherry_attention * a,
                           const struct sherry_attention_plan * plan, int64_t round, int thread, float * scratch);
void sherry_attention_join(const struct sherry_attention * a, const struct sherry_attention_plan * plan, int64_t round, int thread,
                           float * scratch);

#ifdef __cplusplus
}
#endif

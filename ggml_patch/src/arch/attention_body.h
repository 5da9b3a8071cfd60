// The bodies of the attention kernels, for vectors of any length. An instruction set's file defines, before it includes this one:
//
//   TARGET_ATTENTION   the functions' attribute
//   F, LANES, SUMS     a vector of LANES floats; how many sums there are registers for, besides the operands, a multiple of LANES
//   f_set, f_load, f_store, f_add, f_sub, f_mul, f_div, f_fma(a, b, c) = a * b + c, f_abs, f_copysign(magnitude, sign)
//   f_max(a, b)        b if one of them is not a number
//   f_scale_exp(p, z)  p * 2 ^ (the low bits of z's mantissa)
//   f_zero_below(x, limit, v)   0 where x < limit, else v
//   load_f16(p), load_bf16(p), load_q8(p)    LANES values as floats; of Q8_0 unscaled
//   f_set_f16(p)       an fp16 in all lanes
//   reduce(v, to)      to[i] = the sum of v[i], for i < LANES

#include "../attention.h"

enum { PANEL = SHERRY_ATTENTION_PANEL, VECTORS = PANEL / LANES };

// ---- exp and tanh ----

// Relative error below 4e-9 from the polynomial, plus rounding: at most 2 units in the last place. 0 for x < -87, where exp is 1.6e-38.
TARGET_ATTENTION INLINE F exp_of(F x) {
    // x = n * log(2) + r. Adding 1.5 * 2^23 rounds to an integer, which the mantissa's low bits then hold. log(2) is split in two, the
    // first part with few enough bits that n times it is exact.
    const F magic = f_set(12582912.0f), z = f_fma(x, f_set(0x1.715476p+0f), magic), n = f_sub(z, magic);
    const F r = f_fma(n, f_set(0x1.05c61p-29f), f_fma(n, f_set(-0x1.62e43p-1f), x));
    // exp(r) = 1 + r + r^2 * p(r), a minimax fit for |r| <= log(2) / 2
    F p = f_fma(f_set(0x1.6a23cep-10f), r, f_set(0x1.123a2p-7f));
    p = f_fma(p, r, f_set(0x1.5558f2p-5f));
    p = f_fma(p, r, f_set(0x1.555492p-3f));
    p = f_fma(p, r, f_set(0x1.fffffcp-2f));
    p = f_fma(f_mul(p, r), r, r);
    return f_zero_below(x, f_set(-87.0f), f_scale_exp(f_add(p, f_set(1.0f)), z));
}

TARGET_ATTENTION INLINE F tanh_of(F x) {
    const F t = exp_of(f_mul(f_abs(x), f_set(-2.0f)));
    return f_copysign(f_div(f_sub(f_set(1.0f), t), f_add(f_set(1.0f), t)), x);
}

// ---- rows of the cache ----

// `wide` vectors of values from `at` on. In Q8_0 they share a scale.
TARGET_ATTENTION INLINE void load_row(int type, int wide, const char * row, int64_t at, F * x) {
    const uint16_t * half = (const uint16_t *) row + at;
    const tq1_25_q8_0 * block = (const tq1_25_q8_0 *) row + at / TQ1_25_QK8_0;
    if (type == SHERRY_ATTENTION_Q8_0) {
        const F d = f_set_f16(&block->d);
        UNROLL for (int i = 0; i < wide; ++i) { x[i] = f_mul(load_q8(block->qs + at % TQ1_25_QK8_0 + i * LANES), d); }
    } else {
        UNROLL for (int i = 0; i < wide; ++i) {
            x[i] = type == SHERRY_ATTENTION_F16 ? load_f16(half + i * LANES) : load_bf16(half + i * LANES);
        }
    }
}

// The same row of the next keys, to the L2 cache. Rows of a head lie far apart, which the CPU's own prefetcher does not follow: this
// doubles the rate of reading from memory.
INLINE void prefetch_next(int type, const char * row, int64_t size, int64_t stride) {
    const int64_t bytes = type == SHERRY_ATTENTION_Q8_0 ? size / TQ1_25_QK8_0 * (int64_t) sizeof(tq1_25_q8_0) : size * 2;
    for (int64_t i = 0; i < bytes; i += 64) {
        PREFETCH(row + SHERRY_ATTENTION_KEYS * stride + i);
    }
}

// ---- few rows ----

TARGET_ATTENTION INLINE void scores_of(int type, int rows, int64_t keys, int64_t size, const float * q, const char * k, int64_t stride,
                                       float * s) {
    const int count = SUMS / rows; // keys at a time
    for (int64_t j = 0; j < keys; j += count, s += SUMS) {
        const char * row[SUMS];
        F sum[SUMS];
        UNROLL for (int i = 0; i < count; ++i) {
            row[i] = k + (j + i < keys ? j + i : keys - 1) * stride;
            prefetch_next(type, row[i], size, stride);
        }
        UNROLL for (int i = 0; i < SUMS; ++i) { sum[i] = f_set(0.0f); }
        for (int64_t at = 0; at < size; at += PANEL) {
            UNROLL for (int i = 0; i < count; ++i) {
                F x[VECTORS];
                load_row(type, VECTORS, row[i], at, x);
                UNROLL for (int k = 0; k < VECTORS; ++k) {
                    UNROLL for (int r = 0; r < rows; ++r) {
                        sum[i * rows + r] = f_fma(x[k], f_load(q + r * size + at + k * LANES), sum[i * rows + r]);
                    }
                }
            }
        }
        UNROLL for (int i = 0; i < SUMS; i += LANES) { reduce(sum + i, s + i); }
    }
}

// `wide` vectors of the values at a time.
TARGET_ATTENTION INLINE void values_at(int type, int rows, int wide, int64_t keys, int64_t size, int64_t at, const float * s,
                                       const char * v, int64_t stride, const float * factor, float * o) {
    F sum[4 * 8];
    UNROLL for (int r = 0; r < rows; ++r) {
        const F f = f_set(factor ? factor[r] : 1.0f);
        UNROLL for (int i = 0; i < wide; ++i) { sum[r * wide + i] = f_mul(f_load(o + r * size + at + i * LANES), f); }
    }
    for (int64_t j = 0; j < keys; ++j) {
        F x[8];
        load_row(type, wide, v + j * stride, at, x);
        UNROLL for (int r = 0; r < rows; ++r) {
            const F p = f_set(s[j * rows + r]);
            UNROLL for (int i = 0; i < wide; ++i) { sum[r * wide + i] = f_fma(p, x[i], sum[r * wide + i]); }
        }
    }
    UNROLL for (int r = 0; r < rows; ++r) {
        UNROLL for (int i = 0; i < wide; ++i) { f_store(o + r * size + at + i * LANES, sum[r * wide + i]); }
    }
}

TARGET_ATTENTION INLINE void values_of(int type, int rows, int64_t keys, int64_t size, const float * s, const char * v, int64_t stride,
                                       const float * factor, float * o) {
    // A few keys at a time, since rows that are a power of two apart share few sets of the L1 cache.
    enum { FEW = 16, BOTH = 2 * PANEL };
    for (int64_t j = 0; j < keys; j += FEW) {
        const int64_t few = j + FEW < keys ? FEW : keys - j;
        for (int64_t i = j; i < j + few; ++i) {
            prefetch_next(type, v + i * stride, size, stride);
        }
        int64_t at = 0;
        if (rows * 2 * VECTORS <= 2 * SUMS / 2) { // enough registers for two panels
            for (; at + BOTH <= size; at += BOTH) {
                values_at(type, rows, 2 * VECTORS, few, size, at, s + j * rows, v + j * stride, stride, j == 0 ? factor : NULL, o);
            }
        }
        for (; at < size; at += PANEL) {
            values_at(type, rows, VECTORS, few, size, at, s + j * rows, v + j * stride, stride, j == 0 ? factor : NULL, o);
        }
    }
}

// A function for each type and number of rows, all constants in its loops.
#define FEW_ROWS(type, rows)                                                                                                        \
    TARGET_ATTENTION APART void scores_##type##_##rows(int64_t keys, int64_t size, const float * q, const char * k, int64_t stride, \
                                                       float * s) {                                                                 \
        scores_of(SHERRY_ATTENTION_##type, rows, keys, size, q, k, stride, s);                                                      \
    }                                                                                                                               \
    TARGET_ATTENTION APART void values_##type##_##rows(int64_t keys, int64_t size, const float * s, const char * v, int64_t stride, \
                                                       const float * factor, float * o) {                                           \
        values_of(SHERRY_ATTENTION_##type, rows, keys, size, s, v, stride, factor, o);                                              \
    }
#define FEW_ROWS_OF(type) FEW_ROWS(type, 1) FEW_ROWS(type, 2) FEW_ROWS(type, 4)
#define BY_TYPE_AND_ROWS(what, ...)                                                                                              \
    switch (type) {                                                                                                              \
        case SHERRY_ATTENTION_F16:  (rows == 1 ? what##_F16_1 : rows == 2 ? what##_F16_2 : what##_F16_4)(__VA_ARGS__); break;    \
        case SHERRY_ATTENTION_BF16: (rows == 1 ? what##_BF16_1 : rows == 2 ? what##_BF16_2 : what##_BF16_4)(__VA_ARGS__); break; \
        default:                    (rows == 1 ? what##_Q8_0_1 : rows == 2 ? what##_Q8_0_2 : what##_Q8_0_4)(__VA_ARGS__); break; \
    }

FEW_ROWS_OF(F16)
FEW_ROWS_OF(BF16)
FEW_ROWS_OF(Q8_0)

static void scores(int type, int rows, int64_t keys, int64_t size, const float * q, const char * k, int64_t stride, float * s) {
    BY_TYPE_AND_ROWS(scores, keys, size, q, k, stride, s)
}

static void values(int type, int rows, int64_t keys, int64_t size, const float * s, const char * v, int64_t stride, const float * factor,
                   float * o){ BY_TYPE_AND_ROWS(values, keys, size, s, v, stride, factor, o) }

// ---- softmax ----

// Copies lanes so that each holds what its row has: with fewer rows than lanes, lane i is of row i % rows.
INLINE void spread(int rows, const float * from, float to[LANES]) {
    for (int i = 0; i < LANES; ++i) {
        to[i] = from[i % rows];
    }
}

// LANES rows, or LANES / rows keys of fewer rows: `count` vectors of s, `stride` floats apart.
TARGET_ATTENTION INLINE void softmax_of(int rows, int64_t count, int64_t stride, float * s, const float * mask, float softcap, float * m,
                                        float * sum, float * factor) {
    float lane[LANES], base[LANES];
    spread(rows, m, lane);
    const F before = f_load(lane);
    F most = before;
    for (int64_t i = 0; i < count; ++i) {
        F x = f_load(s + i * stride);
        if (softcap != 0.0f) {
            x = f_mul(tanh_of(x), f_set(softcap));
        }
        if (mask) {
            x = f_add(x, f_load(mask + i * stride));
        }
        if (mask || softcap != 0.0f) {
            f_store(s + i * stride, x);
        }
        most = f_max(x, most);
    }
    f_store(lane, most);
    for (int i = 0; i < rows; ++i) {
        for (int k = i + rows; k < LANES; k += rows) {
            lane[i] = lane[k] > lane[i] ? lane[k] : lane[i];
        }
        m[i] = lane[i];
        base[i] = lane[i] == -INFINITY ? 0.0f : lane[i]; // all is masked: exp(-inf - 0) is 0, exp(-inf - -inf) is not a number
    }
    spread(rows, base, lane);
    const F subtract = f_load(lane);
    f_store(lane, exp_of(f_sub(before, subtract)));
    F total = f_set(0.0f);
    for (int64_t i = 0; i < count; ++i) {
        const F p = exp_of(f_sub(f_load(s + i * stride), subtract));
        f_store(s + i * stride, p);
        total = f_add(total, p);
    }
    f_store(base, total);
    for (int i = 0; i < rows; ++i) {
        for (int k = i + rows; k < LANES; k += rows) {
            base[i] += base[k];
        }
        factor[i] = lane[i];
        sum[i] = sum[i] * lane[i] + base[i];
    }
}

TARGET_ATTENTION static void softmax(int rows, int64_t keys, float * s, const float * mask, float softcap, float * m, float * sum,
                                     float * factor) {
    if (rows < LANES) {
        softmax_of(rows, keys * rows / LANES, LANES, s, mask, softcap, m, sum, factor);
    } else {
        for (int r = 0; r < rows; r += LANES) {
            softmax_of(LANES, keys, rows, s + r, mask ? mask + r : NULL, softcap, m + r, sum + r, factor + r);
        }
    }
}

// ---- many rows ----

TARGET_ATTENTION INLINE void widen_of(int type, int64_t keys, int64_t size, const char * x, int64_t stride, float * y) {
    for (int64_t j = 0; j < keys; ++j, x += stride, y += PANEL) {
        prefetch_next(type, x, size, stride);
        for (int64_t at = 0; at < size; at += PANEL) {
            F wide[VECTORS];
            load_row(type, VECTORS, x, at, wide);
            UNROLL for (int i = 0; i < VECTORS; ++i) { f_store(y + at * SHERRY_ATTENTION_KEYS + i * LANES, wide[i]); }
        }
    }
}

TARGET_ATTENTION static void widen(int type, int64_t keys, int64_t size, const char * x, int64_t stride, float * y) {
    switch (type) { // constants
        case SHERRY_ATTENTION_F16:  widen_of(SHERRY_ATTENTION_F16, keys, size, x, stride, y); break;
        case SHERRY_ATTENTION_BF16: widen_of(SHERRY_ATTENTION_BF16, keys, size, x, stride, y); break;
        default:                    widen_of(SHERRY_ATTENTION_Q8_0, keys, size, x, stride, y); break;
    }
}

// sum[r][PANEL] += a[r * step] * b[PANEL]
TARGET_ATTENTION INLINE void add_products(int rows, int step, const float * a, const float * b, F * sum) {
    F x[VECTORS];
    UNROLL for (int i = 0; i < VECTORS; ++i) { x[i] = f_load(b + i * LANES); }
    UNROLL for (int r = 0; r < rows; ++r) {
        const F y = f_set(a[r * step]);
        UNROLL for (int i = 0; i < VECTORS; ++i) { sum[r * VECTORS + i] = f_fma(y, x[i], sum[r * VECTORS + i]); }
    }
}

// CALL(rows) for MOST_ROWS, then for the rest of an even number, with `i` as the first row.
#define BY_ROWS(count, CALL)                           \
    int64_t i = 0;                                     \
    for (; i + MOST_ROWS <= (count); i += MOST_ROWS) { \
        CALL(MOST_ROWS);                               \
    }                                                  \
    for (; i + 4 <= (count); i += 4) {                 \
        CALL(4);                                       \
    }                                                  \
    for (; i + 2 <= (count); i += 2) {                 \
        CALL(2);                                       \
    }

TARGET_ATTENTION INLINE void tile_scores_of(int keys, int64_t size, const float * q, const float * k, float * s) {
    F sum[PANEL * VECTORS];
    UNROLL for (int i = 0; i < keys * VECTORS; ++i) { sum[i] = f_set(0.0f); }
    for (int64_t at = 0; at < size; at += PANEL, k += PANEL * SHERRY_ATTENTION_KEYS) {
        for (int i = 0; i < PANEL; ++i, q += PANEL) {
            add_products(keys, PANEL, k + i, q, sum);
        }
    }
    UNROLL for (int i = 0; i < keys * VECTORS; ++i) { f_store(s + i * LANES, sum[i]); }
}

TARGET_ATTENTION static void tile_scores(int64_t keys, int64_t size, const float * q, const float * k, float * s){
#define SCORES(rows) tile_scores_of(rows, size, q, k + i * PANEL, s + i * PANEL)
    BY_ROWS(keys, SCORES)
#undef SCORES
}

TARGET_ATTENTION
    INLINE void tile_values_of(int rows, int64_t keys, int64_t size, const float * s, const float * v, const float * factor, float * o) {
    F sum[PANEL * VECTORS];
    UNROLL for (int r = 0; r < rows; ++r) {
        UNROLL for (int i = 0; i < VECTORS; ++i) { sum[r * VECTORS + i] = f_mul(f_load(o + r * size + i * LANES), f_set(factor[r])); }
    }
    for (int64_t j = 0; j < keys; ++j, s += PANEL, v += PANEL) {
        add_products(rows, 1, s, v, sum);
    }
    UNROLL for (int r = 0; r < rows; ++r) {
        UNROLL for (int i = 0; i < VECTORS; ++i) { f_store(o + r * size + i * LANES, sum[r * VECTORS + i]); }
    }
}

TARGET_ATTENTION static void tile_values(int64_t keys, int64_t size, const float * s, const float * v, const float * factor, float * o) {
    for (int64_t at = 0; at < size; at += PANEL, v += PANEL * SHERRY_ATTENTION_KEYS) {
#define VALUES(rows) tile_values_of(rows, keys, size, s + i, v, factor + i, o + i * size + at)
        BY_ROWS(PANEL, VALUES)
#undef VALUES
    }
}

#define ATTENTION_KERNELS(isa)                                       \
    const struct sherry_attention_kernels sherry_attention_##isa = { \
        scores, softmax, values, widen, tile_scores, tile_values,    \
    };

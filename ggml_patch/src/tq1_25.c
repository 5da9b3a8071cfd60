// The codecs of TQ1_25, TQ1_25_64 and STQ1_0 in plain C11. They give the same bytes as sherry_gguf/blocks.py.

#ifdef __linux__
#    define _DEFAULT_SOURCE // madvise
#    include <sys/mman.h>
#    include <unistd.h>
#endif

#include "internal.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

// ---- fp16 ----

#define FP16_NAN 0x7e00
#define FP16_INF 0x7c00

// Rounds a double >= 0 to the nearest fp16, ties to even. Going by way of float would round twice.
static uint16_t fp16_from_double(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof(bits));
    const int exponent = (int) (bits >> 52) - 1023; // there is no sign bit
    const uint64_t mantissa = (bits & ((1ull << 52) - 1)) | 1ull << 52;
    if (exponent >= 16) {
        return FP16_INF;
    }
    if (exponent < -25) {
        return 0; // less than half the smallest subnormal
    }
    // Subnormals are multiples of 2^-24; the last bit of a normal is 2^(exponent - 10).
    const int shift = exponent < -14 ? 52 - exponent - 24 : 42;
    const uint64_t kept = mantissa >> shift;
    const uint64_t rest = mantissa & ((1ull << shift) - 1);
    const uint64_t half = 1ull << (shift - 1);
    const uint64_t round = kept + (rest > half || (rest == half && (kept & 1)));
    // The leading bit of a normal adds one to the exponent field. So does a carry, up to infinity.
    return (uint16_t) (exponent < -14 ? round : ((uint64_t) (exponent + 14) << 10) + round);
}

// ---- quantize ----

// The functions below take a block's weights in the order of its groups. They are inlined with a constant number of groups.
enum { MOST_GROUPS = STQ1_0_GROUPS };

typedef struct {
    uint8_t slot[MOST_GROUPS];
    uint8_t sign[MOST_GROUPS / 8];
    uint16_t d;
} content; // of a block of any type

// Finds the zero lane of each group: the smallest magnitude, the lowest lane among equals. False if a weight is NaN or infinite.
INLINE bool choose_zeros(const float * x, int groups, uint8_t * zero) {
    uint32_t a[TQ1_25_GROUP * MOST_GROUPS]; // magnitudes, as bits, which floats >= 0 have in the same order
    memcpy(a, x, sizeof(*a) * TQ1_25_GROUP * (size_t) groups);
    uint32_t most = 0;
    for (int i = 0; i < TQ1_25_GROUP * groups; ++i) {
        a[i] &= 0x7fffffff;
        most = a[i] > most ? a[i] : most;
    }
    for (int g = 0; g < groups; ++g) {
        const uint32_t * m = a + TQ1_25_GROUP * g;
        // a tournament without branches, which would be mispredicted; the left one wins a tie
        const uint32_t r01 = m[1] < m[0], r23 = m[3] < m[2];
        const uint32_t m01 = m[1] < m[0] ? m[1] : m[0], m23 = m[3] < m[2] ? m[3] : m[2];
        const uint32_t right = m23 < m01;
        zero[g] = (uint8_t) (right << 1 | (r01 ^ ((r01 ^ r23) & (0u - right))));
    }
    return most < 0x7f800000;
}

INLINE void encode(const float * x, int groups, const uint8_t * zero, uint16_t d, content * y) {
    uint8_t sign[MOST_GROUPS];
    for (int g = 0; g < groups; ++g) {
        const float * w = x + TQ1_25_GROUP * g;
        const int z = zero[g];
        const int s0 = w[z == 0] < 0, s1 = w[1 + (z <= 1)] < 0, s2 = w[2 + (z <= 2)] < 0;
        y->slot[g] = (uint8_t) (z << 2 | (s2 ^ s0) << 1 | (s1 ^ s0));
        sign[g] = (uint8_t) (s0 << g % 8);
    }
    for (int i = 0; i < groups / 8; ++i) {
        const uint8_t * b = sign + 8 * i;
        y->sign[i] = b[0] | b[1] | b[2] | b[3] | b[4] | b[5] | b[6] | b[7];
    }
    y->d = d;
}

INLINE enum tq1_25_status quantize_plain(const float * x, int groups, content * y) {
    uint8_t zero[MOST_GROUPS];
    if (!choose_zeros(x, groups, zero)) {
        memset(y, 0, sizeof(*y));
        y->d = FP16_NAN;
        return TQ1_25_NOT_FINITE;
    }
    float kept[TQ1_25_GROUP * MOST_GROUPS];
    for (int i = 0; i < TQ1_25_GROUP * groups; ++i) {
        kept[i] = fabsf(x[i]);
    }
    for (int g = 0; g < groups; ++g) {
        kept[TQ1_25_GROUP * g + zero[g]] = 0.0f;
    }
    double sum = 0.0;
    for (int i = 0; i < TQ1_25_GROUP * groups; ++i) {
        sum += (double) kept[i];
    }
    const uint16_t d = fp16_from_double(sum / (groups * (TQ1_25_GROUP - 1)));
    encode(x, groups, zero, d == FP16_INF ? FP16_NAN : d, y);
    return d == FP16_INF ? TQ1_25_OVERFLOW : TQ1_25_OK;
}

// Minimizes sum w * (x - d*t)^2 over the scale d and the zeros in turn. Each is the best for the other, so the error only falls.
INLINE enum tq1_25_status quantize_groups(const float * x, const float * w, int groups, content * y) {
    enum { TURNS = 8 }; // most blocks settle after three
    if (!w) {
        return quantize_plain(x, groups, y);
    }
    float most = 0.0f;
    for (int i = 0; i < TQ1_25_GROUP * groups; ++i) {
        most = w[i] > most ? w[i] : most;
    }
    uint8_t zero[MOST_GROUPS];
    if (!choose_zeros(x, groups, zero) || !(most > 0.0f && most <= 3.0e38f)) {
        return quantize_plain(x, groups, y); // useless importance, or weights that are not finite
    }
    // Inputs that the importance matrix never saw still count a little. Their zeros would be arbitrary otherwise.
    const double least = 1e-6 * most;
    double d = 0.0;
    for (int turn = 0; turn < TURNS; ++turn) {
        double sum_wx = 0.0, sum_w = 0.0;
        for (int i = 0; i < TQ1_25_GROUP * groups; ++i) {
            if (i % TQ1_25_GROUP != zero[i / TQ1_25_GROUP]) {
                const double wi = w[i] > least ? w[i] : least; // also if w[i] is NaN
                sum_wx += wi * fabs((double) x[i]);
                sum_w += wi;
            }
        }
        d = sum_wx / sum_w;
        int moved = 0;
        for (int g = 0; g < groups; ++g) {
            double best = 0.0;
            int z = 0;
            for (int lane = 0; lane < TQ1_25_GROUP; ++lane) {
                const int i = TQ1_25_GROUP * g + lane;
                const double wi = w[i] > least ? w[i] : least;
                const double xi = fabs((double) x[i]);
                const double cost = wi * d * (2.0 * xi - d); // of a zero in this lane: w * (x^2 - (|x| - d)^2)
                if (lane == 0 || cost < best) {
                    best = cost;
                    z = lane;
                }
            }
            moved |= z != zero[g];
            zero[g] = (uint8_t) z;
        }
        if (!moved) {
            break;
        }
    }
    const uint16_t half = fp16_from_double(d);
    encode(x, groups, zero, half == FP16_INF ? FP16_NAN : half, y);
    return half == FP16_INF ? TQ1_25_OVERFLOW : TQ1_25_OK;
}

// TQ1_25 and TQ1_25_64: groups are consecutive weights.
INLINE enum tq1_25_status quantize_block(const float * x, const float * w, int groups, uint8_t * qs, uint8_t * sign, uint16_t * d) {
    content c;
    const enum tq1_25_status status = quantize_groups(x, w, groups, &c);
    for (int i = 0; i < groups / 2; ++i) {
        qs[i] = (uint8_t) (c.slot[8 * (i / 4) + i % 4] | c.slot[8 * (i / 4) + i % 4 + 4] << 4);
    }
    memcpy(sign, c.sign, (size_t) groups / 8);
    *d = c.d;
    return status;
}

static enum tq1_25_status quantize_tq1_25_block(const float * x, const float * w, block_tq1_25 * y) {
    return quantize_block(x, w, TQ1_25_GROUPS, y->qs, y->sign, &y->d);
}

static enum tq1_25_status quantize_tq1_25_64_block(const float * x, const float * w, block_tq1_25_64 * y) {
    return quantize_block(x, w, TQ1_25_64_GROUPS, y->qs, y->sign, &y->d);
}

static void by_groups(const float * x, float * y) {
    for (int g = 0; g < STQ1_0_GROUPS; ++g) {
        for (int lane = 0; lane < TQ1_25_GROUP; ++lane) {
            y[TQ1_25_GROUP * g + lane] = x[STQ1_0_FIRST(g) + STQ1_0_LANE * lane];
        }
    }
}

static enum tq1_25_status quantize_stq1_0_block(const float * x, const float * w, block_stq1_0 * y) {
    float grouped[QK_STQ1_0], weights[QK_STQ1_0];
    content c;
    by_groups(x, grouped);
    if (w) {
        by_groups(w, weights);
    }
    const enum tq1_25_status status = quantize_groups(grouped, w ? weights : NULL, STQ1_0_GROUPS, &c);
    for (int i = 0; i < STQ1_0_GROUPS / 2; ++i) {
        y->qs[i] = (uint8_t) (c.slot[2 * i] | c.slot[2 * i + 1] << 4);
    }
    memcpy(y->sign, c.sign, sizeof(y->sign));
    y->d = c.d;
    return status;
}

// ---- dequantize ----

INLINE void dequantize_block(const uint8_t * qs, const uint8_t * sign, uint16_t scale, int groups, float * y) {
    const float d = tq1_25_fp16_to_float(scale);
    for (int g = 0; g < groups; ++g) {
        const int slot = tq1_25_slot(qs, g), s = tq1_25_negative(sign, g) ? -1 : 1;
        for (int lane = 0; lane < TQ1_25_GROUP; ++lane) {
            *y++ = d * (float) (s * tq1_25_lanes[lane][slot]);
        }
    }
}

static void dequantize_tq1_25_block(const block_tq1_25 * x, float * y) { dequantize_block(x->qs, x->sign, x->d, TQ1_25_GROUPS, y); }

static void dequantize_tq1_25_64_block(const block_tq1_25_64 * x, float * y) {
    dequantize_block(x->qs, x->sign, x->d, TQ1_25_64_GROUPS, y);
}

static void dequantize_stq1_0_block(const block_stq1_0 * x, float * y) {
    const float d = tq1_25_fp16_to_float(x->d);
    for (int g = 0; g < STQ1_0_GROUPS; ++g) {
        const int slot = stq1_0_slot(x->qs, g), sign = tq1_25_negative(x->sign, g) ? -1 : 1;
        for (int lane = 0; lane < TQ1_25_GROUP; ++lane) {
            y[STQ1_0_FIRST(g) + STQ1_0_LANE * lane] = d * (float) (sign * tq1_25_lanes[lane][slot]);
        }
    }
}

// ---- validate ----

// d is the scale of the first block; blocks are `size` bytes apart.
static bool validate(const char * type, const uint16_t * d, size_t size, size_t nb) {
    for (size_t i = 0; i < nb; ++i) {
        const uint16_t di = *(const uint16_t *) ((const char *) d + i * size);
        if (di >= FP16_INF) { // infinite, NaN, or the sign bit
            fprintf(stderr, "%s: the scale of block %zu is %g, not a finite number >= 0\n", type, i, tq1_25_fp16_to_float(di));
            return false;
        }
    }
    return true;
}

// ---- activations ----

// Rounds to int8, halves away from zero as roundf does, but in a form that compilers vectorize. NaN becomes 0.
static inline int8_t to_int8(float x) {
    const float q = x > 127.0f ? 127.0f : x < -127.0f ? -127.0f : x == x ? x : 0.0f;
    const int whole = (int) q;
    const float rest = q - (float) whole; // exact
    return (int8_t) (whole + (rest >= 0.5f) - (rest <= -0.5f));
}

void tq1_25_quantize_q8_0(const float * x, tq1_25_q8_0 * y, int64_t n) {
    enum { ABREAST = 8 }; // maxima
    for (int64_t i = 0; i < n / TQ1_25_QK8_0; ++i, x += TQ1_25_QK8_0, ++y) {
        float most[ABREAST] = { 0.0f };
        for (int j = 0; j < TQ1_25_QK8_0; ++j) {
            const float magnitude = fabsf(x[j]);
            most[j % ABREAST] = magnitude > most[j % ABREAST] ? magnitude : most[j % ABREAST];
        }
        for (int k = 1; k < ABREAST; ++k) {
            most[0] = most[k] > most[0] ? most[k] : most[0];
        }
        const float d = most[0] / 127.0f;
        const float inverse = d ? 1.0f / d : 0.0f;
        y->d = fp16_from_double(d);
        for (int j = 0; j < TQ1_25_QK8_0; ++j) {
            y->qs[j] = to_int8(x[j] * inverse); // with a subnormal scale the product may exceed int8 or be NaN
        }
    }
}

// ---- rows of blocks ----

#define CODEC(name, QK)                                                                                                                   \
    enum tq1_25_status name##_quantize_weighted(const float * x, const float * w, block_##name * y, int64_t n, int64_t * bad) {           \
        enum tq1_25_status first = TQ1_25_OK;                                                                                             \
        for (int64_t i = 0; i < n / QK; ++i) {                                                                                            \
            const enum tq1_25_status status = quantize_##name##_block(x + i * QK, w ? w + i * QK : NULL, y + i);                          \
            if (status != TQ1_25_OK && first == TQ1_25_OK) {                                                                              \
                first = status;                                                                                                           \
                if (bad) {                                                                                                                \
                    *bad = i;                                                                                                             \
                }                                                                                                                         \
            }                                                                                                                             \
        }                                                                                                                                 \
        return first;                                                                                                                     \
    }                                                                                                                                     \
    enum tq1_25_status name##_quantize(const float * x, block_##name * y, int64_t n, int64_t * bad) {                                     \
        return name##_quantize_weighted(x, NULL, y, n, bad);                                                                              \
    }                                                                                                                                     \
    void name##_dequantize(const block_##name * x, float * y, int64_t n) {                                                                \
        for (int64_t i = 0; i < n / QK; ++i) {                                                                                            \
            dequantize_##name##_block(x + i, y + i * QK);                                                                                 \
        }                                                                                                                                 \
    }                                                                                                                                     \
    bool name##_validate(const void * x, size_t nb) { return validate(#name, &((const block_##name *) x)->d, sizeof(block_##name), nb); } \
    void quantize_row_##name##_ref(const float * x, void * y, int64_t n) {                                                                \
        assert(n % QK == 0);                                                                                                              \
        name##_quantize(x, (block_##name *) y, n, NULL);                                                                                  \
    }                                                                                                                                     \
    void dequantize_row_##name(const void * x, float * y, int64_t n) {                                                                    \
        assert(n % QK == 0);                                                                                                              \
        name##_dequantize((const block_##name *) x, y, n);                                                                                \
    }                                                                                                                                     \
    size_t quantize_##name(const float * x, void * y, int64_t nrows, int64_t n_per_row, const float * imatrix) {                          \
        assert(n_per_row % QK == 0);                                                                                                      \
        const int64_t blocks = n_per_row / QK;                                                                                            \
        for (int64_t row = 0; row < nrows; ++row) {                                                                                       \
            name##_quantize_weighted(x + row * n_per_row, imatrix, (block_##name *) y + row * blocks, n_per_row, NULL);                   \
        }                                                                                                                                 \
        return (size_t) (nrows * blocks) * sizeof(block_##name);                                                                          \
    }

CODEC(tq1_25, QK_TQ1_25)
CODEC(tq1_25_64, QK_TQ1_25_64)
CODEC(stq1_0, QK_STQ1_0)

// ---- memory ----

void tq1_25_release(const void * x, size_t size) {
#ifdef __linux__ // MADV_DONTNEED means less elsewhere, or something else
    const uintptr_t page = (uintptr_t) sysconf(_SC_PAGESIZE);
    const uintptr_t begin = ((uintptr_t) x + page - 1) / page * page, end = ((uintptr_t) x + size) / page * page;
    if (begin < end) {
        madvise((void *) begin, end - begin, MADV_DONTNEED); // advice, so failure does no harm
    }
#else
    (void) x;
    (void) size;
#endif
}

void tq1_25_ask_for_large_pages(void * x, size_t size) {
#ifdef __linux__
    const uintptr_t page = (uintptr_t) sysconf(_SC_PAGESIZE), begin = (uintptr_t) x / page * page;
    if (size >= 2 << 20) { // anything smaller holds no large page
        madvise((void *) begin, (uintptr_t) x + size - begin, MADV_HUGEPAGE); // may fail
    }
#else
    (void) x;
    (void) size;
#endif
}

// Attention: how threads share the work, the mask, ALiBi and sinks. The kernels of each instruction set do the arithmetic.

#include "attention.h"

#include "internal.h"

#include <math.h>

enum { KEYS = SHERRY_ATTENTION_KEYS, PANEL = SHERRY_ATTENTION_PANEL, MOST_TILE_ROWS = 64 };

// Tiles are faster from TILE_ROWS rows per head of keys, or from TILE_BLOCKS blocks of up to four. Measured on Zen 4: one token of 12 heads
// is faster directly, 16 rows are faster in a tile; of single rows (a head of keys for each query), four are faster directly.
enum { TILE_ROWS = 16, TILE_BLOCKS = 5 };

#define MASKED 0xfc00 // -infinity in fp16

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

// Queries per head of keys, and the rows that they take directly: three rows cost as much as four.
INLINE int64_t group_of(const struct sherry_attention * a) { return a->heads / a->kv_heads; }
INLINE int64_t padded_group(const struct sherry_attention * a) { return group_of(a) + (group_of(a) % 4 == 3); }

// ---- planning ----

static int64_t common_divisor(int64_t a, int64_t b) {
    while (b) {
        const int64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

// Floats of a tile's scratch: queries, results, maximum and sum of each row; keys, values, and a panel's scores and mask.
static int64_t tile_size(const struct sherry_attention * a, int64_t rows) {
    return rows * (a->k_size + a->v_size + 2) + KEYS * (a->k_size + a->v_size + 2 * PANEL);
}

// Floats per pair of stream and head of keys: queries, results, maximum and sum of each row.
static int64_t pair_size(const struct sherry_attention * a) {
    return round_up(a->tokens * padded_group(a) * (a->k_size + a->v_size + 2), PANEL);
}

// Floats for the scores and a mask of a chunk of keys.
enum { CHUNK_SIZE = 2 * 4 * KEYS + PANEL };

static bool size_fits(int type, int64_t size) {
    const int multiple = type == SHERRY_ATTENTION_Q8_0 ? TQ1_25_QK8_0 : PANEL;
    return size > 0 && size <= SHERRY_ATTENTION_MAX_SIZE && size % multiple == 0;
}

bool sherry_attention_make_plan(const struct sherry_attention * a, int threads, int64_t scratch, struct sherry_attention_plan * plan) {
    memset(plan, 0, sizeof(*plan));
    plan->threads = threads;
    plan->scratch = scratch / (int64_t) sizeof(float);
    const bool empty = a->streams < 1 || a->kv_streams < 1 || a->kv_heads < 1 || a->tokens < 1 || group_of(a) < 1;
    if (empty || !size_fits(a->k_type, a->k_size) || !size_fits(a->v_type, a->v_size)) {
        return false;
    }
    const int64_t pairs = a->streams * a->kv_heads, rows = a->tokens * group_of(a), padded = padded_group(a);
    const bool many = a->tokens * padded >= TILE_ROWS || a->tokens * ((padded + 3) / 4) >= TILE_BLOCKS;
    if (many && tile_size(a, PANEL) <= plan->scratch) {
        plan->rows = round_up(least(rows, MOST_TILE_ROWS), PANEL);
        while (plan->rows > PANEL && (tile_size(a, plan->rows) > plan->scratch || pairs * ((rows - 1) / plan->rows + 1) < 2 * threads)) {
            plan->rows -= PANEL;
        }
        plan->items = pairs * ((rows - 1) / plan->rows + 1);
        plan->tiles = true;
    }
    const int64_t head_parts = common_divisor(pairs, threads), at_once = (plan->scratch - CHUNK_SIZE) / pair_size(a);
    if ((!plan->tiles || plan->items < threads) && at_once > 0) {
        plan->tiles = false;
        plan->head_parts = head_parts;
        plan->key_parts = threads / head_parts;
        plan->at_once = at_once;
        plan->rounds = (pairs / head_parts - 1) / at_once + 1;
    }
    return plan->tiles || plan->rounds > 0;
}

// ---- masks ----

// The mask's row for a query, or NULL.
INLINE const uint16_t * mask_row(const struct sherry_attention * a, int64_t stream, int64_t head, int64_t token) {
    return a->mask ? (const uint16_t *) (a->mask + token * a->mask_stride[0] + head % a->mask_heads * a->mask_stride[1] +
                                         stream % a->mask_streams * a->mask_stride[2])
                   : NULL;
}

enum { SOME_SEEN = 1, SOME_BIASED = 2 }; // not all keys are masked; not all masks are zero

// What a row's mask does to keys begin .. begin + keys - 1: a set of the flags; without SOME_SEEN all of them are masked.
static int look(const uint16_t * mask, int64_t begin, int64_t keys) {
    if (!mask) {
        return SOME_SEEN;
    }
    uint16_t any = 0, other = 0;
    for (int64_t j = begin; j < begin + keys; ++j) {
        any = (uint16_t) (any | mask[j]);
        other = (uint16_t) (other | (mask[j] ^ MASKED));
    }
    return (other ? SOME_SEEN : 0) | (any ? SOME_BIASED : 0);
}

// Whether all rows mask key j.
INLINE bool is_masked(const float * mask, int rows, int64_t j) {
    int r = 0;
    while (r < rows && mask[j * rows + r] == -INFINITY) {
        ++r;
    }
    return r == rows;
}

// The next keys that some row sees: *begin .. the result - 1; *begin is `keys` if there are none. The values of keys that all rows mask are
// not touched: they may be another sequence's, and infinite.
static int64_t next_seen(const float * mask, int rows, int64_t keys, int64_t * begin) {
    if (!mask) {
        return keys;
    }
    while (*begin < keys && is_masked(mask, rows, *begin)) {
        ++*begin;
    }
    int64_t end = *begin;
    while (end < keys && !is_masked(mask, rows, end)) {
        ++end;
    }
    return end;
}

// ALiBi's factor of a head's mask.
static float slope_of(const struct sherry_attention * a, int64_t head) {
    if (a->max_bias <= 0.0f) {
        return 1.0f;
    }
    int64_t power = 1;
    while (2 * power <= a->heads) {
        power *= 2;
    }
    return head < power ? powf(powf(2.0f, -a->max_bias / (float) power), (float) (head + 1))
                        : powf(powf(2.0f, -a->max_bias / 2.0f / (float) power), (float) (2 * (head - power) + 1));
}

// Narrows *first .. *last - 1 to the keys that some row of these tokens sees.
static void seen_keys(const struct sherry_attention * a, int64_t stream, int64_t token, int64_t tokens, int64_t * first, int64_t * last) {
    *first = 0;
    *last = a->keys;
    if (!a->mask) {
        return;
    }
    int64_t begin = a->keys, end = 0;
    for (int64_t h = 0; h < a->mask_heads; ++h) {
        for (int64_t t = token; t < token + tokens; ++t) {
            const uint16_t * mask = mask_row(a, stream, h, t);
            int64_t j = 0, k = a->keys;
            while (j < begin && mask[j] == MASKED) {
                ++j;
            }
            while (k > end && mask[k - 1] == MASKED) {
                --k;
            }
            begin = least(begin, j);
            end = k > end ? k : end;
        }
    }
    *first = least(begin, end);
    *last = end;
}

// ---- results ----

// Adds the sink, divides by the sum and stores a row.
static void finish(const struct sherry_attention * a, int64_t stream, int64_t head, int64_t token, const float * o, float m, float sum) {
    float factor = 1.0f;
    if (a->sinks) {
        const float sink = a->sinks[head], most = sink > m ? sink : m;
        factor = m == -INFINITY ? 0.0f : expf(m - most);
        sum = sum * factor + (sink == -INFINITY ? 0.0f : expf(sink - most));
    }
    factor = sum == 0.0f ? 0.0f : factor / sum;
    float * to = (float *) (a->dst + ((stream * a->tokens + token) * a->heads + head) * a->dst_stride);
    for (int64_t i = 0; i < a->v_size; ++i) {
        to[i] = o[i] * factor;
    }
}

INLINE const float * query(const struct sherry_attention * a, int64_t stream, int64_t head, int64_t token) {
    return (const float *) (a->q + token * a->q_stride[0] + head * a->q_stride[1] + stream * a->q_stride[2]);
}

INLINE const char * keys_at(const struct sherry_attention * a, int64_t stream, int64_t head, int64_t key) {
    return a->k + key * a->k_stride[0] + head * a->k_stride[1] + stream / (a->streams / a->kv_streams) * a->k_stride[2];
}

INLINE const char * values_at(const struct sherry_attention * a, int64_t stream, int64_t head, int64_t key) {
    return a->v + key * a->v_stride[0] + head * a->v_stride[1] + stream / (a->streams / a->kv_streams) * a->v_stride[2];
}

// The factor that goes into the queries; softcap multiplies again after tanh.
INLINE float scale_of(const struct sherry_attention * a) { return a->softcap != 0.0f ? a->scale / a->softcap : a->scale; }

INLINE void fill(float * x, int64_t n, float value) {
    for (int64_t i = 0; i < n; ++i) {
        x[i] = value;
    }
}

// ---- few rows ----

// A pair's rows: [tokens][padded_group].
struct pair_rows {
    float *q, *o, *m, *sum;
};

static struct pair_rows rows_of_pair(const struct sherry_attention * a, float * scratch, int64_t i) {
    const int64_t rows = a->tokens * padded_group(a);
    struct pair_rows p;
    p.q = scratch + CHUNK_SIZE + i * pair_size(a);
    p.o = p.q + rows * a->k_size;
    p.m = p.o + rows * a->v_size;
    p.sum = p.m + rows;
    return p;
}

static void start_pair(const struct sherry_attention * a, int64_t stream, int64_t kv_head, struct pair_rows p) {
    const int64_t group = group_of(a), padded = padded_group(a);
    const float scale = scale_of(a);
    for (int64_t t = 0; t < a->tokens; ++t) {
        for (int64_t g = 0; g < padded; ++g) {
            float * to = p.q + (t * padded + g) * a->k_size;
            const float * from = query(a, stream, kv_head * group + least(g, group - 1), t);
            for (int64_t i = 0; i < a->k_size; ++i) {
                to[i] = from[i] * scale;
            }
        }
    }
    fill(p.o, a->tokens * padded * a->v_size, 0.0f);
    fill(p.m, a->tokens * padded, -INFINITY);
    fill(p.sum, a->tokens * padded, 0.0f);
}

// Up to KEYS keys for one token's rows of a pair. `seen` is what look() says, if one mask serves all heads.
static void add_chunk(const struct sherry_attention_kernels * kernels, const struct sherry_attention * a, int64_t stream, int64_t kv_head,
                      int64_t token, int64_t begin, int64_t keys, int seen, struct pair_rows p, float * scratch) {
    const int64_t group = group_of(a), padded = padded_group(a);
    float *s = scratch, *mask = scratch + 4 * KEYS + PANEL;
    for (int64_t g = 0; g < padded;) {
        const int rows = padded - g >= 4 ? 4 : padded - g >= 2 ? 2 : 1;
        const int64_t at = token * padded + g, padded_keys = round_up(keys, PANEL / rows);
        const bool own_masks = a->mask_heads > 1;
        if (own_masks) {
            seen = 0;
            for (int r = 0; r < rows; ++r) {
                seen |= look(mask_row(a, stream, kv_head * group + least(g + r, group - 1), token), begin, keys);
            }
        }
        if (seen & SOME_SEEN) {
            // a soft cap would make padding a score
            const bool biased = (seen & SOME_BIASED) || (a->softcap != 0.0f && keys < padded_keys);
            float factor[4];
            kernels->scores(a->k_type, rows, keys, a->k_size, p.q + at * a->k_size, keys_at(a, stream, kv_head, begin), a->k_stride[0], s);
            fill(s + keys * rows, (padded_keys - keys) * rows, -INFINITY);
            for (int r = 0; biased && r < rows; ++r) {
                const int64_t head = kv_head * group + least(g + r, group - 1);
                const uint16_t * of_row = mask_row(a, stream, head, token);
                const float slope = slope_of(a, head);
                for (int64_t j = 0; j < padded_keys; ++j) {
                    mask[j * rows + r] = r > 0 && !own_masks && a->max_bias <= 0.0f ? mask[j * rows]
                                         : j >= keys                                ? -INFINITY
                                         : of_row                                   ? slope * tq1_25_fp16_to_float(of_row[begin + j])
                                                                                    : 0.0f;
                }
            }
            kernels->softmax(rows, padded_keys, s, biased ? mask : NULL, a->softcap, p.m + at, p.sum + at, factor);
            const float * by = factor; // once
            for (int64_t j = 0, end; end = next_seen(biased ? mask : NULL, rows, keys, &j), j < end; j = end, by = NULL) {
                kernels->values(a->v_type, rows, end - j, a->v_size, s + j * rows, values_at(a, stream, kv_head, begin + j), a->v_stride[0],
                                by, p.o + at * a->v_size);
            }
        }
        g += rows;
    }
}

// The pairs of a thread's round: first .. last - 1.
INLINE void pairs_of(const struct sherry_attention * a, const struct sherry_attention_plan * plan, int64_t round, int thread,
                     int64_t * first, int64_t * last) {
    const int64_t each = a->streams * a->kv_heads / plan->head_parts, begin = thread % plan->head_parts * each;
    *first = begin + round * plan->at_once;
    *last = least(*first + plan->at_once, begin + each);
}

void sherry_attention_part(const struct sherry_attention_kernels * kernels, const struct sherry_attention * a,
                           const struct sherry_attention_plan * plan, int64_t round, int thread, float * scratch) {
    int64_t first, last, pair;
    pairs_of(a, plan, round, thread, &first, &last);
    float * own = scratch + thread * plan->scratch;
    for (pair = first; pair < last;) {
        const int64_t stream = pair / a->kv_heads, next = least(last, (stream + 1) * a->kv_heads); // the pairs of one stream
        for (int64_t i = pair; i < next; ++i) {
            start_pair(a, stream, i % a->kv_heads, rows_of_pair(a, own, i - first));
        }
        int64_t begin, end;
        seen_keys(a, stream, 0, a->tokens, &begin, &end);
        const int64_t each = round_up((end - begin + plan->key_parts - 1) / plan->key_parts, PANEL);
        begin += thread / plan->head_parts * each;
        end = least(end, begin + each);
        for (; begin < end; begin += KEYS) { // memory is read in order, all heads of some keys
            const int64_t keys = least(end - begin, KEYS);
            for (int64_t t = 0; t < a->tokens; ++t) {
                const int seen = a->mask_heads > 1 ? 0 : look(mask_row(a, stream, 0, t), begin, keys);
                if (a->mask_heads > 1 || (seen & SOME_SEEN)) {
                    for (int64_t i = pair; i < next; ++i) {
                        add_chunk(kernels, a, stream, i % a->kv_heads, t, begin, keys, seen, rows_of_pair(a, own, i - first), own);
                    }
                }
            }
        }
        pair = next;
    }
    if (plan->key_parts == 1) {
        sherry_attention_join(a, plan, round, thread, scratch);
    }
}

void sherry_attention_join(const struct sherry_attention * a, const struct sherry_attention_plan * plan, int64_t round, int thread,
                           float * scratch) {
    int64_t first, last;
    pairs_of(a, plan, round, thread, &first, &last);
    const int64_t head_part = thread % plan->head_parts, key_part = thread / plan->head_parts, group = group_of(a),
                  padded = padded_group(a);
    for (int64_t i = key_part; i < (last - first) * a->tokens * group; i += plan->key_parts) { // rows
        const int64_t pair = i / (a->tokens * group), token = i / group % a->tokens, g = i % group, row = token * padded + g;
        const int64_t stream = (first + pair) / a->kv_heads, kv_head = (first + pair) % a->kv_heads;
        float o[SHERRY_ATTENTION_MAX_SIZE] = { 0 }, m = -INFINITY, sum = 0.0f;
        for (int64_t k = 0; k < plan->key_parts; ++k) {
            const struct pair_rows p = rows_of_pair(a, scratch + (head_part + k * plan->head_parts) * plan->scratch, pair);
            if (p.sum[row] == 0.0f) {
                continue;
            }
            const float most = p.m[row] > m ? p.m[row] : m, before = m == -INFINITY ? 0.0f : expf(m - most), now = expf(p.m[row] - most);
            for (int64_t j = 0; j < a->v_size; ++j) {
                o[j] = o[j] * before + p.o[row * a->v_size + j] * now;
            }
            sum = sum * before + p.sum[row] * now;
            m = most;
        }
        finish(a, stream, kv_head * group + g, token, o, m, sum);
    }
}

// ---- many rows ----

// Widened keys begin .. end - 1 become 0.
static void clear_keys(float * x, int64_t size, int64_t begin, int64_t end) {
    for (int64_t i = 0; i < size / PANEL; ++i) {
        fill(x + (i * KEYS + begin) * PANEL, (end - begin) * PANEL, 0.0f);
    }
}

void sherry_attention_tile(const struct sherry_attention_kernels * kernels, const struct sherry_attention * a,
                           const struct sherry_attention_plan * plan, int64_t item, float * scratch) {
    const int64_t group = group_of(a), all = a->tokens * group, blocks = (all - 1) / plan->rows + 1;
    const int64_t pair = item / blocks, stream = pair / a->kv_heads, kv_head = pair % a->kv_heads;
    const int64_t begin = item % blocks * plan->rows, rows = least(plan->rows, all - begin), panels = (rows - 1) / PANEL + 1;
    float * q = scratch;                         // [panels][k_size][PANEL]
    float * k = q + plan->rows * a->k_size;      // [k_size / PANEL][KEYS][PANEL]
    float * v = k + KEYS * a->k_size;            // [v_size / PANEL][KEYS][PANEL]
    float * o = v + KEYS * a->v_size;            // [panels][PANEL][v_size]
    float * s = o + plan->rows * a->v_size;      // [KEYS][PANEL], of one panel
    float * mask = s + KEYS * PANEL;             // [KEYS][PANEL]
    float * m = mask + KEYS * PANEL;             // [panels][PANEL]
    float * sum = m + plan->rows;                // [panels][PANEL]
    float factor[PANEL];
    float slope[MOST_TILE_ROWS];
    const float scale = scale_of(a);
    for (int64_t r = 0; r < panels * PANEL; ++r) {
        const int64_t row = begin + least(r, rows - 1); // the last panel is completed by copies
        const float * from = query(a, stream, kv_head * group + row % group, row / group);
        float * to = q + r / PANEL * PANEL * a->k_size + r % PANEL;
        for (int64_t i = 0; i < a->k_size; ++i) {
            to[i * PANEL] = from[i] * scale;
        }
        slope[r] = slope_of(a, kv_head * group + row % group);
        m[r] = -INFINITY;
        sum[r] = 0.0f;
    }
    fill(o, panels * PANEL * a->v_size, 0.0f);
    const int64_t token = begin / group, tokens = (begin + rows - 1) / group + 1 - token;
    int64_t first, last;
    seen_keys(a, stream, token, tokens, &first, &last);
    for (; first < last; first += KEYS) {
        const int64_t keys = least(last - first, KEYS), padded = round_up(keys, 2);
        bool ready = false;
        for (int64_t p = 0; p < panels; ++p) {
            int seen = 0;
            const int64_t from = begin + p * PANEL, to = least(from + PANEL, begin + rows); // rows
            for (int64_t row = from; row < to; row = a->mask_heads > 1 ? row + 1 : (row / group + 1) * group) {
                seen |= look(mask_row(a, stream, kv_head * group + row % group, row / group), first, keys);
            }
            if (!(seen & SOME_SEEN)) {
                continue;
            }
            if (!ready) {
                kernels->widen(a->k_type, keys, a->k_size, keys_at(a, stream, kv_head, first), a->k_stride[0], k);
                kernels->widen(a->v_type, keys, a->v_size, values_at(a, stream, kv_head, first), a->v_stride[0], v);
                clear_keys(k, a->k_size, keys, padded);
                ready = true;
            }
            const bool biased = (seen & SOME_BIASED) || (a->softcap != 0.0f && keys < padded);
            kernels->tile_scores(padded, a->k_size, q + p * PANEL * a->k_size, k, s);
            fill(s + keys * PANEL, (padded - keys) * PANEL, -INFINITY);
            for (int64_t r = 0; biased && r < PANEL; ++r) {
                const int64_t row = least(from + r, to - 1);
                const uint16_t * of_row = mask_row(a, stream, kv_head * group + row % group, row / group);
                for (int64_t j = 0; j < padded; ++j) {
                    mask[j * PANEL + r] = j >= keys ? -INFINITY
                                          : of_row  ? slope[p * PANEL + r] * tq1_25_fp16_to_float(of_row[first + j])
                                                    : 0.0f;
                }
            }
            kernels->softmax(PANEL, padded, s, biased ? mask : NULL, a->softcap, m + p * PANEL, sum + p * PANEL, factor);
            const float * by = factor; // once
            for (int64_t j = 0, end; end = next_seen(biased ? mask : NULL, PANEL, keys, &j), j < end; j = end, by = NULL) {
                kernels->tile_values(end - j, a->v_size, s + j * PANEL, v + j * PANEL, by, o + p * PANEL * a->v_size);
            }
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        finish(a, stream, kv_head * group + (begin + r) % group, (begin + r) / group, o + r * a->v_size, m[r], sum[r]);
    }
}

// Scalar dot products: what every CPU runs, and what the other kernels are compared with.

#include "../../internal.h"

// `parts` Q8_0 blocks share a scale of the weights.
INLINE float vec_dot(int parts, int64_t n, const uint8_t * x, const tq1_25_q8_0 * y) {
    float total = 0.0f;
    for (int64_t i = 0; i < n / (TQ1_25_QK8_0 * parts); ++i) {
        const uint8_t *qs = x, *sign = qs + GROUPS / 2 * parts, *d = sign + parts;
        float of_block = 0.0f;
        for (int j = 0; j < parts; ++j, ++y) {
            int sum = 0;
            for (int g = 0; g < GROUPS; ++g) {
                const int8_t * q = y->qs + TQ1_25_GROUP * g;
                const int slot = tq1_25_slot(qs, GROUPS * j + g);
                const int of_group = tq1_25_lanes[0][slot] * q[0] + tq1_25_lanes[1][slot] * q[1] + tq1_25_lanes[2][slot] * q[2] +
                                     tq1_25_lanes[3][slot] * q[3];
                sum += tq1_25_negative(sign, GROUPS * j + g) ? -of_group : of_group;
            }
            of_block += tq1_25_fp16_to_float(y->d) * (float) sum;
        }
        total += tq1_25_fp16_to_float(*(const uint16_t *) d) * of_block;
        x = d + sizeof(uint16_t);
    }
    return total;
}

void tq1_25_vec_dot_scalar(int64_t n, float * s, const void * x, const tq1_25_q8_0 * y) { *s = vec_dot(PARTS, n, x, y); }

void tq1_25_64_vec_dot_scalar(int64_t n, float * s, const void * x, const tq1_25_q8_0 * y) { *s = vec_dot(PARTS_64, n, x, y); }

// Each Q8_0 block meets two lanes of a chunk's sixteen groups, in the order of the weights.
void stq1_0_vec_dot_scalar(int64_t n, float * s, const void * blocks, const tq1_25_q8_0 * y) {
    const block_stq1_0 * x = (const block_stq1_0 *) blocks;
    float total = 0.0f;
    for (int64_t i = 0; i < n / QK_STQ1_0; ++i, ++x) {
        float of_block = 0.0f;
        for (int j = 0; j < QK_STQ1_0 / TQ1_25_QK8_0; ++j, ++y) {
            const int group = j / 2 * STQ1_0_LANE, lane = j % 2 * 2;
            int sum = 0;
            for (int g = 0; g < STQ1_0_LANE; ++g) {
                const int slot = stq1_0_slot(x->qs, group + g);
                const int of_group = tq1_25_lanes[lane][slot] * y->qs[g] + tq1_25_lanes[lane + 1][slot] * y->qs[STQ1_0_LANE + g];
                sum += tq1_25_negative(x->sign, group + g) ? -of_group : of_group;
            }
            of_block += tq1_25_fp16_to_float(y->d) * (float) sum;
        }
        total += tq1_25_fp16_to_float(x->d) * of_block;
    }
    *s = total;
}

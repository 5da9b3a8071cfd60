#version 450

// Matrix × one to eight vectors of floats or, with SHERRY_INTEGERS, of Q8_1. A thread takes eight codes (32 weights) of NUM_ROWS rows at a
// time. TQ1_25: weights 32k to 32k + 31 of a block. STQ1_0: places 8k to 8k + 7 of the block's four times 16, in all four lanes.

#extension GL_EXT_shader_explicit_arithmetic_types_int32 : require
#extension GL_EXT_shader_explicit_arithmetic_types_int16 : require
#extension GL_EXT_shader_explicit_arithmetic_types_int8 : require
#if defined(SHERRY_INTEGERS)
#extension GL_EXT_integer_dot_product : require
#define B_TYPE block_q8_1_x4_packed128
#endif

#include "../../ggml-vulkan/vulkan-shaders/mul_mat_vec_base.glsl"
#include "codes.glsl"

layout(local_size_x_id = 0, local_size_y = 1, local_size_z = 1) in;

const uint PER_BLOCK = QUANT_K / 32; // threads for a block

FLOAT_TYPE temp[NUM_COLS][NUM_ROWS];

#if defined(SHERRY_INTEGERS)

// 32 activations and their scales, in the order in which add_products takes them.
struct Activations {
    uint words[8];
    vec2 scale; // of words 0 to 3, of words 4 to 7
};

Activations load_activations(const uint first, const uint k) {
    Activations b;
#if defined(DATA_A_STQ1_0)
    // Lanes 0 and 1 meet one block of Q8_1, lanes 2 and 3 the next. A word has two codes' activations of two lanes.
    const uint ib = first / 32 + (k & ~1u), outer = ib / 4;
    [[unroll]] for (uint half_ = 0; half_ < 2; ++half_) {
        const uint inner = ib % 4 + half_;
        const uvec4 x = uvec4(data_b[outer].qs[inner * 2]), y = uvec4(data_b[outer].qs[inner * 2 + 1]);
        const uvec2 lane = (k & 1) == 0 ? x.xy : x.zw, next = (k & 1) == 0 ? y.xy : y.zw;
        [[unroll]] for (uint four = 0; four < 2; ++four) {
            b.words[half_ * 4 + four * 2] = (lane[four] & 0x00ff00ffu) | (next[four] & 0x00ff00ffu) << 8;
            b.words[half_ * 4 + four * 2 + 1] = ((lane[four] >> 8) & 0x00ff00ffu) | (next[four] & 0xff00ff00u);
        }
        b.scale[half_] = float(data_b[outer].ds[inner].x);
    }
#else
    const uint ib = first / 32 + k, outer = ib / 4, inner = ib % 4;
    const uvec4 x = uvec4(data_b[outer].qs[inner * 2]), y = uvec4(data_b[outer].qs[inner * 2 + 1]);
    [[unroll]] for (uint i = 0; i < 4; ++i) {
        b.words[i] = x[i];
        b.words[4 + i] = y[i];
    }
    b.scale = vec2(float(data_b[outer].ds[inner].x));
#endif
    return b;
}

FLOAT_TYPE product(const uvec2 codes, const Activations b) {
#if defined(DATA_A_STQ1_0)
    ivec2 sums = ivec2(0);
    [[unroll]] for (uint i = 0; i < 4; ++i) {
        const uint first = (i & 2) * 2 + (i & 1); // codes 0 and 2, 1 and 3, 4 and 6, 5 and 7
        const u16vec2 x = unpack16(sherry_table[sherry_code(codes, first)]), y = unpack16(sherry_table[sherry_code(codes, first + 2)]);
        sums.x += dotPacked4x8EXT(int32_t(pack32(u16vec2(x.x, y.x))), int32_t(b.words[i]));
        sums.y += dotPacked4x8EXT(int32_t(pack32(u16vec2(x.y, y.y))), int32_t(b.words[4 + i]));
    }
    return fma(b.scale.x, FLOAT_TYPE(sums.x), b.scale.y * FLOAT_TYPE(sums.y));
#else
    int32_t sum = 0;
    [[unroll]] for (uint i = 0; i < 8; ++i) {
        sum += dotPacked4x8EXT(int32_t(sherry_table[sherry_code(codes, i)]), int32_t(b.words[i]));
    }
    return b.scale.x * FLOAT_TYPE(sum);
#endif
}

// 32 weights of each row, from block `ib` of the first row on.
void add_block(const uint ib, const uint k, const uint b_index, const uint blocks_per_row, const uint num_rows) {
    uvec2 codes[NUM_ROWS];
    [[unroll]] for (uint n = 0; n < num_rows; ++n) {
        codes[n] = sherry_codes(ib + n * blocks_per_row, k);
    }
    [[unroll]] for (uint j = 0; j < NUM_COLS; ++j) {
        const Activations b = load_activations(j * p.batch_stride_b + b_index, k);
        [[unroll]] for (uint n = 0; n < num_rows; ++n) {
            temp[j][n] = fma(FLOAT_TYPE(data_a[ib + n * blocks_per_row].d), product(codes[n], b), temp[j][n]);
        }
    }
}

#else

// Four weights of a code.
vec4 weights(const uvec2 codes, const uint i) {
    const uvec2 halves = sherry_table[sherry_code(codes, i)];
    return vec4(unpackHalf2x16(halves.x), unpackHalf2x16(halves.y));
}

FLOAT_TYPE add_products(const vec4 a, const vec4 b, const FLOAT_TYPE sum) {
    return fma(FLOAT_TYPE(a.x), FLOAT_TYPE(b.x), fma(FLOAT_TYPE(a.y), FLOAT_TYPE(b.y),
           fma(FLOAT_TYPE(a.z), FLOAT_TYPE(b.z), fma(FLOAT_TYPE(a.w), FLOAT_TYPE(b.w), sum))));
}

// 32 weights of each row, from block `ib` of the first row on.
void add_block(const uint ib, const uint k, const uint b_index, const uint blocks_per_row, const uint num_rows) {
    uvec2 codes[NUM_ROWS];
    FLOAT_TYPE sums[NUM_COLS][NUM_ROWS];
    [[unroll]] for (uint n = 0; n < num_rows; ++n) {
        codes[n] = sherry_codes(ib + n * blocks_per_row, k);
        [[unroll]] for (uint j = 0; j < NUM_COLS; ++j) {
            sums[j][n] = FLOAT_TYPE(0);
        }
    }
#if defined(DATA_A_STQ1_0)
    // Code i has place i of each lane: lane l of four codes meets four activations in a row.
    const uint first = (b_index + (k >> 1) * 64 + (k & 1) * 8) / 4;
    [[unroll]] for (uint half_ = 0; half_ < 2; ++half_) {
        vec4 b[NUM_COLS][4];
        [[unroll]] for (uint j = 0; j < NUM_COLS; ++j) {
            [[unroll]] for (uint lane = 0; lane < 4; ++lane) {
                b[j][lane] = vec4(data_b_v4[j * p.batch_stride_b / 4 + first + half_ + lane * 4]);
            }
        }
        [[unroll]] for (uint n = 0; n < num_rows; ++n) {
            [[unroll]] for (uint i = 0; i < 4; ++i) {
                const vec4 w = weights(codes[n], half_ * 4 + i);
                [[unroll]] for (uint j = 0; j < NUM_COLS; ++j) {
                    sums[j][n] = add_products(w, vec4(b[j][0][i], b[j][1][i], b[j][2][i], b[j][3][i]), sums[j][n]);
                }
            }
        }
    }
#else
    const uint first = (b_index + k * 32) / 4;
    [[unroll]] for (uint i = 0; i < 8; ++i) {
        vec4 w[NUM_ROWS];
        [[unroll]] for (uint n = 0; n < num_rows; ++n) {
            w[n] = weights(codes[n], i);
        }
        [[unroll]] for (uint j = 0; j < NUM_COLS; ++j) {
            const vec4 b = vec4(data_b_v4[j * p.batch_stride_b / 4 + first + i]);
            [[unroll]] for (uint n = 0; n < num_rows; ++n) {
                sums[j][n] = add_products(w[n], b, sums[j][n]);
            }
        }
    }
#endif
    [[unroll]] for (uint n = 0; n < num_rows; ++n) {
        const FLOAT_TYPE d = FLOAT_TYPE(data_a[ib + n * blocks_per_row].d);
        [[unroll]] for (uint j = 0; j < NUM_COLS; ++j) {
            temp[j][n] = fma(d, sums[j][n], temp[j][n]);
        }
    }
}

#endif

void compute_outputs(const uint first_row, const uint num_rows) {
    uint a_offset, b_offset, d_offset; // a_offset counts blocks
    get_offsets(a_offset, b_offset, d_offset);

    const uint tid = gl_LocalInvocationID.x;
    const uint blocks_per_row = p.ncols / QUANT_K;

    [[unroll]] for (uint j = 0; j < NUM_COLS; ++j) {
        [[unroll]] for (uint n = 0; n < NUM_ROWS; ++n) {
            temp[j][n] = FLOAT_TYPE(0);
        }
    }
    const uint ib0 = a_offset + first_row * blocks_per_row;
    for (uint unit = tid; unit < blocks_per_row * PER_BLOCK; unit += gl_WorkGroupSize.x) {
        const uint i = unit / PER_BLOCK;
        add_block(ib0 + i, unit % PER_BLOCK, b_offset + i * QUANT_K, blocks_per_row, num_rows);
    }
    reduce_result(temp, d_offset, first_row, num_rows, tid);
}

void main() {
    init_iq_shmem(gl_WorkGroupSize);

    const uint first_row = NUM_ROWS * (gl_WorkGroupID.x + gl_NumWorkGroups.x * gl_WorkGroupID.z);
    if (first_row + NUM_ROWS <= p.stride_d) { // the common case, with a constant number of rows
        compute_outputs(first_row, NUM_ROWS);
    } else if (first_row < p.stride_d) {
        compute_outputs(first_row, p.stride_d - first_row);
    }
}

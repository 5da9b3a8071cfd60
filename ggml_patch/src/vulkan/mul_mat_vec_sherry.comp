#version 450

// Matrix × one to eight vectors of floats. A thread takes eight codes (32 weights) of NUM_ROWS rows at a time: one word of slots and one
// byte of signs for each row, and eight loads of four activations for each vector.

#extension GL_EXT_shader_explicit_arithmetic_types_int32 : require

#include "../../ggml-vulkan/vulkan-shaders/mul_mat_vec_base.glsl"
#include "codes.glsl"

layout(local_size_x_id = 0, local_size_y = 1, local_size_z = 1) in;

const uint PER_BLOCK = QUANT_K / 32; // threads for a block

FLOAT_TYPE temp[NUM_COLS][NUM_ROWS];

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
    [[unroll]] for (uint half_ = 0; half_ < 2; ++half_) {
#if defined(DATA_A_STQ1_0)
        // Code i has place i of each lane: lane l of the codes meets four activations in a row.
        const uint first = (b_index + (k >> 1) * 64 + (k & 1) * 8) / 4 + half_;
        vec4 w[NUM_ROWS][4];
        [[unroll]] for (uint n = 0; n < num_rows; ++n) {
            mat4 of_codes;
            [[unroll]] for (uint i = 0; i < 4; ++i) {
                of_codes[i] = vec4(unpack8(int32_t(sherry_look_up(codes[n][half_], i))));
            }
            [[unroll]] for (uint lane = 0; lane < 4; ++lane) {
                w[n][lane] = vec4(of_codes[0][lane], of_codes[1][lane], of_codes[2][lane], of_codes[3][lane]);
            }
        }
        [[unroll]] for (uint lane = 0; lane < 4; ++lane) {
            [[unroll]] for (uint j = 0; j < NUM_COLS; ++j) {
                const vec4 b = vec4(data_b_v4[j * p.batch_stride_b / 4 + first + lane * 4]);
                [[unroll]] for (uint n = 0; n < num_rows; ++n) {
                    sums[j][n] = add_products(w[n][lane], b, sums[j][n]);
                }
            }
        }
#else
        const uint first = (b_index + k * 32) / 4 + half_ * 4;
        [[unroll]] for (uint i = 0; i < 4; ++i) {
            vec4 w[NUM_ROWS];
            [[unroll]] for (uint n = 0; n < num_rows; ++n) {
                w[n] = vec4(unpack8(int32_t(sherry_look_up(codes[n][half_], i))));
            }
            [[unroll]] for (uint j = 0; j < NUM_COLS; ++j) {
                const vec4 b = vec4(data_b_v4[j * p.batch_stride_b / 4 + first + i]);
                [[unroll]] for (uint n = 0; n < num_rows; ++n) {
                    sums[j][n] = add_products(w[n], b, sums[j][n]);
                }
            }
        }
#endif
    }
    [[unroll]] for (uint n = 0; n < num_rows; ++n) {
        const FLOAT_TYPE d = FLOAT_TYPE(data_a[ib + n * blocks_per_row].d);
        [[unroll]] for (uint j = 0; j < NUM_COLS; ++j) {
            temp[j][n] = fma(d, sums[j][n], temp[j][n]);
        }
    }
}

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
    for (uint i = tid / PER_BLOCK; i < blocks_per_row; i += gl_WorkGroupSize.x / PER_BLOCK) {
        add_block(ib0 + i, tid % PER_BLOCK, b_offset + i * QUANT_K, blocks_per_row, num_rows);
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

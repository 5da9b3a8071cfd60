#version 450

// A whole matrix as F16, for products that upstream computes from floats. A thread writes four weights.

#include "../../ggml-vulkan/vulkan-shaders/dequant_head.glsl"

layout(local_size_x = 256, local_size_y = 1, local_size_z = 1) in;

layout (binding = 0) readonly buffer A {A_TYPE data_a[];};
layout (binding = 1) writeonly buffer D {D_TYPE data_b[];};

void main() {
    const uint i = gl_GlobalInvocationID.x * 4;
    if (i >= p.nel) {
        return;
    }
    const uint ib = i / QUANT_K;
    const vec4 v = vec4(unpack8(int32_t(SHERRY_LANES(data_a[ib], i % QUANT_K / 4)))) * float(data_a[ib].d);
    [[unroll]] for (uint lane = 0; lane < 4; ++lane) {
        data_b[i + lane] = D_TYPE(v[lane]);
    }
}

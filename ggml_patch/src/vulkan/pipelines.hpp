// The pipelines of our types. Upstream's ggml-vulkan.cpp includes this file and expands its macros where it makes those of other types;
// their arguments are names of variables there.

#pragma once

#include "../ggml/types.h"

#include <cstdlib>

// Upstream multiplies integers only where the device does it fast. With SHERRY_VULKAN_INTEGERS=1, tests do it on Mesa's lavapipe too.
static bool sherry_vk_slow_integers() {
    const char * value = std::getenv("SHERRY_VULKAN_INTEGERS");
    return value && *value == '1';
}

// Elements of a table of types.
#define SHERRY_VK_TYPE(TYPE, name) GGML_TYPE_##TYPE,

// Matrix × one to eight vectors: `i` is the number of vectors less one, `w` chooses the size of the workgroups. Four rows (eight on
// AMD GCN) share a load of the activations, as for upstream's IQ types.
#define SHERRY_VK_MUL_MAT_VEC_OF(TYPE, name, b)                                                                                           \
    ggml_vk_create_pipeline(device, device->pipeline_dequant_mul_mat_vec_##b##_f32[w][GGML_TYPE_##TYPE][i],                               \
                            "mul_mat_vec_" #name "_" #b "_f32", arr_dmmv_##name##_##b##_f32_len[reduc],                                   \
                            arr_dmmv_##name##_##b##_f32_data[reduc], "main", mul_mat_vec_num_bindings, sizeof(vk_mat_vec_push_constants), \
                            { rm_iq, 1, 1 }, { wg_size_subgroup, rm_iq, i + 1 }, 1, true, use_subgroups, force_subgroup_size);
#define SHERRY_VK_MUL_MAT_VEC(TYPE, name) SHERRY_VK_MUL_MAT_VEC_OF(TYPE, name, f32) SHERRY_VK_MUL_MAT_VEC_OF(TYPE, name, f16)
#define SHERRY_VK_MUL_MAT_VEC_ID(TYPE, name)                                                                                          \
    ggml_vk_create_pipeline(device, device->pipeline_dequant_mul_mat_vec_id_f32[w][GGML_TYPE_##TYPE], "mul_mat_vec_id_" #name "_f32", \
                            arr_dmmv_id_##name##_f32_f32_len[reduc], arr_dmmv_id_##name##_f32_f32_data[reduc], "main",                \
                            mul_mat_vec_id_num_bindings, sizeof(vk_mat_vec_id_push_constants), { rm_iq, 1, 1 },                       \
                            { wg_size_subgroup, rm_iq }, 1, true, use_subgroups, force_subgroup_size);

// The same with activations of Q8_1.
#define SHERRY_VK_MUL_MAT_VECQ(TYPE, name)                                                                                               \
    ggml_vk_create_pipeline(device, device->pipeline_dequant_mul_mat_vec_q8_1_f32[w][GGML_TYPE_##TYPE][i],                               \
                            "mul_mat_vec_" #name "_q8_1_f32", arr_dmmv_##name##_q8_1_f32_len[reduc],                                     \
                            arr_dmmv_##name##_q8_1_f32_data[reduc], "main", mul_mat_vec_num_bindings, sizeof(vk_mat_vec_push_constants), \
                            { rm_iq_int(i), 1, 1 }, { wg_size_subgroup_int, rm_iq_int(i), i + 1 }, 1, true, use_subgroups,               \
                            subgroup_size_int);
#define SHERRY_VK_MUL_MAT_VECQ_ID(TYPE, name)                                                                                              \
    ggml_vk_create_pipeline(device, device->pipeline_dequant_mul_mat_vec_id_q8_1_f32[w][GGML_TYPE_##TYPE],                                 \
                            "mul_mat_vec_id_" #name "_q8_1_f32", arr_dmmv_id_##name##_q8_1_f32_len[reduc],                                 \
                            arr_dmmv_id_##name##_q8_1_f32_data[reduc], "main", mul_mat_vec_id_num_bindings,                                \
                            sizeof(vk_mat_vec_id_push_constants), { rm_iq_int(0), 1, 1 }, { wg_size_subgroup_int, rm_iq_int(0) }, 1, true, \
                            use_subgroups, subgroup_size_int);

// Matrix × matrix with activations of Q8_1, by the same functions as upstream's other types.
#define SHERRY_VK_MMQ_OF(TYPE, shader, suffix)                                                                                          \
    sg_create_mmq({ GGML_TYPE_##TYPE, GGML_TYPE_Q8_1, false, false }, tc_mmq_int, #shader, shader##suffix##_len, shader##suffix##_data, \
                  sizeof(vk_mat_mat_push_constants), 3);
#define SHERRY_VK_MMQ(TYPE, name) SHERRY_VK_MMQ_OF(TYPE, matmul_##name##_q8_1, )
#define SHERRY_VK_MMQ_FP32(TYPE, name) SHERRY_VK_MMQ_OF(TYPE, matmul_##name##_q8_1, _fp32)
#define SHERRY_VK_MMQ_ID(TYPE, name)                                                                               \
    sg_create_mmq({ GGML_TYPE_##TYPE, GGML_TYPE_Q8_1, true, false }, tc_mmqid_int, "matmul_id_" #name "_q8_1",     \
                  matmul_id_##name##_q8_1_len, matmul_id_##name##_q8_1_data, sizeof(vk_mat_mat_id_push_constants), \
                  mul_mat_id_param_count);
#define SHERRY_VK_MMQ_ID_SUBGROUP(TYPE, name)                                                                                        \
    sg_create_mmq({ GGML_TYPE_##TYPE, GGML_TYPE_Q8_1, true, false }, tc_mmqid_int, "matmul_id_subgroup_" #name "_q8_1",              \
                  matmul_id_subgroup_##name##_q8_1_len, matmul_id_subgroup_##name##_q8_1_data, sizeof(vk_mat_mat_id_push_constants), \
                  mul_mat_id_param_count, mul_mat_subgroup_size);

// To floats: a matrix, rows of one, a tensor.
#define SHERRY_VK_ROWS(TYPE, name)                                                                                                        \
    ggml_vk_create_pipeline(device, device->pipeline_dequant[GGML_TYPE_##TYPE], "dequant_" #name, dequant_##name##_len,                   \
                            dequant_##name##_data, "main", 2, 5 * sizeof(uint32_t), { 256 * 4, 1, 1 }, {}, 1);                            \
    ggml_vk_create_pipeline(device, device->pipeline_get_rows[GGML_TYPE_##TYPE], "get_rows_" #name, get_rows_##name##_len,                \
                            get_rows_##name##_data, "main", 3, sizeof(vk_op_binary_push_constants), { 1024, 1, 1 }, {}, 1);               \
    ggml_vk_create_pipeline(device, device->pipeline_get_rows_f32[GGML_TYPE_##TYPE], "get_rows_" #name "_f32", get_rows_##name##_f32_len, \
                            get_rows_##name##_f32_data, "main", 3, sizeof(vk_op_binary_push_constants), { 1024, 1, 1 }, {}, 1);           \
    ggml_vk_create_pipeline(device, device->pipeline_cpy_quant_f32[GGML_TYPE_##TYPE], "cpy_" #name "_f32", cpy_##name##_f32_len,          \
                            cpy_##name##_f32_data, "main", 2, sizeof(vk_op_unary_push_constants), { QK_##TYPE, 1, 1 }, {}, 1);

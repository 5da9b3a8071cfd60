// The variants of our shaders. Upstream's vulkan-shaders-gen.cpp includes this file; its loop over types calls sherry_shaders.

#pragma once

bool sherry_has_type(const std::string & type) { return type == "tq1_25" || type == "tq1_25_64" || type == "stq1_0"; }

// Matrix × vector by each way to add up the threads' sums, for activations of a type or, where that is "q8_1", integers.
static void sherry_mul_mat_vec(const std::string & type, const std::string & activations, std::map<std::string, std::string> defines) {
    if (activations == "q8_1") {
        defines["SHERRY_INTEGERS"] = "1";
    } else {
        defines["B_TYPE"] = activations == "f16" ? "float16_t" : "float";
        defines["B_TYPEV2"] = activations == "f16" ? "f16vec2" : "vec2";
        defines["B_TYPEV4"] = activations == "f16" ? "f16vec4" : "vec4";
    }
    defines["D_TYPE"] = "float";
    const std::pair<std::string, std::string> reductions[] = {
        { "", "" },
        { "_subgroup", "USE_SUBGROUP_ADD" },
        { "_subgroup_no_shmem", "USE_SUBGROUP_ADD_NO_SHMEM" },
    };
    for (const auto & [suffix, define] : reductions) {
        auto all = defines;
        if (!define.empty()) {
            all[define] = "1";
        }
        const std::string rest = type + "_" + activations + "_f32" + suffix;
        string_to_spv("mul_mat_vec_" + rest, "mul_mat_vec_sherry.comp", all);
        if (activations != "f16") { // upstream converts the activations of MUL_MAT_ID to f32
            all["MUL_MAT_ID"] = "1";
            string_to_spv("mul_mat_vec_id_" + rest, "mul_mat_vec_sherry.comp", all);
        }
    }
}

// All of a type but its matrix × matrix products, which are variants of upstream's. False if the type is not ours.
static bool sherry_shaders(const std::string & type) {
    if (!sherry_has_type(type)) {
        return false;
    }
    const std::map<std::string, std::string> defines = {
        { "DATA_A_" + to_uppercase(type), "1" }, { "FLOAT_TYPE", "float" }, { "FLOAT_TYPEV2", "vec2" }, { "FLOAT_TYPEV4", "vec4" }
    };
    sherry_mul_mat_vec(type, "f32", defines);
    sherry_mul_mat_vec(type, "f16", defines);
#if defined(GGML_VULKAN_INTEGER_DOT_GLSLC_SUPPORT)
    sherry_mul_mat_vec(type, "q8_1", defines);
#endif
    string_to_spv("dequant_" + type, "dequant_sherry.comp", merge_maps(defines, { { "D_TYPE", "float16_t" } }));
    const std::map<std::string, std::string> rows = { { "TEMP_TYPE", "FLOAT_TYPE" }, { "B_TYPE", "int" } };
    string_to_spv("get_rows_" + type, "get_rows_quant.comp", merge_maps(merge_maps(defines, rows), { { "D_TYPE", "float16_t" } }));
    string_to_spv("get_rows_" + type + "_f32", "get_rows_quant.comp", merge_maps(merge_maps(defines, rows), { { "D_TYPE", "float" } }));
    string_to_spv("cpy_" + type + "_f32", "copy_from_quant.comp", merge_maps(defines, { { "D_TYPE", "float" } }));
    return true;
}

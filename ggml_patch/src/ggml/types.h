// Registers our types in ggml and llama.cpp. hooks.patch expands SHERRY_TYPES in upstream's tables and switches; GPU backends will too.
// The numbers of the types are in the enums of ggml.h, llama.h and gguf-py.

#pragma once

#include "../isas.h"
#include "ggml.h"

#define SHERRY_TYPES(X) X(TQ1_25, tq1_25) X(TQ1_25_64, tq1_25_64) X(STQ1_0, stq1_0)

#define SHERRY_CASE(TYPE, name) case GGML_TYPE_##TYPE:

static inline bool sherry_has_type(enum ggml_type type) {
    switch (type) {
        SHERRY_TYPES(SHERRY_CASE) return true;
        default: return false;
    }
}

// ggml.c: type_traits, ggml_ftype_to_ggml_type, ggml_quantize_chunk
#define SHERRY_TRAITS(TYPE, name)                             \
    [GGML_TYPE_##TYPE] = { .type_name = #name,                \
                           .blck_size = QK_##TYPE,            \
                           .type_size = sizeof(block_##name), \
                           .is_quantized = true,              \
                           .to_float = dequantize_row_##name, \
                           .from_float_ref = quantize_row_##name##_ref },
#define SHERRY_GGML_FTYPE(TYPE, name) \
    case GGML_FTYPE_MOSTLY_##TYPE: wtype = GGML_TYPE_##TYPE; break;
#define SHERRY_QUANTIZE(TYPE, name) \
    case GGML_TYPE_##TYPE: result = quantize_##name(src + start, (char *) dst + start_row * row_size, nrows, n_per_row, imatrix); break;

// ggml-quants.c: ggml_validate_row_data
#define SHERRY_VALIDATE(TYPE, name) \
    case GGML_TYPE_##TYPE: return name##_validate(data, nb);

// ggml-cpu.c: type_traits_cpu
#define SHERRY_CPU_TRAITS(TYPE, name)                                                                                              \
    [GGML_TYPE_##TYPE] = {                                                                                                         \
        .from_float = quantize_row_##name##_ref, .vec_dot = ggml_vec_dot_##name##_q8_0, .vec_dot_type = GGML_TYPE_Q8_0, .nrows = 1 \
    },

// mul_mat.hpp
#define SHERRY_KIND(TYPE, name) \
    case GGML_TYPE_##TYPE: return KIND_##TYPE;

// llama-model-loader.cpp: the file type that most tensors have; llama-quant.cpp: the type of a file type's tensors
#define SHERRY_GUESS_FTYPE(TYPE, name) \
    case GGML_TYPE_##TYPE: ftype = LLAMA_FTYPE_MOSTLY_##TYPE; break;
#define SHERRY_FTYPE_CASE(TYPE, name) case LLAMA_FTYPE_MOSTLY_##TYPE:
#define SHERRY_FTYPE_TYPE(TYPE, name) \
    case LLAMA_FTYPE_MOSTLY_##TYPE: return GGML_TYPE_##TYPE;

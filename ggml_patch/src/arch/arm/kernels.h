#pragma once

#include "../../isas.h"

#ifdef TQ1_25_ARM

// Can the compiler make one function for these in a build that lacks them? Older versions of Clang cannot.
#    if defined(__ARM_FEATURE_DOTPROD) || (defined(__clang__) ? __clang_major__ >= 16 : __GNUC__ >= 8)
#        define TQ1_25_DOTPROD
#    endif
#    if defined(TQ1_25_DOTPROD) && (defined(__ARM_FEATURE_MATMUL_INT8) || (defined(__clang__) ? __clang_major__ >= 16 : __GNUC__ >= 10))
#        define TQ1_25_I8MM
#    endif

tq1_25_has_t tq1_25_has_dotprod, tq1_25_has_i8mm;

tq1_25_vec_dot_t tq1_25_vec_dot_neon, tq1_25_64_vec_dot_neon, stq1_0_vec_dot_neon;
tq1_25_vec_dot_t tq1_25_vec_dot_dotprod, tq1_25_64_vec_dot_dotprod, stq1_0_vec_dot_dotprod;
tq1_25_table_t tq1_25_table_neon;
tq1_25_gemv_t tq1_25_gemv_neon;
tq1_25_expand_t tq1_25_expand_neon;
tq1_25_lookup_t tq1_25_lookup_neon;
tq1_25_store_t tq1_25_store_neon;
tq1_25_decode_t tq1_25_decode_dotprod, tq1_25_decode_i8mm;
tq1_25_gemm_t tq1_25_gemm_dotprod, tq1_25_gemm_i8mm;
extern const struct sherry_attention_kernels sherry_attention_neon;

#endif

#pragma once

#include "../../isas.h"

#ifdef TQ1_25_X86

// Does the compiler know AVX-VNNI?
#    if !defined(__GNUC__) || (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#        define TQ1_25_AVXVNNI
#    endif

tq1_25_has_t tq1_25_has_avx2, tq1_25_has_avx512, tq1_25_has_avx512vnni, tq1_25_has_avxvnni, tq1_25_has_zen4;

tq1_25_vec_dot_t tq1_25_vec_dot_avx2, tq1_25_vec_dot_avx512, tq1_25_vec_dot_avx512vnni;
tq1_25_vec_dot_t tq1_25_64_vec_dot_avx2, tq1_25_64_vec_dot_avx512, tq1_25_64_vec_dot_avx512vnni;
tq1_25_vec_dot_t stq1_0_vec_dot_avx2, stq1_0_vec_dot_avx512, stq1_0_vec_dot_avx512vnni;
tq1_25_table_t tq1_25_table_avx2, tq1_25_table_avx512;
tq1_25_gemv_t tq1_25_gemv_avx2, tq1_25_gemv_avx512;
tq1_25_expand_t tq1_25_expand_avx2, tq1_25_expand_avx512;
tq1_25_lookup_t tq1_25_lookup_avx2, tq1_25_lookup_avx512;
tq1_25_store_t tq1_25_store_avx2, tq1_25_store_avx512;
tq1_25_wide_table_t tq1_25_wide_table_avx2;
tq1_25_wide_rows_t tq1_25_wide_rows_avx2;
tq1_25_wide_store_t tq1_25_wide_store_avx2;
tq1_25_decode_t tq1_25_decode_avxvnni, tq1_25_decode_avx512vnni;
tq1_25_gemm_t tq1_25_gemm_avxvnni, tq1_25_gemm_avx512vnni;
extern const struct sherry_attention_kernels sherry_attention_avx2, sherry_attention_avx512;

#endif

# Our sources for each library of ggml. hooks.patch adds the lists to ggml's; a GPU backend gets a list of its own.

set(SHERRY_BASE_SOURCES ${CMAKE_CURRENT_LIST_DIR}/tq1_25.c)

# All variants of ggml-cpu hold all instruction sets: each kernel carries its own target attribute.
set(SHERRY_CPU_SOURCES
    isas.c
    repack.c
    attention.c
    arch/scalar/vec_dot.c
    arch/x86/features.c
    arch/x86/vec_dot_avx2.c
    arch/x86/vec_dot_avx512.c
    arch/x86/lookup_avx2.c
    arch/x86/lookup_avx512.c
    arch/x86/wide_avx2.c
    arch/x86/attention_avx2.c
    arch/x86/attention_avx512.c
    arch/x86/gemm_avxvnni.c
    arch/x86/gemm_avx512vnni.c
    arch/arm/features.c
    arch/arm/vec_dot_neon.c
    arch/arm/vec_dot_dotprod.c
    arch/arm/lookup_neon.c
    arch/arm/attention_neon.c
    arch/arm/gemm_dotprod.c
    arch/arm/gemm_i8mm.c)
list(TRANSFORM SHERRY_CPU_SOURCES PREPEND ${CMAKE_CURRENT_LIST_DIR}/)

# The shaders that ggml-vulkan compiles by themselves, and what upstream's include.
set(SHERRY_VULKAN_SHADERS vulkan/dequant_sherry.comp vulkan/mul_mat_vec_sherry.comp)
set(SHERRY_VULKAN_SOURCES
    vulkan/shaders.hpp
    vulkan/types.glsl
    vulkan/codes.glsl
    vulkan/dequant_funcs.glsl
    vulkan/dequant_funcs_cm2.glsl
    vulkan/mul_mm.glsl
    vulkan/mul_mmq.glsl)
list(TRANSFORM SHERRY_VULKAN_SHADERS PREPEND ${CMAKE_CURRENT_LIST_DIR}/)
list(TRANSFORM SHERRY_VULKAN_SOURCES PREPEND ${CMAKE_CURRENT_LIST_DIR}/)

# Refuses names that no variant has. Runs after the last variant.
function(sherry_check_variants)
    get_property(known GLOBAL PROPERTY SHERRY_KNOWN_VARIANTS)
    foreach (variant ${SHERRY_CPU_VARIANTS})
        if (NOT variant IN_LIST known)
            message(FATAL_ERROR "SHERRY_CPU_VARIANTS: there is no ${variant} for this compiler; there are ${known}")
        endif()
    endforeach()
endfunction()
if (GGML_CPU_ALL_VARIANTS)
    cmake_language(DEFER CALL sherry_check_variants)
endif()

# Leaves out a variant that was not asked for or that the compiler cannot build (GCC knows SME from version 14 on). Runs at the head of
# ggml_add_cpu_backend_variant; return() leaves that function.
macro(sherry_choose_variant tag_name)
    if ("${ARGN}" MATCHES "SME")
        include(CheckCCompilerFlag)
        check_c_compiler_flag(-march=armv9.2-a+sme SHERRY_COMPILER_HAS_SME)
        if (NOT SHERRY_COMPILER_HAS_SME)
            message(STATUS "Leaving out CPU backend variant ${tag_name}: the compiler lacks SME")
            return()
        endif()
    endif()
    set_property(GLOBAL APPEND PROPERTY SHERRY_KNOWN_VARIANTS ${tag_name})
    if (SHERRY_CPU_VARIANTS AND NOT "${tag_name}" IN_LIST SHERRY_CPU_VARIANTS)
        return()
    endif()
endmacro()

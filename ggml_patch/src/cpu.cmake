# What ggml's CMakeLists.txt takes from here.

# Of ggml-cpu, and of each variant of it: an instruction set's functions carry their own target attributes.
set(TQ1_25_CPU_SOURCES
    sherry/tq1_25-dot.c
    sherry/tq1_25-avx2.c
    sherry/tq1_25-avx512.c
    sherry/tq1_25-neon.c
    sherry/tq1_25-dotprod.c
    sherry/tq1_25-repack.c
    sherry/tq1_25-lookup-avx2.c
    sherry/tq1_25-lookup-avx512.c
    sherry/tq1_25-lookup-neon.c
    sherry/tq1_25-gemm-avxvnni.c
    sherry/tq1_25-gemm-avx512.c
    sherry/tq1_25-gemm-dotprod.c
    sherry/tq1_25-gemm-i8mm.c)

# After the last of them: a name that is none of theirs.
function(tq1_25_check_variants)
    get_property(known GLOBAL PROPERTY TQ1_25_VARIANTS)
    foreach (variant ${SHERRY_CPU_VARIANTS})
        if (NOT variant IN_LIST known)
            message(FATAL_ERROR "SHERRY_CPU_VARIANTS: there is no ${variant} for this compiler; there are ${known}")
        endif()
    endforeach()
endfunction()
if (GGML_CPU_ALL_VARIANTS)
    cmake_language(DEFER CALL tq1_25_check_variants)
endif()

# At the head of ggml_add_cpu_backend_variant, out of which its return() leads: a variant that was not asked for, or that this compiler
# can't make, is left out. GCC has SME from 14 on.
macro(tq1_25_choose_variant tag_name)
    if ("${ARGN}" MATCHES "SME")
        include(CheckCCompilerFlag)
        check_c_compiler_flag(-march=armv9.2-a+sme TQ1_25_COMPILER_HAS_SME)
        if (NOT TQ1_25_COMPILER_HAS_SME)
            message(STATUS "Leaving out CPU backend variant ${tag_name}: the compiler lacks SME")
            return()
        endif()
    endif()
    set_property(GLOBAL APPEND PROPERTY TQ1_25_VARIANTS ${tag_name})
    if (SHERRY_CPU_VARIANTS AND NOT "${tag_name}" IN_LIST SHERRY_CPU_VARIANTS)
        return()
    endif()
endmacro()

// Dot products for NEON with dotprod.

#include "kernels.h"

#ifdef TQ1_25_DOTPROD
#    define NEON_DOTPROD
#    if !defined(__clang__) && !defined(__ARM_FEATURE_DOTPROD)
// Also for inlined functions, which GCC refuses to inline with options like -mcpu=cortex-a72+crypto otherwise.
#        pragma GCC target("arch=armv8.2-a+dotprod")
#    endif
#    include "vec_dot_neon.c"
#endif

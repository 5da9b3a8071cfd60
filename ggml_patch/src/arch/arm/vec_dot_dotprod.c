// Dot products of TQ1_25 and STQ1_0 for NEON with dotprod.

#include "kernels.h"

#ifdef TQ1_25_DOTPROD
#    define NEON_DOTPROD
#    if !defined(__clang__) && !defined(__ARM_FEATURE_DOTPROD)
// For what is inlined there, too: GCC refuses to where it was told of a CPU with more (-mcpu=cortex-a72+crypto).
#        pragma GCC target("arch=armv8.2-a+dotprod")
#    endif
#    include "vec_dot_neon.c"
#endif

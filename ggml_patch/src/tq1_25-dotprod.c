// Dot products of TQ1_25 and STQ1_0 for NEON with dotprod.

#include "tq1_25.h"

#ifdef TQ1_25_DOTPROD
#    define NEON_DOTPROD
#    include "tq1_25-neon.c"
#endif

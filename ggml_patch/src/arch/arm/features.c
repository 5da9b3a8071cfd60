// Which of our instruction sets this ARM CPU supports.

#include "kernels.h"

#ifdef TQ1_25_DOTPROD

#if defined(__linux__)
#    include <sys/auxv.h>
int tq1_25_has_dotprod(void) { return (getauxval(AT_HWCAP) & 1ul << 20) != 0; }
int tq1_25_has_i8mm(void) { return tq1_25_has_dotprod() && (getauxval(AT_HWCAP2) & 1ul << 13) != 0; }
#elif defined(__APPLE__)
#    include <sys/sysctl.h>
static int has(const char * name) {
    int value = 0;
    size_t size = sizeof(value);
    return sysctlbyname(name, &value, &size, NULL, 0) == 0 && value == 1;
}
int tq1_25_has_dotprod(void) { return has("hw.optional.arm.FEAT_DotProd"); }
int tq1_25_has_i8mm(void) { return tq1_25_has_dotprod() && has("hw.optional.arm.FEAT_I8MM"); }
#elif defined(_WIN32)
#    include <windows.h>
int tq1_25_has_dotprod(void) { return IsProcessorFeaturePresent(43); } // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE
int tq1_25_has_i8mm(void) { return tq1_25_has_dotprod() && IsProcessorFeaturePresent(66); } // PF_ARM_V82_I8MM_INSTRUCTIONS_AVAILABLE
#else // as the compiler was told
int tq1_25_has_dotprod(void) {
#    ifdef __ARM_FEATURE_DOTPROD
    return 1;
#    else
    return 0;
#    endif
}
int tq1_25_has_i8mm(void) {
#    ifdef __ARM_FEATURE_MATMUL_INT8
    return 1;
#    else
    return 0;
#    endif
}
#endif

#endif

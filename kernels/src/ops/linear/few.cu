// y[t, o] = sum over i of x[t, i] w[o, i] (+ residual) for up to 128 tokens; x is a plane. See few.cuh; inputs can be cut into parts as in gemm.cu.
// linear_few16: the results, and each part's, as BF16.
#include "few.cuh"

#define FEW_KERNEL(NAME, FORMAT, N, AS_BF16)                                                                           \
    extern "C" __global__ void __launch_bounds__((Few<FORMAT, N>::THREADS), 1)                                         \
        NAME##_##N(const __grid_constant__ GemmParams p) { linear_few<FORMAT, N, AS_BF16>(p); }
#define FEW(NAME, FORMAT)                                                                                              \
    FEW_KERNEL(linear_few_##NAME, FORMAT, 32, false)                                                                   \
    FEW_KERNEL(linear_few_##NAME, FORMAT, 64, false)                                                                   \
    FEW_KERNEL(linear_few_##NAME, FORMAT, 96, false)                                                                   \
    FEW_KERNEL(linear_few_##NAME, FORMAT, 128, false)                                                                  \
    FEW_KERNEL(linear_few16_##NAME, FORMAT, 96, true)                                                                  \
    FEW_KERNEL(linear_few16_##NAME, FORMAT, 128, true)
FEW(int4_g128, INT4_G128)
FEW(int4_g32, INT4_G32)
FEW(fp8, FP8)
FEW(bf16, BF16)

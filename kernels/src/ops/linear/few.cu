// y[t, o] = sum over i of x[t, i] w[o, i] (+ residual) for 17 to 128 tokens; x is a plane. See few.cuh; inputs can be cut into parts as in gemm.cu.
#include "few.cuh"

#define FEW_TOKENS(NAME, FORMAT, N)                                                                                     \
    extern "C" __global__ void __launch_bounds__(FEW_THREADS, 1)                                                       \
        linear_few_##NAME##_##N(const __grid_constant__ GemmParams p) { linear_few<FORMAT, N>(p); }
#define FEW(NAME, FORMAT) FEW_TOKENS(NAME, FORMAT, 32) FEW_TOKENS(NAME, FORMAT, 64) FEW_TOKENS(NAME, FORMAT, 96) FEW_TOKENS(NAME, FORMAT, 128)
FEW(int4_g128, INT4_G128)
FEW(int4_g32, INT4_G32)
FEW(fp8, FP8)
FEW(bf16, BF16)

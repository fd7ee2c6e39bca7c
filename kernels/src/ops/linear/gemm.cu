// y[t, o] = sum over i of x[t, i] w[o, i] (+ residual) for many tokens; x is a plane. See gemm.cuh.
//
// For few tokens the inputs can be cut into `parts`, so that a weight of few rows still occupies the device: part p
// writes its own y, the reader adds them in order; the residual is added to part 0.
#include "gemm_tiles.cuh"

#define GEMM(NAME, FORMAT)                                                                                             \
    extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1)                                                      \
        linear_gemm_##NAME(const __grid_constant__ GemmParams p) { linear_gemm<FORMAT>(p); }
GEMM(int4_g128, INT4_G128)
GEMM(int4_g32, INT4_G32)
GEMM(fp8, FP8)
GEMM(bf16, BF16)
GEMM(f16, F16)
GEMM(f32, F32)

// short.cu for up to 64 tokens.
#define GEMM_SETS 1
#define GEMM_WARPGROUPS 4
#define GEMM_MOST_COLUMNS 64
#include "gemm_tiles.cuh"

#define SHORT(NAME, FORMAT)                                                                                            \
    extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1)                                                      \
        linear_short64_##NAME(const __grid_constant__ GemmParams p) { linear_gemm<FORMAT>(p); }
SHORT_KERNELS(SHORT)

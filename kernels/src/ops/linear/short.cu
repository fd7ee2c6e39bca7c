// The same as gemm.cu for up to 32 tokens (plane.rs gives it at most 16). There a tile's few steps are a chain of decoded weights and narrow products, so four
// warpgroups have one set of 64 rows each instead of two that have two: the chain is half as long.
#define GEMM_SETS 1
#define GEMM_WARPGROUPS 4
#define GEMM_MOST_COLUMNS 32
#include "gemm_tiles.cuh"

#define SHORT(NAME, FORMAT)                                                                                            \
    extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1)                                                      \
        linear_short_##NAME(const __grid_constant__ GemmParams p) { linear_gemm<FORMAT>(p); }
SHORT_KERNELS(SHORT)

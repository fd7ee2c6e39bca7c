#include "tall.cuh"

#define TALL(NAME, FORMAT)                                                                                             \
    extern "C" __global__ void __launch_bounds__(TALL_THREADS, 1)                                                      \
        linear_tall_##NAME(const __grid_constant__ TallParams p) { linear_tall<FORMAT, false>(p); }                    \
    extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(TALL_THREADS, 1)                                  \
        linear_tall_pair_##NAME(const __grid_constant__ TallParams p) { linear_tall<FORMAT, true>(p); }
TALL(int4_g128, INT4_G128)
TALL(fp8, FP8)

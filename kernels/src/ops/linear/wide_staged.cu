// The same as wide.cu with results that leave beside the next products (wide_leaving.cuh): as BF16, or as F32 that is added to the residual y, 64 tokens at a time.
// The rings are shorter for it. BF16 weights: wide_rows.cu.
#define WIDE_STAGED
#include "wide_tiles.cuh"
#include "wide_leaving.cuh"

#define STAGED(NAME, FORMAT, AS, ROOMS)                                                                                \
    extern "C" __global__ void __cluster_dims__(WIDE_BLOCKS, 1, 1) __launch_bounds__(WIDE_THREADS, 1)                  \
        linear_##NAME(const __grid_constant__ GemmParams p) { linear_wide<FORMAT, WideLeaving<AS, ROOMS>>(p); }
STAGED(wide16_int4_g128, INT4_G128, AsBf16<256>, 1)
STAGED(wide16_int4_g32, INT4_G32, AsBf16<256>, 1)
STAGED(wide16_fp8, FP8, AsBf16<256>, 1)
STAGED(wide_add_int4_g128, INT4_G128, AddF32<64>, 2)
STAGED(wide_add_int4_g32, INT4_G32, AddF32<64>, 2)
STAGED(wide_add_fp8, FP8, AddF32<64>, 2)

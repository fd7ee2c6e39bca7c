// y[t, o] = sum over i of x[t, i] w[o, i] (+ residual) for many tokens; x is a plane. See wide.cuh: a cluster has 256 rows of the weights.
// Results as BF16: wide_staged.cu.
#include "wide_tiles.cuh"

struct LeaveF32 {
    static constexpr bool STAGED = false;
    float *staged;
    int warp, lane;
    __device__ __forceinline__ LeaveF32(uint8_t *rest, int warp, int lane) : staged(reinterpret_cast<float *>(rest) + warp * OUT_FLOATS), warp(warp), lane(lane) {}
    template <int N> DEVICE void sums(const GemmParams &p, int first_tile, const WideShare &share, const float *acc) {
        if (first_tile + warp < p.tiles) write_tile<N, true>(p, p.y, p.residual, first_tile + warp, share.first, share.first + share.columns, acc, staged, lane);
    }
};

#define WIDE(NAME, FORMAT)                                                                                             \
    extern "C" __global__ void __cluster_dims__(WIDE_BLOCKS, 1, 1) __launch_bounds__(WIDE_THREADS, 1)                  \
        linear_wide_##NAME(const __grid_constant__ GemmParams p) { linear_wide<FORMAT, LeaveF32>(p); }
WIDE(int4_g128, INT4_G128)
WIDE(int4_g32, INT4_G32)
WIDE(fp8, FP8)
WIDE(bf16, BF16)
WIDE(f16, F16)

// y[t, o] = sum over i of x[t, i] w[o, i] (+ residual) for many tokens; x is a plane. See wide.cuh: a cluster has 256 rows of the weights.
#include "../../cuda/wide.cuh"
#include "products.cuh"

template <int F> DEVICE void linear_wide(const GemmParams &p) {
    extern __shared__ uint8_t shared[];
    const WideShared<F> s(shared);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31;
    // Work: the pair of 128 rows w % pairs, the tokens from w / pairs * 256 on.
    const int pairs = ceil_div(p.tiles, WIDE_BLOCKS * WIDE_TILES), work = pairs * ceil_div(p.tokens, WIDE_COLUMNS);
    const int begin = blockIdx.x / WIDE_BLOCKS, stride = gridDim.x / WIDE_BLOCKS;
    const auto first_tile = [&](int w) { return (w % pairs * WIDE_BLOCKS + static_cast<int>(cluster_rank())) * WIDE_TILES; };
    if (warp >= WIDE_CONSUMERS) {
        give_registers();
        if (warp == WIDE_WEIGHTS_WARP) {
            Turn turn;
            for (int w = begin; w < work; w += stride) {
                int at = first_tile(w) + lane;
                const bool has = lane < WIDE_TILES && at < p.tiles;
                const Weight &weight = segment_of(p, at);
                wide_weights<F>(s, turn, weight.stream + static_cast<size_t>(at) * weight.stages * Layout<F>::BYTES, has, p.steps, lane);
            }
        }
        wait_for_inputs();
        allow_next_kernel();
        if (warp == WIDE_PLANE_WARP) {
            Turn turn;
            for (int w = begin; w < work; w += stride) {
                const int first = w / pairs * WIDE_COLUMNS, columns = min(WIDE_COLUMNS, ceil_div(p.tokens - first, PLANE_ROWS) * PLANE_ROWS);
                const uint8_t *from = p.plane + static_cast<size_t>(first / PLANE_ROWS) * PLANE_BLOCK;
                wide_planes<F>(s, turn, from, static_cast<size_t>(p.blocks) * PLANE_BLOCK, columns, p.steps, lane);
            }
        }
    } else {
        take_registers();
        wait_for_inputs();
        allow_next_kernel();
        Turn weight, plane;
        OneTile<F> source(warp * WideRing<F>::BYTES, lane, p.segments[0].bf16_scales);
        float *staged = reinterpret_cast<float *>(s.rest) + warp * OUT_FLOATS;
        for (int w = begin; w < work; w += stride) {
            const int first = w / pairs * WIDE_COLUMNS, at = first_tile(w) + warp;
            float acc[WIDE_SUMS];
            if (p.tokens - first > 128)
                wide_products<F, 256>(s, weight, plane, source, p.steps, lane, acc);
            else
                wide_products<F, 128>(s, weight, plane, source, p.steps, lane, acc);
            if (at >= p.tiles) continue;
            if (p.tokens - first > 128)
                write_tile<256>(p, p.y, p.residual, at, first, acc, staged, lane);
            else
                write_tile<128>(p, p.y, p.residual, at, first, acc, staged, lane);
        }
    }
    // Nobody leaves while the other block may still write to it.
    cluster_sync();
}

#define WIDE(NAME, FORMAT)                                                                                             \
    extern "C" __global__ void __cluster_dims__(WIDE_BLOCKS, 1, 1) __launch_bounds__(WIDE_THREADS, 1)                  \
        linear_wide_##NAME(const __grid_constant__ GemmParams p) { linear_wide<FORMAT>(p); }
WIDE(int4_g128, INT4_G128)
WIDE(int4_g32, INT4_G32)
WIDE(fp8, FP8)
WIDE(bf16, BF16)
WIDE(f16, F16)

// A dense weight times a plane by pairs of blocks (wide.cuh): the kernels of wide.cu and of wide_staged.cu.
#pragma once
#include "../../cuda/wide.cuh"
#include "products.cuh"

// `Leave`: what happens to a tile's sums; STAGED: two warps that do not multiply send them off.
template <int F, class Leave> DEVICE void linear_wide(const GemmParams &p) {
    extern __shared__ uint8_t shared[];
    const WideShared<F> s(shared);
    if constexpr (Leave::STAGED) {
        if (threadIdx.x == 0) Leave::init(shared_address(s.rest));
        __syncthreads();
    }
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
                const Weight &weight = segment_of(p.segments, at);
                wide_weights<F>(s, turn, weight.stream + at * tile_bytes<F>(weight.stages), has, p.steps, lane);
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
        if constexpr (Leave::STAGED) {
            // The same in all lanes, and said so.
            const int group = __shfl_sync(ALL_LANES, warp - WIDE_SENDERS, 0);
            if (group >= 0) {
                Leave leave(shared_address(s.rest), group, 0, lane, true);
                for (int w = begin; w < work; w += stride)
                    leave.send(p, first_tile(w) * TILE_ROWS + group * (WIDE_TILES / 2 * TILE_ROWS), w / pairs * WIDE_COLUMNS);
            }
        }
    } else {
        take_registers();
        wait_for_inputs();
        allow_next_kernel();
        Turn weight, plane;
        OneTile<F> source(warp * WideRing<F>::BYTES, 0, lane, p.segments[0].bf16_scales);
        Leave leave = [&] {
            if constexpr (Leave::STAGED)
                return Leave(shared_address(s.rest), warp / 4, warp % 4, lane, false);
            else
                return Leave(s.rest, warp, lane);
        }();
        for (int w = begin; w < work; w += stride) {
            const int first = w / pairs * WIDE_COLUMNS;
            float acc[WIDE_SUMS];
            if (p.tokens - first > 128)
                wide_products<F, 256>(s, weight, plane, source, p.steps, lane, acc);
            else
                wide_products<F, 128>(s, weight, plane, source, p.steps, lane, acc);
            if (p.tokens - first > 128)
                leave.template sums<256>(p, first_tile(w), first, acc);
            else
                leave.template sums<128>(p, first_tile(w), first, acc);
        }
    }
    // Nobody leaves while the other block may still write to it.
    cluster_sync();
}

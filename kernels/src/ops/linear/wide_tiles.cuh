// A dense weight times a plane by pairs of blocks (wide.cuh): the kernels of wide.cu and of wide_staged.cu.
#pragma once
#include "products.cuh"
#include "wide_shares.cuh"

// Those that send have addresses of many tokens.
DEVICE void wide_take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 216;"); }
DEVICE void wide_give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 72;"); }

template <int COLUMNS> struct Columns { static constexpr int N = COLUMNS; };

// `Leave`: what happens to a tile's sums; STAGED: two warps that do not multiply send them off.
template <int F, class Leave> DEVICE void linear_wide(const GemmParams &p) {
    extern __shared__ uint8_t shared[];
    const WideShared<F> s(shared);
    if constexpr (Leave::STAGED) {
        if (threadIdx.x == 0) Leave::init(shared_address(s.rest));
        __syncthreads();
    }
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31;
    const WideShares shares(p);
    const int begin = blockIdx.x / WIDE_BLOCKS, stride = gridDim.x / WIDE_BLOCKS;
    const auto first_tile = [&](const WideShare &share) { return (share.pair * WIDE_BLOCKS + static_cast<int>(cluster_rank())) * WIDE_TILES; };
    if (warp >= WIDE_CONSUMERS) {
        wide_give_registers();
        if (warp == WIDE_WEIGHTS_WARP) {
            Turn turn;
            for (int w = begin; w < shares.all; w += stride) {
                int at = first_tile(shares[w]) + lane;
                const bool has = lane < WIDE_TILES && at < p.tiles;
                const Weight &weight = segment_of(p.segments, at);
                wide_weights<F>(s, turn, weight.stream + at * tile_bytes<F>(weight.stages), has, p.steps, lane);
            }
        }
        wait_for_inputs();
        allow_next_kernel();
        if (warp == WIDE_PLANE_WARP) {
            Turn turn;
            for (int w = begin; w < shares.all; w += stride) {
                const WideShare share = shares[w];
                const int columns = ceil_div(share.columns, PLANE_ROWS) * PLANE_ROWS;
                const uint8_t *from = p.plane + static_cast<size_t>(share.first / PLANE_ROWS) * PLANE_BLOCK;
                wide_planes<F>(s, turn, from, static_cast<size_t>(p.blocks) * PLANE_BLOCK, columns, p.steps, lane);
            }
        }
        if constexpr (Leave::STAGED) {
            // The same in all lanes, and said so.
            const int group = __shfl_sync(ALL_LANES, warp - WIDE_SENDERS, 0);
            if (group >= 0) {
                Leave leave(shared_address(s.rest), group, 0, lane, true);
                for (int w = begin; w < shares.all; w += stride) {
                    const WideShare share = shares[w];
                    leave.send(p, first_tile(share) * TILE_ROWS + group * (WIDE_TILES / 2 * TILE_ROWS), share);
                }
            }
        }
    } else {
        wide_take_registers();
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
        for (int w = begin; w < shares.all; w += stride) {
            const WideShare share = shares[w];
            float acc[WIDE_SUMS];
            const auto sums = [&](auto n) {
                constexpr int N = decltype(n)::N;
                wide_products<F, N>(s, weight, plane, source, p.steps, lane, acc);
#pragma unroll
                for (int i = N / 2; i < WIDE_SUMS; i++) acc[i] = 0.f;
            };
            if (share.columns > 240)
                sums(Columns<256>());
            else if (share.columns > 200)
                sums(Columns<240>());
            else if (share.columns > 128)
                sums(Columns<200>());
            else
                sums(Columns<128>());
            const auto sums_leave = [&](auto n) {
                constexpr int N = decltype(n)::N;
                if constexpr (Leave::STAGED)
                    leave.template sums<N>(acc);
                else
                    leave.template sums<N>(p, first_tile(share), share, acc);
            };
            if (share.columns > 128)
                sums_leave(Columns<256>());
            else
                sums_leave(Columns<128>());
        }
    }
    // Nobody leaves while the other block may still write to it.
    cluster_sync();
}

// FP8 weights times quantised activations (plane.cuh) of many tokens, 256 tokens at a time.
//
// The activations are the products' 64-row operand, so a thread has two tokens of a product and needs two of their scales, and the weights'
// scale is the same for 64 of its 128 outputs: the sums of 128 inputs cost a multiply-add each to be scaled and added to the accumulators. With
// the weights as that operand a thread had 32 tokens, and what their scales took from shared memory was as much as the operands.
//
// A cluster of two blocks shares up to 256 activation rows, of which each brings half for both; each block has 128 rows of the weights. Both
// operands of a step of 128 inputs lie in shared memory as they do in device memory: two warps copy them. Two consumer warpgroups have 128 tokens
// each, as two sets of 64; while one adds its sums the other one's products run.
//
// A step: 1,024 cycles of the tensor cores; out of the second-level cache 16 KB of weights and 16 KB of activations a block; through shared
// memory 32 KB of activations and 16 KB of weights in, 32 and 64 KB of operands out.
#pragma once
#include "cluster.cuh"
#include "plane.cuh"
#include "stream.cuh"
#include "turn.cuh"
#include "wgmma8.cuh"

constexpr int QUANTISED_THREADS = 384, QUANTISED_BLOCKS = 2;
constexpr int QUANTISED_TOKENS = 256, QUANTISED_TILES = 8, QUANTISED_ROWS = QUANTISED_TILES * TILE_ROWS;
// Warps: eight that multiply, then these two, then one for each warpgroup that multiplies, which sends its results off.
constexpr int QUANTISED_CONSUMERS = 8, QUANTISED_WEIGHTS_WARP = 8, QUANTISED_TOKENS_WARP = 9, QUANTISED_SENDERS = 10;
// Sums of a set for a thread: 64 tokens by the block's rows.
constexpr int QUANTISED_SUMS = QUANTISED_ROWS / 2;

// Addresses in shared memory: a ring of DEPTH steps.
template <int DEPTH> struct QuantisedShared {
    // Of one step: activations, weights, and the scales of 256 rows of the one and, 16 bytes each, of two sets of 64 rows of the other.
    static constexpr int PLANE = QUANTISED_TOKENS * 128, WEIGHTS = QUANTISED_ROWS * 128, SCALES = QUANTISED_TOKENS * 4 + 2 * 16;
    uint32_t planes;

    DEVICE uint32_t plane(int slot) const { return planes + slot * PLANE; }
    DEVICE uint32_t weights(int slot) const { return planes + DEPTH * PLANE + slot * WEIGHTS; }
    DEVICE uint32_t scales(int slot) const { return planes + DEPTH * (PLANE + WEIGHTS) + slot * SCALES; }
    DEVICE uint32_t weight_scales(int slot) const { return scales(slot) + QUANTISED_TOKENS * 4; }
    DEVICE uint32_t full(int slot) const { return scales(DEPTH) + slot * 8; }
    DEVICE uint32_t empty(int slot) const { return full(DEPTH) + slot * 8; }
    // Behind all this.
    DEVICE uint32_t rest() const { return empty(DEPTH); }

    __device__ __forceinline__ explicit QuantisedShared(uint8_t *shared) : planes(aligned_planes(shared)) {}

    // By one thread, before the blocks of the cluster meet.
    DEVICE void init() const {
        for (int i = 0; i < DEPTH; i++) {
            // The weights' and the activations' bytes; the consumers of both blocks.
            barrier_init(full(i), 2);
            barrier_init(empty(i), QUANTISED_BLOCKS * QUANTISED_CONSUMERS);
        }
        barrier_init_fence();
    }
};

// One warp: all steps of this block's tiles, FP8 or FP8_EXPERTS. Lane i < 8: `tile`, tile i's stream, if it `has` one; lanes 8 and 9 likewise that of the
// first four tiles and of the others, for their scales.
template <int F, int DEPTH> DEVICE void quantised_weights(const QuantisedShared<DEPTH> &s, Turn &turn, const uint8_t *tile, bool has, int steps, int lane) {
    constexpr int STAGE = QUANTISED_ROWS * 128 / QUANTISED_TILES;
    const unsigned holding = __ballot_sync(ALL_LANES, has), tiles = (1u << QUANTISED_TILES) - 1;
    const uint32_t held = __popc(holding & tiles) * STAGE + __popc(holding & ~tiles) * SCALE_BLOCK;
    const bool scales = lane >= QUANTISED_TILES;
    const uint32_t bytes = scales ? SCALE_BLOCK : STAGE;
    // From one stage to the next, and what else there is from the last one of a trio to the next trio.
    const int next = TRIOS<F> && scales ? -SCALE_BLOCK : Layout<F>::BYTES, turned = TRIOS<F> && scales ? TRIO_BYTES<F> + TRIO * SCALE_BLOCK : Layout<F>::LINE;
    const uint8_t *from = tile + (!scales ? stage_offset<F>(0) : TRIOS<F> ? scale_offset<F>(0) : STAGE);
    int of = 0;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        const uint32_t to = scales ? s.weight_scales(turn.slot) + (lane - QUANTISED_TILES) * SCALE_BLOCK : s.weights(turn.slot) + lane * STAGE;
        barrier_wait(s.empty(turn.slot), turn.parity ^ 1);
        if (lane == 0) barrier_expect(s.full(turn.slot), held);
        __syncwarp();
        if (has) bulk_copy(to, from, bytes, s.full(turn.slot));
        from += next;
        if (TRIOS<F> && ++of == TRIO) of = 0, from += turned;
        turn.template advance<DEPTH>();
    }
}

// One warp: all steps of this block's half of `columns` (a multiple of 8) rows of the plane for both blocks, and all their scales. `plane`, `scales`: of the
// first row's block, in the first step.
template <int DEPTH>
DEVICE void quantised_tokens(const QuantisedShared<DEPTH> &s, Turn &turn, const uint8_t *plane, const uint8_t *scales, size_t chunk_bytes, int columns, int steps, int lane) {
    const uint32_t all = columns * 128, near = columns / 16 * PLANE_BLOCK;
    const uint32_t begin = cluster_rank() ? near : 0, mine = cluster_rank() ? all - near : near;
    plane += begin;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        barrier_wait(s.empty(turn.slot), turn.parity ^ 1);
        if (lane == 0) {
            barrier_expect(s.full(turn.slot), all + columns * 4);
            if (mine) bulk_copy_to(3, s.plane(turn.slot) + begin, plane, mine, s.full(turn.slot));
            bulk_copy(s.scales(turn.slot), scales, columns * 4, s.full(turn.slot));
        }
        __syncwarp();
        plane += chunk_bytes, scales += chunk_bytes / 32;
        turn.template advance<DEPTH>();
    }
}

// A consumer warp: the sums of all steps, of SETS sets of 64 tokens from `first` on by the block's 128 rows.
template <int SETS, int DEPTH>
DEVICE void quantised_products(const QuantisedShared<DEPTH> &s, Turn &turn, int steps, int first, int warp, int lane, float (&acc)[2][QUANTISED_SUMS]) {
#pragma unroll
    for (int h = 0; h < SETS; h++)
#pragma unroll
        for (int i = 0; i < QUANTISED_SUMS; i++) acc[h][i] = 0.f;
    // The low words of `plane_descriptor`, the same in all lanes, and said so: then they need no register of each lane.
    const uint32_t planes = static_cast<uint32_t>(plane_descriptor(s.plane(0) + first * 128));
    const uint32_t weights = static_cast<uint32_t>(plane_descriptor(s.weights(0)));
    const uint32_t rows = (first + warp % 4 * 16 + lane / 4) * 4;
    // Lane 0 gives a place back to this block, lane 1 to the other one.
    const uint32_t free = in_block(s.empty(0), cluster_rank() ^ (lane & 1));
    const auto same = [](uint32_t v) { return __shfl_sync(ALL_LANES, v, 0); };
    uint32_t slot = turn.slot, plane = same(planes + slot * (s.PLANE / 16)), weight = same(weights + slot * (s.WEIGHTS / 16));
    float part[QUANTISED_SUMS];
    barrier_wait(s.full(slot), turn.parity);
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        const uint32_t used = slot;
        float of_rows[2];
#pragma unroll
        for (int h = 0; h < SETS; h++) {
            products_begin();
#pragma unroll
            for (int p = 0; p < 4; p++) product8(part, operand8(plane + (h * (s.PLANE / 4) + p * 32) / 16), operand8(weight + p * 2), p > 0);
            products_end();
            const float upper = load_shared_f32(s.scales(used) + rows + h * 256), lower = load_shared_f32(s.scales(used) + rows + h * 256 + 32);
            if (h == 0) of_rows[0] = load_shared_f32(s.weight_scales(used)), of_rows[1] = load_shared_f32(s.weight_scales(used) + SCALE_BLOCK);
            if (h == SETS - 1) {
                // The next step is waited for while the last products of this one run.
                turn.template advance<DEPTH>();
                slot = turn.slot, plane = same(planes + slot * (s.PLANE / 16)), weight = same(weights + slot * (s.WEIGHTS / 16));
                if (step + 1 < steps) barrier_wait(s.full(slot), turn.parity);
            }
            products_wait<0>();
            hold(part);
            if (h == SETS - 1 && lane < 2) barrier_arrive_in(free + used * 8);
            float scale[2][2];
#pragma unroll
            for (int half = 0; half < 2; half++) scale[half][0] = of_rows[half] * upper, scale[half][1] = of_rows[half] * lower;
#pragma unroll
            for (int i = 0; i < QUANTISED_SUMS; i++) acc[h][i] = fmaf(part[i], scale[i / (QUANTISED_SUMS / 2)][i % 4 / 2], acc[h][i]);
        }
    }
}

// Without rows: it only gives the places back.
template <int DEPTH> DEVICE void quantised_nothing(const QuantisedShared<DEPTH> &s, Turn &turn, int steps, int lane) {
    const uint32_t free = in_block(s.empty(0), cluster_rank() ^ (lane & 1));
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        barrier_wait(s.full(turn.slot), turn.parity);
        if (lane < 2) barrier_arrive_in(free + turn.slot * 8);
        turn.template advance<DEPTH>();
    }
}

// Registers: two times 64 sums and 64 of one step; the other warps.
DEVICE void quantised_take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 224;"); }
DEVICE void quantised_give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 56;"); }

// What the warps of a block do: the first multiply, the `others` say themselves when they wait for the kernel before. `init`: by one thread.
template <class Init, class Multiply, class Others> DEVICE void quantised_roles(const Init &init, const Multiply &multiply, const Others &others) {
    if (threadIdx.x == 0) init();
    __syncthreads();
    cluster_sync();
    // The same in all lanes, and said so.
    const int warp = __shfl_sync(ALL_LANES, threadIdx.x / WARP, 0), lane = threadIdx.x & 31;
    if (warp < QUANTISED_CONSUMERS) {
        quantised_take_registers();
        wait_for_inputs();
        allow_next_kernel();
        multiply(warp, lane);
    } else {
        quantised_give_registers();
        others(warp, lane);
    }
    // Nobody leaves while the other block may still write to it.
    cluster_sync();
}

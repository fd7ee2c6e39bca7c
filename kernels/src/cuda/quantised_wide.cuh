// FP8 weights times quantised activations (plane.cuh) of many tokens, 256 tokens at a time.
//
// The activations are the products' 64-row operand, so a thread has two tokens of a product and needs two of their scales, and the weights'
// scale is the same for 64 of its 128 outputs: the sums of 128 inputs cost a multiply-add each to be scaled and added to the accumulators. With
// the weights as that operand a thread had 32 tokens, and what their scales took from shared memory was as much as the operands.
//
// A cluster of two blocks shares up to 256 activation rows, of which each brings half for both; each block has 128 rows of the weights. Both
// operands of a step of 128 inputs lie in shared memory. The weights' stream lies otherwise than a product wants it (stream.cuh), so it is copied
// as it lies, and each warp of the producing warpgroup turns two tiles of 2 KB where they lie into rows of 128 bytes. Two consumer warpgroups have 128 tokens each, as
// two sets of 64; while one adds its sums the other one's products run.
//
// A step: 1,024 cycles of the tensor cores; out of the second-level cache 16 KB of weights and 16 KB of activations a block; through shared
// memory 32 KB of activations and 16 KB of weights in, 32 and 64 KB of operands out.
#pragma once
#include "cluster.cuh"
#include "plane.cuh"
#include "stream.cuh"
#include "turn.cuh"
#include "wgmma8.cuh"

constexpr int QUANTISED_THREADS = 512, QUANTISED_BLOCKS = 2, QUANTISED_DEPTH = 3;
constexpr int QUANTISED_TOKENS = 256, QUANTISED_TILES = 8, QUANTISED_ROWS = QUANTISED_TILES * TILE_ROWS;
// Warps: eight that multiply, then four that bring operands, two tiles each, then one for each warpgroup that multiplies, which sends its results off.
constexpr int QUANTISED_CONSUMERS = 8, QUANTISED_PRODUCERS = 4, QUANTISED_SENDERS = QUANTISED_CONSUMERS + QUANTISED_PRODUCERS;
// Sums of a set for a thread: 64 tokens by the block's rows.
constexpr int QUANTISED_SUMS = QUANTISED_ROWS / 2;

// Addresses in shared memory.
struct QuantisedShared {
    // Of one step: activations, weights, and the scales of 256 rows of the one and two sets of 64 rows of the other; those as they were copied.
    static constexpr int PLANE = QUANTISED_TOKENS * 128, WEIGHTS = QUANTISED_ROWS * 128, SCALES = QUANTISED_TOKENS * 4 + 16 + 2 * 16;
    uint32_t planes;

    DEVICE uint32_t plane(int slot) const { return planes + slot * PLANE; }
    DEVICE uint32_t weights(int slot) const { return planes + QUANTISED_DEPTH * PLANE + slot * WEIGHTS; }
    DEVICE uint32_t scales(int slot) const { return planes + QUANTISED_DEPTH * (PLANE + WEIGHTS) + slot * SCALES; }
    DEVICE uint32_t weight_scales(int slot) const { return scales(slot) + QUANTISED_TOKENS * 4; }
    DEVICE uint32_t full(int slot) const { return scales(QUANTISED_DEPTH) + slot * 8; }
    DEVICE uint32_t empty(int slot) const { return full(QUANTISED_DEPTH) + slot * 8; }
    // A producing warp's tiles are there as they were copied.
    DEVICE uint32_t copied(int slot, int warp) const { return empty(QUANTISED_DEPTH) + (slot * QUANTISED_PRODUCERS + warp) * 8; }
    // A warpgroup may issue its next products.
    DEVICE uint32_t turn(int group) const { return copied(QUANTISED_DEPTH, 0) + group * 8; }
    // Behind all this.
    DEVICE uint32_t rest() const { return turn(2); }

    __device__ __forceinline__ explicit QuantisedShared(uint8_t *shared) {
        // Said to be more than an expression, or the compiler makes it again in every step.
        const uint32_t at = shared_address(shared);
        asm volatile("mov.u32 %0, %1;" : "=r"(planes) : "r"(at + (-at & 1023)));
    }

    // By one thread, before the blocks of the cluster meet.
    DEVICE void init() const {
        for (int i = 0; i < QUANTISED_DEPTH; i++) {
            // The copies' bytes and each producing warp; the consumers of both blocks.
            barrier_init(full(i), 1 + QUANTISED_PRODUCERS);
            barrier_init(empty(i), QUANTISED_BLOCKS * QUANTISED_CONSUMERS);
            for (int warp = 0; warp < QUANTISED_PRODUCERS; warp++) barrier_init(copied(i, warp), 1);
        }
        for (int group = 0; group < 2; group++) barrier_init(turn(group), QUANTISED_CONSUMERS / 2);
        barrier_init_fence();
    }
};

// A producing warp's weights: two tiles, FP8 or FP8_EXPERTS.
template <int F> struct QuantisedWeights {
    const uint8_t *from[2];  // the next step, or null
    uint32_t to;             // in a tile: the row that this lane gives to a matrix store
    int of, warp, lane;      // of: the next stage in its trio

    __device__ __forceinline__ QuantisedWeights(int warp, int lane) : of(0), warp(warp), lane(lane) {
        // Matrices: rows 0 to 7 and 8 to 15 of 16 inputs, then of the 16 behind them; units of 16 bytes are permuted by the row.
        const int matrix = lane / 8, row = lane % 8;
        to = matrix % 2 * PLANE_BLOCK + row * 128 + ((matrix / 2) ^ row) * 16;
    }

    // The first tile's scale as it is copied.
    DEVICE uint32_t scale_of(const QuantisedShared &s, int slot) const { return s.weight_scales(slot) + 16 + warp / 2 * 16; }

    // Asks for the next step, as it lies.
    DEVICE void copy(const QuantisedShared &s, int slot) {
        const bool scaled = warp % 2 == 0 && from[0];
        if (lane == 0) {
            const uint32_t barrier = s.copied(slot, warp);
            barrier_expect(barrier, (from[0] ? 2048 : 0) + (from[1] ? 2048 : 0) + (scaled ? 16 : 0));
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (from[i]) bulk_copy(s.weights(slot) + (warp * 2 + i) * 2048, from[i], 2048, barrier);
            if (scaled) bulk_copy(scale_of(s, slot), from[0] + (TRIOS<F> ? scale_block(of) - of * 2048 : 2048), 16, barrier);
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (from[i]) from[i] += Layout<F>::BYTES + (of == TRIO - 1 ? Layout<F>::LINE : 0);
        if (++of == TRIO) of = 0;
    }

    // Turns it into rows of a product's operand.
    DEVICE void turn(const QuantisedShared &s, int slot, uint32_t parity) const {
        barrier_wait(s.copied(slot, warp), parity);
        if (lane == 0 && warp % 2 == 0)
            asm volatile("st.shared.f32 [%0], %1;" ::"r"(s.weight_scales(slot) + warp / 2 * 4), "f"(load_shared_float(scale_of(s, slot))) : "memory");
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t tile = s.weights(slot) + (warp * 2 + i) * 2048;
            uint4 words[4];
#pragma unroll
            for (int p = 0; p < 4; p++) words[p] = load_shared16(tile + p * 512 + lane * 16);
            // All lanes have read before one writes.
            __syncwarp();
#pragma unroll
            for (int p = 0; p < 4; p++) {
                const uint4 &w = words[p];
                store_matrix4((tile + to) ^ (p * 32), __byte_perm(w.x, w.y, 0x6420), __byte_perm(w.x, w.y, 0x7531), __byte_perm(w.z, w.w, 0x6420),
                              __byte_perm(w.z, w.w, 0x7531));
            }
        }
    }
};

// The activations of one share of work.
struct QuantisedTokens {
    const uint8_t *plane, *scales;  // of the first row's block, in the next step
    size_t chunk_bytes;             // from one chunk of the plane to the next
    int columns;                    // a multiple of 8

    // Lane 0 of one warp: this block's half of a step for both blocks, and all its scales.
    DEVICE void copy(const QuantisedShared &s, int slot) {
        const uint32_t all = columns * 128, near = columns / 16 * PLANE_BLOCK;
        const uint32_t begin = cluster_rank() ? near : 0, mine = cluster_rank() ? all - near : near;
        barrier_expect(s.full(slot), all + columns * 4);
        if (mine) bulk_copy_to(3, s.plane(slot) + begin, plane + begin, mine, s.full(slot));
        bulk_copy(s.scales(slot), scales, columns * 4, s.full(slot));
        plane += chunk_bytes, scales += chunk_bytes / 32;
    }
};

// The producing warps' work, share by share from `begin` on: streams(share, i), the first stage of tile i of the block's eight or null, and tokens(share).
template <int F, class Streams, class Tokens>
DEVICE void quantised_bring(const QuantisedShared &s, int begin, int work, int stride, int steps, int warp, int lane, const Streams &streams, const Tokens &tokens) {
    QuantisedWeights<F> weights(warp, lane);
    QuantisedTokens of;
    Turn copied, turned;
    int share = begin, at = 0;  // of the next step that is copied
    const auto copy = [&] {
        if (share >= work) return;
        if (at == 0) {
#pragma unroll
            for (int i = 0; i < 2; i++) weights.from[i] = streams(share, warp * 2 + i);
            of = tokens(share), weights.of = 0;
        }
        barrier_wait(s.empty(copied.slot), copied.parity ^ 1);
        if (warp == 0 && lane == 0) of.copy(s, copied.slot);
        weights.copy(s, copied.slot);
        __syncwarp();
        copied.advance<QUANTISED_DEPTH>();
        if (++at == steps) at = 0, share += stride;
    };
    copy();
    for (int w = begin; w < work; w += stride) {
#pragma unroll 1
        for (int step = 0; step < steps; step++) {
            copy();
            weights.turn(s, turned.slot, turned.parity);
            fence_async_proxy();
            __syncwarp();
            if (lane == 0) barrier_arrive(s.full(turned.slot));
            turned.advance<QUANTISED_DEPTH>();
        }
    }
}

// Before the warpgroups' first products: group 0 begins.
DEVICE void quantised_first_turn(const QuantisedShared &s, int group, int lane) {
    if (group == 1 && lane == 0) barrier_arrive(s.turn(0));
}

// A consumer warp: the sums of all steps, of SETS sets of 64 tokens from `first` on by the block's 128 rows. TURNS: the other warpgroup has as
// many sets, and their products are issued in turn: then the one's sums are added while the other one's products run. `turns`: taken so far.
template <int SETS, bool TURNS>
DEVICE void quantised_products(const QuantisedShared &s, Turn &turn, uint32_t &turns, int steps, int first, int warp, int lane, float (&acc)[2][QUANTISED_SUMS]) {
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
    float part[QUANTISED_SUMS];
    const int group = warp / 4;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        const uint32_t slot = turn.slot;
        const uint32_t plane = __shfl_sync(ALL_LANES, planes + slot * (s.PLANE / 16), 0), weight = __shfl_sync(ALL_LANES, weights + slot * (s.WEIGHTS / 16), 0);
        barrier_wait(s.full(slot), turn.parity);
        const int2 of_rows = load_shared8(s.weight_scales(slot));
#pragma unroll
        for (int h = 0; h < SETS; h++) {
            if constexpr (TURNS) barrier_wait(s.turn(group), turns++ & 1);
            products_begin();
#pragma unroll
            for (int p = 0; p < 4; p++) product8(part, operand8(plane + (h * (s.PLANE / 4) + p * 32) / 16), operand8(weight + p * 2), p > 0);
            products_end();
            if (TURNS && lane == 0) barrier_arrive(s.turn(group ^ 1));
            const float upper = load_shared_float(s.scales(slot) + rows + h * 256), lower = load_shared_float(s.scales(slot) + rows + h * 256 + 32);
            products_wait<0>();
            hold(part);
            if (h == SETS - 1 && lane < 2) barrier_arrive_in(free + slot * 8);
            float scale[2][2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float of_half = __int_as_float(half ? of_rows.y : of_rows.x);
                scale[half][0] = of_half * upper, scale[half][1] = of_half * lower;
            }
#pragma unroll
            for (int i = 0; i < QUANTISED_SUMS; i++) acc[h][i] = fmaf(part[i], scale[i / (QUANTISED_SUMS / 2)][i % 4 / 2], acc[h][i]);
        }
        if (SETS == 0 && lane < 2) barrier_arrive_in(free + slot * 8);
        turn.advance<QUANTISED_DEPTH>();
    }
}

// Registers: two times 64 sums and 64 of one step; two tiles on their way; the senders' warpgroup.
DEVICE void quantised_take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 208;"); }
DEVICE void quantised_give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 72;"); }
DEVICE void quantised_give_most_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 24;"); }

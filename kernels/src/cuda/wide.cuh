// Many tokens times a weight, 256 tokens at a time: a weight is decoded once for all of them.
//
// A cluster of two blocks shares up to 256 activation rows; each block has eight 16-row tiles of the weights' streams, each of its two
// consumer warpgroups four of them. Two producer warps fill two rings: the block's own weights in steps of 128 inputs, and the plane in
// chunks of 64, of which each block brings half the rows for both. So a place of the plane's ring is free when both blocks have read it.
// Operations: 2 * 128 * K per activation row and block; bytes from the second-level cache a step: 8 tiles' stages and 32 KB of plane.
#pragma once
#include "cluster.cuh"
#include "decode.cuh"
#include "plane.cuh"
#include "turn.cuh"
#include "wgmma_wide.cuh"

constexpr int WIDE_TILES = 8, WIDE_COLUMNS = 256, WIDE_CHUNK = WIDE_COLUMNS * 128, WIDE_THREADS = 384, WIDE_BLOCKS = 2;
// Warps: eight that multiply, then these two, then those that send results off (linear/wide_staged.cu).
constexpr int WIDE_CONSUMERS = 8, WIDE_WEIGHTS_WARP = 8, WIDE_PLANE_WARP = 9, WIDE_SENDERS = 10;

template <int F> struct WideRing {
    // SCALES: where a step has the scale blocks of FP8 of experts, one for each four tiles, in a line of their own.
    static constexpr int BYTES = 128 / Layout<F>::K * Layout<F>::BYTES, SCALES = WIDE_TILES * BYTES, STEP = SCALES + Layout<F>::LINE;
#ifdef WIDE_STAGED  // results behind the rings: those are shorter then
    static constexpr int WEIGHTS = 3, PLANES = INT4<F> ? 4 : 3;
#else
    static constexpr int WEIGHTS = F == INT4_G128 ? 4 : F == INT4_G32 || E4M3<F> ? 3 : 2, PLANES = INT4<F> ? 5 : 4;
#endif
};

template <int F> struct WideShared {
    using Ring = WideRing<F>;
    uint8_t *planes, *weights;
    uint64_t *plane_full, *plane_empty, *weight_full, *weight_empty;
    uint8_t *rest;  // behind all this

    __device__ __forceinline__ explicit WideShared(uint8_t *shared) {
        planes = shared + (-shared_address(shared) & 1023);
        weights = planes + Ring::PLANES * WIDE_CHUNK;
        plane_full = reinterpret_cast<uint64_t *>(weights + Ring::WEIGHTS * Ring::STEP);
        plane_empty = plane_full + Ring::PLANES;
        weight_full = plane_empty + Ring::PLANES;
        weight_empty = weight_full + Ring::WEIGHTS;
        rest = reinterpret_cast<uint8_t *>(weight_empty + Ring::WEIGHTS);
        if (threadIdx.x == 0) {
            for (int i = 0; i < Ring::PLANES; i++) barrier_init(&plane_full[i], 1), barrier_init(&plane_empty[i], WIDE_BLOCKS * WIDE_CONSUMERS);
            for (int i = 0; i < Ring::WEIGHTS; i++) barrier_init(&weight_full[i], 1), barrier_init(&weight_empty[i], WIDE_CONSUMERS);
            barrier_init_fence();
        }
        __syncthreads();
        cluster_sync();
    }
};

// One warp: all steps of this block's tiles. Lane i < 8: `from`, tile i's stream, if it `has` one. FP8 of experts: lanes 8 and 9 likewise that
// of the first four tiles and of the others, for their scale blocks.
template <int F> DEVICE void wide_weights(const WideShared<F> &s, Turn &turn, const uint8_t *from, bool has, int steps, int lane) {
    using Ring = WideRing<F>;
    const unsigned holding = __ballot_sync(ALL_LANES, has), tiles = (1u << WIDE_TILES) - 1;
    const uint32_t held = __popc(holding & tiles) * Ring::BYTES + (TRIOS<F> ? __popc(holding & ~tiles) * SCALE_BLOCK : 0);
    const bool scales = TRIOS<F> && lane >= WIDE_TILES;
    const uint32_t bytes = scales ? SCALE_BLOCK : Ring::BYTES, to = scales ? Ring::SCALES + (lane - WIDE_TILES) * SCALE_BLOCK : lane * Ring::BYTES;
    // From one stage of a trio to the next, and what else there is from its last one to the next trio.
    const int next = scales ? -SCALE_BLOCK : Ring::BYTES, turned = scales ? TRIO_BYTES<F> + TRIO * SCALE_BLOCK : Layout<F>::LINE;
    int of = 0;
    from += scales ? scale_offset<F>(0) : stage_offset<F>(0);
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        barrier_wait(&s.weight_empty[turn.slot], turn.parity ^ 1);
        if (lane == 0) barrier_expect(&s.weight_full[turn.slot], held);
        __syncwarp();
        if (has) bulk_copy(s.weights + turn.slot * Ring::STEP + to, from, bytes, &s.weight_full[turn.slot]);
        from += next;
        if (TRIOS<F> && ++of == TRIO) of = 0, from += turned;
        turn.template advance<Ring::WEIGHTS>();
    }
}

// One warp: this block's half of `columns` (a multiple of 8) rows of the plane, for both blocks. `from`: the first row's block in the first chunk.
template <int F> DEVICE void wide_planes(const WideShared<F> &s, Turn &turn, const uint8_t *from, size_t chunk_bytes, int columns, int steps, int lane) {
    const uint32_t all = columns * 128, near = columns / 16 * PLANE_BLOCK;
    const uint32_t begin = cluster_rank() ? near : 0, mine = cluster_rank() ? all - near : near;
    from += begin;
#pragma unroll 1
    for (int chunk = 0; chunk < 2 * steps; chunk++) {
        barrier_wait(&s.plane_empty[turn.slot], turn.parity ^ 1);
        if (lane == 0) {
            barrier_expect(&s.plane_full[turn.slot], all);
            if (mine) bulk_copy_to(3, s.planes + turn.slot * WIDE_CHUNK + begin, from, mine, &s.plane_full[turn.slot]);
        }
        __syncwarp();
        from += chunk_bytes;
        turn.template advance<WideRing<F>::PLANES>();
    }
}

// A consumer warp's sums of all steps for N activation rows. `Source`: what it multiplies (decode.cuh).
template <int F, int N, class Source>
DEVICE void wide_products(const WideShared<F> &s, Turn &weight, Turn &plane, Source &source, int steps, int lane, float (&acc)[WIDE_SUMS]) {
    using Ring = WideRing<F>;
#pragma unroll
    for (int i = 0; i < N / 2; i++) acc[i] = 0.f;
    const uint32_t planes = shared_address(s.planes), weights = shared_address(s.weights);
    // Lane 0 gives a place back to this block, lane 1 to the other one.
    const uint32_t free = in_block(shared_address(s.plane_empty), cluster_rank() ^ (lane & 1));
    uint32_t a[2][4] = {}, used = 0;
    barrier_wait(&s.weight_full[weight.slot], weight.parity);
    uint32_t at = weights + weight.slot * Ring::STEP;
    source.fetch(at, 0, 0, true);
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const bool last = half == 1 && i == 3;
                source.make(i, half == 0 && i == 0, a[i & 1]);
                if (i == 0) barrier_wait(&s.plane_full[plane.slot], plane.parity);
                products_begin();
                WideProduct<N>::run(acc, a[i & 1], plane_descriptor(planes + plane.slot * WIDE_CHUNK) + i * 2);
                products_end();
                // What the next product needs comes while this one runs.
                if (!last) {
                    source.fetch(at, half + (i + 1) / 4, (i + 1) % 4, false);
                } else {
                    if (lane == 0) barrier_arrive(&s.weight_empty[weight.slot]);
                    weight.template advance<Ring::WEIGHTS>();
                    at = weights + weight.slot * Ring::STEP;
                    if (step + 1 < steps) {
                        barrier_wait(&s.weight_full[weight.slot], weight.parity);
                        source.fetch(at, 0, 0, true);
                    }
                }
                products_wait<1>();
                // The product before has ended: only now may its operands' registers be used again, which the compiler does not see across
                // the loop's turn (tests/gpu/operand_registers.py does). At a chunk's first product the chunk before is free.
                hold_operands(a[(i & 1) ^ 1]);
                if (i == 0 && (half == 1 || step > 0) && lane < 2) barrier_arrive_in(free + used * 8);
            }
            used = plane.slot;
            plane.template advance<Ring::PLANES>();
        }
    }
    products_wait<0>();
    hold_operands(a[1]);
    if (lane < 2) barrier_arrive_in(free + used * 8);
#pragma unroll
    for (int i = 0; i < N / 2; i++) asm volatile("" : "+f"(acc[i])::"memory");
}

// The same for so many columns, a multiple of 32.
template <int F, class Source>
DEVICE void wide_products_of(int columns, const WideShared<F> &s, Turn &weight, Turn &plane, Source &source, int steps, int lane, float (&acc)[WIDE_SUMS]) {
    switch (columns) {
        case 32: wide_products<F, 32>(s, weight, plane, source, steps, lane, acc); break;
        case 64: wide_products<F, 64>(s, weight, plane, source, steps, lane, acc); break;
        case 96: wide_products<F, 96>(s, weight, plane, source, steps, lane, acc); break;
        case 128: wide_products<F, 128>(s, weight, plane, source, steps, lane, acc); break;
        case 160: wide_products<F, 160>(s, weight, plane, source, steps, lane, acc); break;
        case 192: wide_products<F, 192>(s, weight, plane, source, steps, lane, acc); break;
        case 224: wide_products<F, 224>(s, weight, plane, source, steps, lane, acc); break;
        default: wide_products<F, 256>(s, weight, plane, source, steps, lane, acc);
    }
}

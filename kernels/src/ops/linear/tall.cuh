// y[t, o] = sum over i of x[t, i] w[o, i] (+ residual) for up to 16 tokens of a decode step, in one part; x is a plane.
//
// A block has 64 rows and all inputs, or, where rows alone do not occupy the device, a pair of blocks has them, each half of the inputs. Its
// four warpgroups have a quarter of the block's inputs each, and their sums meet in shared memory. So nothing is left in parts for a reader to
// add, and the sums of squares of 32 outputs, which the norm behind wants, leave with the results.
// Each of its sixteen warps asks for its own tile's bytes, a seventeenth for the plane: one warp that asked for all of it, one copy after the other,
// was what all others waited for. Rings are short and threads few, so that a block of the kernel before it (the exchange's combine) or behind it
// (attention) is on the multiprocessor beside it: what that one reads is on its way while this one computes.
// Bytes: the weight's stream once; the plane once a block, from the second-level cache.
#pragma once
#include "../../cuda/cluster.cuh"
#include "../../cuda/decode.cuh"
#include "../../cuda/plane.cuh"
#include "../../cuda/wgmma.cuh"

constexpr int TALL_SEGMENTS = 3, TALL_TOKENS = 16, TALL_ROWS = 64, TALL_TILES = TALL_ROWS / TILE_ROWS, QUARTERS = 4;
constexpr int TALL_WARPS = QUARTERS * TALL_TILES, TALL_CONSUMERS = TALL_WARPS * WARP, TALL_THREADS = TALL_CONSUMERS + WARP, TALL_MOST_DEPTH = 6;
// A chunk of 64 inputs of the plane, which has as many rows as this kernel takes, and the two of a step of 128 inputs for each quarter.
constexpr int TALL_BLOCKS = TALL_TOKENS / PLANE_ROWS, TALL_CHUNK = TALL_BLOCKS * PLANE_BLOCK, TALL_PLANE = QUARTERS * 2 * TALL_CHUNK, PLANE_DEPTH = 2;
// Floats of a token's sums of one quarter: four more than rows, so that the lanes of a warp touch all banks.
constexpr int TALL_STRIDE = TALL_ROWS + 4;

struct TallParams {
    Weight segments[TALL_SEGMENTS];  // side by side in y; rows are multiples of 64
    const uint8_t *plane;            // [K / 64][TALL_BLOCKS][1024]
    float *y;                        // [tokens, width]
    const float *residual;           // or null; may be y
    float *squares;                  // [tokens][width / 32]: sums of squares of y, or null
    int tokens, width, steps;        // steps: of 128 inputs, a multiple of 4, of pairs of 8
    int depth;                       // steps that a warp's ring holds, at most TALL_MOST_DEPTH
};

struct TallProduct {
    static DEVICE void run(float (&d)[8], const uint32_t (&a)[4], uint64_t b) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, 1, 1, 1, 0;"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
};

// What a warp reads: a tile's stages of a quarter of the block's inputs, one a step.
struct TallShare {
    const uint8_t *weights;
    int steps, first, bf16_scales;  // steps of a quarter; the quarter's first
};

template <int F> DEVICE TallShare tall_share(const TallParams &p, int set, int quarter, int tile_of_set, int rank, int ranks) {
    int tile = set * TALL_TILES;
    const Weight &w = segment_of(p.segments, tile);
    const int steps = p.steps / (QUARTERS * ranks), first = (rank * QUARTERS + quarter) * steps;
    const size_t at = static_cast<size_t>(tile + tile_of_set) * w.stages + first;
    return {w.stream + at * Layout<F>::BYTES, steps, first, w.bf16_scales};
}

// Places in shared memory and barriers.
struct TallRings {
    uint8_t *planes, *weights;                  // [PLANE_DEPTH][TALL_PLANE]; this warp's [depth] stages
    uint64_t *plane_full, *plane_empty, *full;  // [PLANE_DEPTH]; this warp's [depth]
};

// The plane's steps, by one warp: a quarter's chunks a lane. `first`: the block's first step.
DEVICE void tall_planes(const TallParams &p, const TallRings &rings, int steps, int first, int lane) {
    for (int step = 0; step < steps; step++) {
        const int slot = step % PLANE_DEPTH;
        if (step >= PLANE_DEPTH) barrier_wait(&rings.plane_empty[slot], (step / PLANE_DEPTH & 1) ^ 1);
        if (lane == 0) barrier_expect(&rings.plane_full[slot], TALL_PLANE);
        __syncwarp();
        if (lane < QUARTERS)
            bulk_copy(rings.planes + slot * TALL_PLANE + lane * 2 * TALL_CHUNK, p.plane + static_cast<size_t>(first + lane * steps + step) * 2 * TALL_CHUNK,
                      2 * TALL_CHUNK, &rings.plane_full[slot]);
    }
}

// A warp's weights of a step into a slot of its ring, by one lane.
template <int F> DEVICE void tall_weights(const TallShare &share, const TallRings &rings, int slot, int step) {
    constexpr int BYTES = Layout<F>::BYTES;
    barrier_expect(&rings.full[slot], BYTES);
    bulk_copy(rings.weights + slot * BYTES, share.weights + static_cast<size_t>(step) * BYTES, BYTES, &rings.full[slot]);
}

// A warp's sums of its quarter. Formats with one scale a row or tile and stage: a step's sums are scaled, not its weights.
template <int F> DEVICE void tall_consume(const TallParams &p, const TallShare &share, const TallRings &rings, int quarter, int lane, float (&acc)[8]) {
    static_assert(F == INT4_G128 || F == FP8);
    TileDecoder<F> decoder;
    float part[8];  // of one step
#pragma unroll
    for (int i = 0; i < 8; i++) acc[i] = 0.f;
    int slot = 0;
    uint32_t parity = 0;
#pragma unroll 1
    for (int step = 0; step < share.steps; step++) {
        const int plane_slot = step % PLANE_DEPTH;
        barrier_wait(&rings.full[slot], parity);
        barrier_wait(&rings.plane_full[plane_slot], step / PLANE_DEPTH & 1);
        const uint32_t mine = shared_address(rings.weights + slot * Layout<F>::BYTES);
        const uint32_t plane = shared_address(rings.planes + plane_slot * TALL_PLANE) + quarter * 2 * TALL_CHUNK;
#pragma unroll
        for (int i = 0; i < 8; i++) part[i] = 0.f;
        uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint64_t b = plane_descriptor(plane + i / 4 * TALL_CHUNK + i % 4 * 32);
            decoder.fetch(mine, 0, i / 4, i % 4, lane, i == 0);
            decoder.make_unscaled(i % 4, i == 0, a[i & 1]);
            products_begin();
            TallProduct::run(part, a[i & 1], b);
            products_end();
            if (i < 7) products_wait<1>();  // the operands of product i - 1 are free
        }
        products_wait<0>();
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(&rings.plane_empty[plane_slot]);
            if (step + p.depth < share.steps) tall_weights<F>(share, rings, slot, step + p.depth);
        }
        if (++slot == p.depth) slot = 0, parity ^= 1;
        hold(part);
        float upper, lower;
        decoder.row_scales(share.bf16_scales, upper, lower);
#pragma unroll
        for (int i = 0; i < 8; i++) acc[i] = fmaf(part[i], i % 4 < 2 ? upper : lower, acc[i]);
    }
}

template <int F, bool PAIR> DEVICE void linear_tall(const TallParams &p) {
    extern __shared__ uint8_t shared[];
    constexpr int EACH = TALL_TOKENS * TALL_ROWS / TALL_CONSUMERS, TOKEN_STEP = TALL_CONSUMERS / TALL_ROWS;
    __shared__ uint64_t plane_barriers[2 * PLANE_DEPTH], barriers[TALL_WARPS][TALL_MOST_DEPTH];
    __shared__ float sums[QUARTERS][TALL_TOKENS][TALL_STRIDE], other[PAIR ? TALL_TOKENS : 1][TALL_ROWS];
    if constexpr (PAIR) cluster_arrive();
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, quarter = warp / TALL_TILES;
    const int rank = PAIR ? blockIdx.x % 2 : 0, set = PAIR ? blockIdx.x / 2 : blockIdx.x;
    const TallShare share = tall_share<F>(p, set, quarter % QUARTERS, warp % TALL_TILES, rank, PAIR ? 2 : 1);
    uint8_t *planes = shared + (-shared_address(shared) & 1023);
    const TallRings rings = {planes, planes + PLANE_DEPTH * TALL_PLANE + warp * p.depth * Layout<F>::BYTES, plane_barriers, plane_barriers + PLANE_DEPTH,
                             barriers[warp % TALL_WARPS]};
    if (lane == 0) {
        if (warp == TALL_WARPS) {
            for (int i = 0; i < PLANE_DEPTH; i++) barrier_init(&rings.plane_full[i], 1), barrier_init(&rings.plane_empty[i], TALL_WARPS);
            barrier_init_fence();
        } else {
            for (int i = 0; i < p.depth; i++) barrier_init(&rings.full[i], 1);
            barrier_init_fence();
            for (int i = 0; i < min(p.depth, share.steps); i++) tall_weights<F>(share, rings, i, i);
        }
    }
    __syncthreads();
    float y[EACH];
    // A warp has 32 neighbouring rows of a token.
    const int row = threadIdx.x % TALL_ROWS, column = set * TALL_ROWS + row, token0 = threadIdx.x / TALL_ROWS;
    wait_for_inputs();
    allow_next_kernel();
    if (warp == TALL_WARPS) {
        tall_planes(p, rings, share.steps, share.first, lane);
    } else {
        float acc[8];
        tall_consume<F>(p, share, rings, quarter, lane, acc);
        float *to = &sums[quarter][2 * (lane & 3)][warp % TALL_TILES * TILE_ROWS + (lane >> 2)];
#pragma unroll
        for (int i = 0; i < 8; i++) to[(i / 4 * 8 + i % 2) * TALL_STRIDE + i % 4 / 2 * 8] = acc[i];
        asm volatile("bar.sync 1, %0;" ::"n"(TALL_CONSUMERS) : "memory");
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int token = token0 + i * TOKEN_STEP;
            y[i] = (sums[0][token][row] + sums[1][token][row]) + (sums[2][token][row] + sums[3][token][row]);
        }
    }
    if constexpr (PAIR) {
        cluster_wait();  // both blocks are there
        if (rank == 1 && warp < TALL_WARPS)
#pragma unroll
            for (int i = 0; i < EACH; i++) store_in(in_block(shared_address(&other[token0 + i * TOKEN_STEP][row]), 0), y[i]);
        cluster_sync();
        if (rank == 1) return;
    }
    if (warp == TALL_WARPS) return;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int token = token0 + i * TOKEN_STEP;
        const bool there = token < p.tokens;
        if constexpr (PAIR) y[i] += other[token][row];
        const size_t at = static_cast<size_t>(token) * p.width + column;
        if (there && p.residual) y[i] += p.residual[at];
        if (there) p.y[at] = y[i];
        if (p.squares) {
            const float square = warp_sum(there ? y[i] * y[i] : 0.f);
            if (lane == 0 && there) p.squares[static_cast<size_t>(token) * (p.width / WARP) + column / WARP] = square;
        }
    }
}

// Many tokens times a weight, on the warpgroup tensor cores.
//
// A tile of work is 256 weight rows x up to 128 activation rows. Two consumer warpgroups own 128 weight rows each, as
// two sets of 64 (each warp one 16-row tile of the stream per set); a producer warp fills a ring of steps of 128 inputs:
// the 16 tiles' stages and the plane's two chunks. Weights go from shared memory through registers, where they become
// bf16 with their scales applied, straight into the products. Operations: 2 * rows * K per activation row.
#pragma once
#include "decode.cuh"
#include "plane.cuh"
#include "stream.cuh"
#include "wgmma_few.cuh"

// Sets of 64 weight rows of a warpgroup, the warpgroups that multiply, and most activation rows.
constexpr int SETS = 2, GEMM_CONSUMERS = 2, GEMM_THREADS = (GEMM_CONSUMERS + 1) * 128;
constexpr int GEMM_ROWS = 64 * SETS * GEMM_CONSUMERS, GEMM_COLUMNS = 128;
constexpr int GEMM_TILES = GEMM_ROWS / TILE_ROWS;
constexpr int STEP_INPUTS = 128;
constexpr int STEP_CHUNKS = 2;

template <int F> constexpr int STEP_STAGES = STEP_INPUTS / Layout<F>::K;
template <int F> constexpr int STEP_WEIGHTS = GEMM_TILES *STEP_STAGES<F> *Layout<F>::BYTES;
constexpr int STEP_PLANE = STEP_CHUNKS * GEMM_COLUMNS * 128;
// Weights, then planes aligned to 1024.
template <int F> constexpr int STEP_BYTES = (STEP_WEIGHTS<F> + 1023) / 1024 * 1024 + STEP_PLANE;
constexpr int RING_ROOM = 225 * 1024, MOST_DEPTH_OF_RING = 4;
template <int F> constexpr int GEMM_DEPTH = RING_ROOM / STEP_BYTES<F> < MOST_DEPTH_OF_RING ? RING_ROOM / STEP_BYTES<F> : MOST_DEPTH_OF_RING;

// One tile of work.
struct GemmTile {
    const uint8_t *set[SETS * GEMM_CONSUMERS];  // the 64-row sets' streams: warpgroup w has 2w and 2w + 1
    int sets_tiles[SETS * GEMM_CONSUMERS];      // tiles of each set that exist (0 to 4)
    const uint8_t *plane;                    // chunk 0 of the first activation row's block
    size_t chunk_bytes;                      // from one chunk of the plane to the next
    int steps, columns;                      // columns: 32, 64, 96 or 128
    int tile_steps;                          // of the whole stream: `steps` may be a part of them
};

struct GemmRing {
    uint8_t *slots;
    uint64_t *full, *empty;
    uint32_t slot, parity;
    template <int F> DEVICE void advance() {
        if (++slot == GEMM_DEPTH<F>) slot = 0, parity ^= 1;
    }
};

// The producer's share of one tile: one warp. Lane i < 16 copies tile i of the 256 rows, lanes 16 and 17 the two chunks of
// the plane.
template <int F> struct Producer {
    static constexpr int BYTES = STEP_STAGES<F> * Layout<F>::BYTES;
    const GemmTile &tile;
    uint32_t plane_bytes;
    int held, lane;
    bool has_tile;

    __device__ __forceinline__ Producer(const GemmTile &t, int l) : tile(t), plane_bytes(t.columns * 128), held(0), lane(l) {
        for (int s = 0; s < SETS * GEMM_CONSUMERS; s++) held += t.sets_tiles[s];
        has_tile = l < GEMM_TILES && l % 4 < t.sets_tiles[l / 4 % (SETS * GEMM_CONSUMERS)];
    }

    __device__ __forceinline__ void weights(uint8_t *slot, uint64_t *full, int step) const {
        if (lane == 0) barrier_expect(full, held * BYTES + STEP_CHUNKS * plane_bytes);
        __syncwarp();
        const size_t each = tile_bytes<F>(tile.tile_steps * STEP_STAGES<F>);
        if (has_tile) bulk_copy(slot + lane * BYTES, tile.set[lane / 4] + lane % 4 * each + stage_offset<F>(step * STEP_STAGES<F>), BYTES, full);
    }

    __device__ __forceinline__ void plane(uint8_t *slot, uint64_t *full, int step) const {
        const int chunk = lane - GEMM_TILES;
        uint8_t *to = slot + STEP_BYTES<F> - STEP_PLANE;
        if (chunk >= 0 && chunk < STEP_CHUNKS)
            bulk_copy(to + chunk * plane_bytes, tile.plane + (static_cast<size_t>(step) * STEP_CHUNKS + chunk) * tile.chunk_bytes,
                      plane_bytes, full);
    }
};

// Asks for the weights of a block's first steps, before the plane is there: into a ring that nobody has used. How many.
template <int F> DEVICE int produce_weights(const GemmTile &tile, GemmRing &ring, int lane) {
    const Producer<F> producer(tile, lane);
    const int ready = min(tile.steps, GEMM_DEPTH<F>);
    for (int step = 0; step < ready; step++) producer.weights(ring.slots + step * STEP_BYTES<F>, &ring.full[step], step);
    return ready;
}

// All steps of a tile; the weights of the first `ready` have been asked for.
template <int F> DEVICE void produce(const GemmTile &tile, GemmRing &ring, int lane, int ready = 0) {
    const Producer<F> producer(tile, lane);
    for (int step = 0; step < tile.steps; step++) {
        uint8_t *slot = ring.slots + ring.slot * STEP_BYTES<F>;
        uint64_t *full = &ring.full[ring.slot];
        if (step >= ready) {
            barrier_wait(&ring.empty[ring.slot], ring.parity ^ 1);
            producer.weights(slot, full, step);
        }
        producer.plane(slot, full, step);
        ring.template advance<F>();
    }
}

// Of few tokens it is cheaper to scale a step's sums than its weights.
template <int F, int N> constexpr bool SUMS_SCALED = (F == INT4_G128 || F == FP8) && N <= 64;

// A consumer warpgroup's share of one tile: acc[set] over all steps. `warpgroup`: 0 or 1; `warp`: in the warpgroup.
template <int F, int N>
DEVICE void consume(const GemmTile &tile, GemmRing &ring, int warpgroup, int warp, int lane, int bf16_scales, float (&acc)[SETS][N / 2]) {
    static_assert(!TRIOS<F>, "experts that become bf16 have kernels of 256 rows");
    constexpr int BYTES = STEP_STAGES<F> * Layout<F>::BYTES;
    constexpr bool SUMS = SUMS_SCALED<F, N>;
#pragma unroll
    for (int h = 0; h < SETS; h++)
#pragma unroll
        for (int i = 0; i < N / 2; i++) acc[h][i] = 0.f;
    TileDecoder<F> decoder[SETS];
    float part[SETS][N / 2];  // SUMS: of one step
    const auto multiply = [&](const uint32_t(&a)[SETS][4], uint64_t b) {
#pragma unroll
        for (int h = 0; h < SETS; h++) FewProduct<N>::template run<true>(SUMS ? part[h] : acc[h], a[h], b);
    };
#pragma unroll 1
    for (int step = 0; step < tile.steps; step++) {
        barrier_wait(&ring.full[ring.slot], ring.parity);
        const uint32_t slot = shared_address(ring.slots + ring.slot * STEP_BYTES<F>), mine = slot + (warpgroup * SETS * 4 + warp) * BYTES;
        const uint32_t plane = slot + STEP_BYTES<F> - STEP_PLANE;
        if constexpr (SUMS) {
#pragma unroll
            for (int h = 0; h < SETS; h++)
#pragma unroll
                for (int i = 0; i < N / 2; i++) part[h][i] = 0.f;
        }
        uint32_t a[2][SETS][4];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint64_t b = plane_descriptor(plane + (i / 4) * (N * 128) + (i % 4) * 32);
#pragma unroll
            for (int h = 0; h < SETS; h++) {
                decoder[h].fetch(mine + h * 4 * BYTES, 0, i / 4, i % 4, lane, i == 0);
                if constexpr (SUMS)
                    decoder[h].make_unscaled(i % 4, i == 0, a[i & 1][h]);
                else
                    decoder[h].make(i % 4, bf16_scales, i == 0, a[i & 1][h]);
            }
            products_begin();
            multiply(a[i & 1], b);
            if constexpr (F == F32) {
                uint32_t low[SETS][4];
#pragma unroll
                for (int h = 0; h < SETS; h++) decoder[h].make_low(mine + h * 4 * BYTES, i / 4, i % 4, lane, low[h]);
                products_begin();
                multiply(low, b);
                products_end();
                products_wait<0>();
            } else {
                products_end();
                if (i < 7) products_wait<1>();  // the operands of product i - 1 are free
            }
        }
        products_wait<0>();
        if (lane == 0) barrier_arrive(&ring.empty[ring.slot]);
        ring.template advance<F>();
        if constexpr (SUMS) {
#pragma unroll
            for (int h = 0; h < SETS; h++) {
                hold(part[h]);
                float upper, lower;
                decoder[h].row_scales(bf16_scales, upper, lower);
#pragma unroll
                for (int i = 0; i < N / 2; i++) acc[h][i] = fmaf(part[h][i], i % 4 < 2 ? upper : lower, acc[h][i]);
            }
        }
    }
#pragma unroll
    for (int h = 0; h < SETS; h++) hold(acc[h]);
}

// Shared memory of the ring; the barriers stand behind it.
template <int F> DEVICE GemmRing ring_in(uint8_t *shared) {
    uint8_t *slots = shared + (-shared_address(shared) & 1023);
    uint64_t *barriers = reinterpret_cast<uint64_t *>(slots + GEMM_DEPTH<F> * STEP_BYTES<F>);
    if (threadIdx.x == 0) {
        for (int i = 0; i < GEMM_DEPTH<F>; i++) {
            barrier_init(&barriers[i], 1);
            barrier_init(&barriers[GEMM_DEPTH<F> + i], GEMM_CONSUMERS * 4);
        }
        barrier_init_fence();
    }
    __syncthreads();
    return {slots, barriers, barriers + GEMM_DEPTH<F>, 0, 0};
}

// More registers for the warpgroups that multiply, fewer for the one that copies.
DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 232;"); }
DEVICE void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 40;"); }

// Width of the products for so many columns.
DEVICE int product_columns(int columns) { return min(GEMM_COLUMNS, ceil_div(columns, 32) * 32); }

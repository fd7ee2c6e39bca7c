// y[t, o] = sum over i of x[t, i] w[o, i] (+ residual) for FP8 weights and up to 128 quantised activations; x is a quantised plane. The inputs can be cut into
// parts. linear_few_quantised16: the results as BF16.
//
// A block has 64 weight rows of a part of the inputs, its two warpgroups half of those each. Both operands lie in shared memory as they do in device
// memory: weights are the products' 64-row operand, tokens the other one, so that no product is wider than there are tokens. What the 128 inputs of a step
// add up to is scaled and added to the accumulators, as for many tokens (quantised_wide.cuh), while the other warpgroup multiplies.
// Bytes: the weight once; the plane once a block, from the second-level cache. Blocks of a cluster that share it start later by a microsecond than they gain.
#include "../../cuda/plane.cuh"
#include "../../cuda/turn.cuh"
#include "../../cuda/wgmma8.cuh"
#include "few_results.cuh"

constexpr int QUANTISED_TILES = 4, HALVES = 2, QUANTISED_DEPTH = 6, CONSUMERS = HALVES * QUANTISED_TILES, QUANTISED_THREADS = (CONSUMERS + 2) * WARP;

// Addresses in shared memory: a ring of steps, which the warpgroups take in turn.
template <int N> struct QuantisedFew {
    static constexpr int PLANE = N * 128, WEIGHTS = QUANTISED_TILES * TILE_ROWS * 128, SCALES = N * 4 + SCALE_BLOCK, STEP = PLANE + WEIGHTS + SCALES;
    uint32_t planes;
    FewResults<N, QUANTISED_TILES, HALVES> results;
    DEVICE uint32_t plane(int slot) const { return planes + slot * PLANE; }
    DEVICE uint32_t weights(int slot) const { return planes + QUANTISED_DEPTH * PLANE + slot * WEIGHTS; }
    DEVICE uint32_t scales(int slot) const { return planes + QUANTISED_DEPTH * (PLANE + WEIGHTS) + slot * SCALES; }
    DEVICE uint32_t weight_scale(int slot) const { return scales(slot) + N * 4; }
    DEVICE uint32_t full(int slot) const { return results.room + results.BYTES + slot * 8; }
    DEVICE uint32_t empty(int slot) const { return full(QUANTISED_DEPTH) + slot * 8; }
    __device__ __forceinline__ explicit QuantisedFew(uint8_t *shared) {
        const uint32_t at = shared_address(shared);
        planes = at + (-at & 1023);
        results.room = scales(QUANTISED_DEPTH);
    }
};

// A block's share: 64 rows, and a part of the inputs in steps of 128, of which the first warpgroup has `half`.
struct QuantisedShare {
    int first_tile, part, first, count, half;
    __device__ __forceinline__ explicit QuantisedShare(const GemmParams &p) {
        const int m_tiles = ceil_div(p.tiles, QUANTISED_TILES), each = ceil_div(p.steps, p.parts);
        first_tile = blockIdx.x % m_tiles * QUANTISED_TILES, part = blockIdx.x / m_tiles;
        first = min(part * each, p.steps), count = min(each, p.steps - first), half = ceil_div(count, HALVES);
    }
    // The step of the ring's place i, from place 0 on.
    DEVICE int step(int i) const { return first + i % HALVES * half + i / HALVES; }
};

// One warp: all steps' weights. Lanes: the tiles, and behind them one for the scale of all.
template <int N> DEVICE void bring_weights(const GemmParams &p, const QuantisedFew<N> &s, const QuantisedShare &share, int lane) {
    constexpr int STAGE = TILE_ROWS * 128;
    const bool scale = lane == QUANTISED_TILES;
    // Past the last tile: it again.
    int at = min(share.first_tile + (scale ? 0 : lane), p.tiles - 1);
    const Weight &weight = segment_of(p.segments, at);
    const uint8_t *const from = weight.stream + at * tile_bytes<FP8>(weight.stages) + (scale ? STAGE : 0);
    const uint64_t policy = evict_first_policy();
    Turn turn;
#pragma unroll 1
    for (int i = 0; i < share.count; i++) {
        barrier_wait(s.empty(turn.slot), turn.parity ^ 1);
        if (lane == 0) barrier_expect(s.full(turn.slot), s.WEIGHTS + SCALE_BLOCK);
        __syncwarp();
        if (lane <= QUANTISED_TILES)
            bulk_copy_once(scale ? s.weight_scale(turn.slot) : s.weights(turn.slot) + lane * STAGE, from + stage_offset<FP8>(share.step(i)),
                           scale ? SCALE_BLOCK : STAGE, s.full(turn.slot), policy);
        turn.template advance<QUANTISED_DEPTH>();
    }
}

// One thread: all steps' tokens and their scales.
template <int N> DEVICE void bring_tokens(const GemmParams &p, const QuantisedFew<N> &s, const QuantisedShare &share) {
    const size_t chunk_bytes = static_cast<size_t>(p.blocks) * PLANE_BLOCK;
    const uint8_t *const scales = p.plane + p.steps * chunk_bytes;
    Turn turn;
#pragma unroll 1
    for (int i = 0; i < share.count; i++) {
        const size_t step = share.step(i);
        barrier_wait(s.empty(turn.slot), turn.parity ^ 1);
        barrier_expect(s.full(turn.slot), s.PLANE + N * 4);
        bulk_copy(s.plane(turn.slot), p.plane + step * chunk_bytes, s.PLANE, s.full(turn.slot));
        bulk_copy(s.scales(turn.slot), scales + step * (chunk_bytes / 32), N * 4, s.full(turn.slot));
        turn.template advance<QUANTISED_DEPTH>();
    }
}

// A warpgroup's sums of its half of the steps.
template <int N> DEVICE void multiply(const QuantisedFew<N> &s, const QuantisedShare &share, int half, int lane, float (&acc)[N / 2]) {
    float part[N / 2];
    Turn turn;
    if (half) turn.template advance<QUANTISED_DEPTH>();
#pragma unroll
    for (int i = 0; i < N / 2; i++) acc[i] = 0.f;
#pragma unroll 1
    for (int i = half; i < share.count; i += HALVES) {
        barrier_wait(s.full(turn.slot), turn.parity);
        const uint32_t weights = static_cast<uint32_t>(plane_descriptor(s.weights(turn.slot))), tokens = static_cast<uint32_t>(plane_descriptor(s.plane(turn.slot)));
        products_begin();
#pragma unroll
        for (int k = 0; k < 4; k++) product8(part, operand8(weights + k * 2), operand8(tokens + k * 2), k > 0);
        products_end();
        const float of_rows = load_shared_f32(s.weight_scale(turn.slot));
        // Of the lane's tokens, times that: as many as there are registers for while products run.
        constexpr int PAIRS = N / 8, EARLY = N <= 96 ? PAIRS : PAIRS / 2;
        float scale[N / 4];
        const auto fetch = [&](int j) {
            const int2 v = load_shared8(s.scales(turn.slot) + j * 32 + (lane & 3) * 8);
            scale[2 * j] = __int_as_float(v.x) * of_rows, scale[2 * j + 1] = __int_as_float(v.y) * of_rows;
        };
#pragma unroll
        for (int j = 0; j < EARLY; j++) fetch(j);
        products_wait<0>();
        hold(part);
        const auto add = [&](int from, int to) {
#pragma unroll
            for (int j = 4 * from; j < 4 * to; j++) acc[j] = fmaf(part[j], scale[j / 4 * 2 + j % 2], acc[j]);
        };
        const auto give_back = [&] {
            __syncwarp();
            if (lane == 0) barrier_arrive(s.empty(turn.slot));
        };
        if constexpr (EARLY == PAIRS) give_back();
        add(0, EARLY);
        if constexpr (EARLY < PAIRS) {
#pragma unroll
            for (int j = EARLY; j < PAIRS; j++) fetch(j);
            add(EARLY, PAIRS);
            hold(acc);  // what has been loaded has been used
            give_back();
        }
#pragma unroll
        for (int h = 0; h < HALVES; h++) turn.template advance<QUANTISED_DEPTH>();
    }
}

template <int N, bool AS_BF16> DEVICE void linear_few_quantised(const GemmParams &p) {
    extern __shared__ uint8_t shared[];
    const QuantisedFew<N> s(shared);
    const QuantisedShare share(p);
    // The same in all lanes, and said so.
    const int warp = __shfl_sync(ALL_LANES, threadIdx.x / WARP, 0), lane = threadIdx.x & 31, half = warp / QUANTISED_TILES;
    if (threadIdx.x == 0) {
        // The weights' and the tokens' bytes; the warpgroup that the step is for.
        for (int i = 0; i < QUANTISED_DEPTH; i++) barrier_init(s.full(i), 2), barrier_init(s.empty(i), QUANTISED_TILES);
        barrier_init_fence();
    }
    __syncthreads();
    // Weights do not wait for the kernel before.
    if (warp == CONSUMERS) bring_weights(p, s, share, lane);
    wait_for_inputs();
    allow_next_kernel();
    if (warp == CONSUMERS + 1 && lane == 0) bring_tokens(p, s, share);
    if (warp >= CONSUMERS) return;
    float acc[N / 2];
    multiply(s, share, half, lane, acc);
    s.results.leave(half, warp % QUANTISED_TILES, lane, acc);
    s.results.meet();
    s.results.template send<AS_BF16>(p, share.part, share.first_tile * TILE_ROWS, threadIdx.x);
}

#define FEW_QUANTISED(NAME, N, AS_BF16)                                                                                \
    extern "C" __global__ void __launch_bounds__(QUANTISED_THREADS, 1)                                                 \
        linear_##NAME##_##N(const __grid_constant__ GemmParams p) { linear_few_quantised<N, AS_BF16>(p); }
FEW_QUANTISED(few_quantised, 32, false)
FEW_QUANTISED(few_quantised, 64, false)
FEW_QUANTISED(few_quantised, 96, false)
FEW_QUANTISED(few_quantised, 128, false)
FEW_QUANTISED(few_quantised16, 96, true)
FEW_QUANTISED(few_quantised16, 128, true)

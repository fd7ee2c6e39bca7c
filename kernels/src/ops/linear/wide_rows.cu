// y[t, o] = sum over i of x[t, i] w[o, i] for many tokens and BF16 weights, which need no decoding: both operands are multiplied where copies put them.
//
// Shares as in wide.cuh: a cluster of two blocks has up to 256 tokens, of which each brings half for both; each block has 128 rows of the weights, each of its two
// warpgroups 64. One ring of chunks of 64 inputs, 32 KB of the plane and 16 KB of weights. Results leave beside the next products (wide_leaving.cuh): as BF16, or
// as F32 that is added to y, 64 tokens at a time.
//
// A chunk: 1,024 cycles of the tensor cores; through shared memory 48 KB in, 64 KB of tokens and 16 KB of weights out.
#include "../../cuda/quantised_wide.cuh"
#include "../../cuda/wgmma_rows.cuh"
#include "wide_leaving.cuh"

constexpr int ROWS_DEPTH = 3, ROWS_SUMS = 128;

// Addresses in shared memory.
struct RowsShared {
    static constexpr int PLANE = WIDE_CHUNK, WEIGHTS = WIDE_TILES * 2048;
    uint32_t planes;

    DEVICE uint32_t plane(int slot) const { return planes + slot * PLANE; }
    DEVICE uint32_t weights(int slot) const { return planes + ROWS_DEPTH * PLANE + slot * WEIGHTS; }
    DEVICE uint32_t full(int slot) const { return weights(ROWS_DEPTH) + slot * 8; }
    DEVICE uint32_t empty(int slot) const { return full(ROWS_DEPTH) + slot * 8; }
    DEVICE uint32_t rest() const { return empty(ROWS_DEPTH); }

    __device__ __forceinline__ explicit RowsShared(uint8_t *shared) : planes(aligned_planes(shared)) {}

    DEVICE void init() const {
        for (int i = 0; i < ROWS_DEPTH; i++) {
            // The weights' and the plane's bytes; the consumers of both blocks.
            barrier_init(full(i), 2);
            barrier_init(empty(i), WIDE_BLOCKS * WIDE_CONSUMERS);
        }
    }
};

// A consumer warp's sums of all chunks for N tokens.
template <int N> DEVICE void rows_products(const RowsShared &s, Turn &turn, int chunks, int group, int lane, float (&acc)[ROWS_SUMS]) {
#pragma unroll
    for (int i = 0; i < ROWS_SUMS; i++) acc[i] = 0.f;
    const auto same = [](uint32_t v) { return __shfl_sync(ALL_LANES, v, 0); };
    const uint32_t planes = same(static_cast<uint32_t>(plane_descriptor(s.plane(0))));
    const uint32_t weights = same(static_cast<uint32_t>(plane_descriptor(s.weights(0) + group * (RowsShared::WEIGHTS / 2))));
    // Lane 0 gives a place back to this block, lane 1 to the other one.
    const uint32_t free = in_block(s.empty(0), cluster_rank() ^ (lane & 1));
    uint32_t used = 0;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; chunk++) {
        const uint32_t slot = same(turn.slot), a = weights + slot * (RowsShared::WEIGHTS / 16), b = planes + slot * (RowsShared::PLANE / 16);
        barrier_wait(s.full(slot), turn.parity);
        products_begin();
#pragma unroll
        for (int i = 0; i < 4; i++) RowsProduct<N>::run(acc, rows_operand(a + i * 2), rows_operand(b + i * 2));
        products_end();
        products_wait<1>();
        // The chunk before has been multiplied.
        if (chunk > 0 && lane < 2) barrier_arrive_in(free + used * 8);
        used = slot;
        turn.template advance<ROWS_DEPTH>();
    }
    products_wait<0>();
    if (lane < 2) barrier_arrive_in(free + used * 8);
#pragma unroll
    for (int i = 0; i < ROWS_SUMS; i++) asm volatile("" : "+f"(acc[i])::"memory");
}

template <class Leave> DEVICE void multiply(const GemmParams &p, const RowsShared &s, int warp, int lane) {
    const WideShares shares(p);
    const int group = warp / 4;
    Leave leave(s.rest(), group, warp % 4, lane, false);
    Turn turn;
    for (int w = blockIdx.x / WIDE_BLOCKS; w < shares.all; w += gridDim.x / WIDE_BLOCKS) {
        const WideShare share = shares[w];
        float acc[ROWS_SUMS];
        if (share.columns > 240)
            rows_products<256>(s, turn, 2 * p.steps, group, lane, acc);
        else if (share.columns > 200)
            rows_products<240>(s, turn, 2 * p.steps, group, lane, acc);
        else if (share.columns > 128)
            rows_products<200>(s, turn, 2 * p.steps, group, lane, acc);
        else
            rows_products<128>(s, turn, 2 * p.steps, group, lane, acc);
        if (share.columns > 128)
            leave.template sums<256>(acc);
        else
            leave.template sums<128>(acc);
    }
}

// One warp: this block's tiles, a chunk at a time; lane i < 8 has tile i.
DEVICE void bring_weights(const GemmParams &p, const RowsShared &s, int lane) {
    const WideShares shares(p);
    Turn turn;
    for (int w = blockIdx.x / WIDE_BLOCKS; w < shares.all; w += gridDim.x / WIDE_BLOCKS) {
        int at = (shares[w].pair * WIDE_BLOCKS + static_cast<int>(cluster_rank())) * WIDE_TILES + lane;
        const bool has = lane < WIDE_TILES && at < p.tiles;
        const uint32_t held = __popc(__ballot_sync(ALL_LANES, has)) * Layout<BF16>::BYTES;
        const Weight &weight = segment_of(p.segments, at);
        const uint8_t *from = weight.stream + at * tile_bytes<BF16>(weight.stages);
#pragma unroll 1
        for (int chunk = 0; chunk < 2 * p.steps; chunk++) {
            barrier_wait(s.empty(turn.slot), turn.parity ^ 1);
            if (lane == 0) barrier_expect(s.full(turn.slot), held);
            __syncwarp();
            if (has) bulk_copy(s.weights(turn.slot) + lane * Layout<BF16>::BYTES, from, Layout<BF16>::BYTES, s.full(turn.slot));
            from += Layout<BF16>::BYTES;
            turn.template advance<ROWS_DEPTH>();
        }
    }
}

// One warp: this block's half of the tokens, for both blocks.
DEVICE void bring_tokens(const GemmParams &p, const RowsShared &s, int lane) {
    const WideShares shares(p);
    const size_t chunk_bytes = static_cast<size_t>(p.blocks) * PLANE_BLOCK;
    Turn turn;
    for (int w = blockIdx.x / WIDE_BLOCKS; w < shares.all; w += gridDim.x / WIDE_BLOCKS) {
        const WideShare share = shares[w];
        const int columns = ceil_div(share.columns, PLANE_ROWS) * PLANE_ROWS;
        const uint32_t all = columns * 128, near = columns / 16 * PLANE_BLOCK;
        const uint32_t begin = cluster_rank() ? near : 0, mine = cluster_rank() ? all - near : near;
        const uint8_t *from = p.plane + static_cast<size_t>(share.first / PLANE_ROWS) * PLANE_BLOCK + begin;
#pragma unroll 1
        for (int chunk = 0; chunk < 2 * p.steps; chunk++) {
            barrier_wait(s.empty(turn.slot), turn.parity ^ 1);
            if (lane == 0) {
                barrier_expect(s.full(turn.slot), all);
                if (mine) bulk_copy_to(3, s.plane(turn.slot) + begin, from, mine, s.full(turn.slot));
            }
            __syncwarp();
            from += chunk_bytes;
            turn.template advance<ROWS_DEPTH>();
        }
    }
}

template <class Leave> DEVICE void send(const GemmParams &p, const RowsShared &s, int group, int lane) {
    const WideShares shares(p);
    Leave leave(s.rest(), group, 0, lane, true);
    for (int w = blockIdx.x / WIDE_BLOCKS; w < shares.all; w += gridDim.x / WIDE_BLOCKS) {
        const WideShare share = shares[w];
        leave.send(p, (share.pair * WIDE_BLOCKS + static_cast<int>(cluster_rank())) * WIDE_TILES * TILE_ROWS + group * LEAVING_OUTPUTS, share);
    }
}

template <class Leave> DEVICE void linear_rows(const GemmParams &p) {
    extern __shared__ uint8_t shared[];
    const RowsShared s(shared);
    const auto init = [&] { s.init(), Leave::init(s.rest()); };
    quantised_roles(init, [&](int warp, int lane) { multiply<Leave>(p, s, warp, lane); }, [&](int warp, int lane) {
        // Weights do not wait for the kernel before.
        if (warp == WIDE_WEIGHTS_WARP) bring_weights(p, s, lane);
        wait_for_inputs();
        allow_next_kernel();
        if (warp == WIDE_PLANE_WARP) bring_tokens(p, s, lane);
        if (warp >= WIDE_SENDERS) send<Leave>(p, s, warp - WIDE_SENDERS, lane);
    });
}

#define LINEAR_ROWS(NAME, AS, ROOMS)                                                                                   \
    extern "C" __global__ void __cluster_dims__(WIDE_BLOCKS, 1, 1) __launch_bounds__(WIDE_THREADS, 1)                  \
        linear_##NAME##_bf16(const __grid_constant__ GemmParams p) { linear_rows<WideLeaving<AS, ROOMS>>(p); }
LINEAR_ROWS(rows, AsBf16<256>, 1)
LINEAR_ROWS(rows_add, AddF32<64>, 2)

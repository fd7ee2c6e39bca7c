// A dense weight times a plane of up to 128 tokens: every weight is read once, and memory serves all blocks in the order in which they multiply.
//
// A tile of work is 192 weight rows of a part of the inputs: twelve warps own one 16-row tile of the stream each and bring it through rings of
// their own (gemv.cuh), four of them multiply together. A thirteenth warp copies the plane's stages, which all of them share. Rings are
// shallow on purpose: with all of a block's weights asked for at once some blocks have their last stage before others have their first one, and the
// products of those begin when they should end. Up to 64 tokens sums of a stage are scaled, not its weights (decode.cuh).
#pragma once
#include "../../cuda/decode.cuh"
#include "../../cuda/gemv.cuh"
#include "../../cuda/plane.cuh"
#include "../../cuda/turn.cuh"
#include "../../cuda/wgmma_few.cuh"
#include "linear_params.cuh"

constexpr int FEW_TILES = 12, FEW_THREADS = (FEW_TILES + 1) * WARP;
// Slots of a warp's ring; shared memory that the plane may have, and most of its steps of 128 inputs there.
constexpr int FEW_DEPTH = 3, FEW_PLANES = 128 * 1024, FEW_PLANE_STEPS = 8;

template <int F, int N> struct FewShared {
    static constexpr int K = Layout<F>::K, CHUNKS = K / 64, PLANE = CHUNKS * N * 128;
    static constexpr int IN_ROOM = FEW_PLANES / PLANE, MOST = FEW_PLANE_STEPS * 128 / K, PLANES = IN_ROOM < MOST ? IN_ROOM : MOST;
    static constexpr int RING = FEW_DEPTH * SLOT_BYTES<F>;

    uint8_t *planes, *rings;
    uint64_t *ring_full, *plane_full, *plane_empty;
    __device__ __forceinline__ explicit FewShared(uint8_t *shared) {
        planes = shared + (-shared_address(shared) & 1023);
        rings = planes + PLANES * PLANE;
        ring_full = reinterpret_cast<uint64_t *>(rings + FEW_TILES * RING);
        plane_full = ring_full + FEW_TILES * FEW_DEPTH;
        plane_empty = plane_full + PLANES;
    }
};

// A block's works, one after the other: tile m of 192 rows, and a part of the inputs in stages of K.
template <int K> struct FewWork {
    int m_tiles, each, steps, work, stride, end;
    DEVICE explicit FewWork(const GemmParams &p)
        : m_tiles(ceil_div(p.tiles, FEW_TILES)), each(ceil_div(p.steps, p.parts)), steps(p.steps), work(blockIdx.x), stride(gridDim.x), end(m_tiles * p.parts) {}
    DEVICE bool more() const { return work < end; }
    DEVICE void advance() { work += stride; }
    DEVICE int part() const { return work / m_tiles; }
    DEVICE int tile(int warp) const { return work % m_tiles * FEW_TILES + warp; }
    DEVICE int first() const { return min(part() * each, steps) * (128 / K); }
    DEVICE int count() const { return min(each, steps - min(part() * each, steps)) * (128 / K); }
};

template <int F> struct FewRuns {
    const GemmParams *p;
    FewWork<Layout<F>::K> work;
    int warp;
    __device__ __forceinline__ bool operator()(Run &run) {
        if (!work.more()) return false;
        // A warp without a tile reads the last one beside the others: all of a warpgroup multiply.
        int at = min(work.tile(warp), p->tiles - 1);
        const Weight &w = segment_of(p->segments, at);
        run.from = w.stream + (static_cast<size_t>(at) * w.stages + work.first()) * Layout<F>::BYTES;
        run.stages = work.count();
        work.advance();
        return true;
    }
};

// All works' stages of the plane, by one thread.
template <int F, int N> DEVICE void few_planes(const GemmParams &p, const FewShared<F, N> &s) {
    using S = FewShared<F, N>;
    const size_t chunk_bytes = static_cast<size_t>(p.blocks) * PLANE_BLOCK;
    Turn place;
    bool again = false;  // the ring has been round once
    for (FewWork<S::K> work(p); work.more(); work.advance()) {
        const uint8_t *from = p.plane + work.first() * S::CHUNKS * chunk_bytes;
#pragma unroll 1
        for (int left = work.count(); left > 0; left--) {
            uint64_t *full = &s.plane_full[place.slot];
            if (again) barrier_wait(&s.plane_empty[place.slot], place.parity ^ 1);
            barrier_expect(full, S::PLANE);
#pragma unroll
            for (int c = 0; c < S::CHUNKS; c++, from += chunk_bytes) bulk_copy(s.planes + place.slot * S::PLANE + c * N * 128, from, N * 128, full);
            place.template advance<S::PLANES>();
            again |= place.slot == 0;
        }
    }
}

// acc += a stage of a warp's tile, at `at`, times the tokens' inputs at `plane`.
template <int F, int N> DEVICE void few_stage(uint32_t at, uint32_t plane, int lane, int bf16_scales, float (&acc)[N / 2]) {
    constexpr bool SUMS = (F == INT4_G128 || F == FP8) && N <= 64;
    constexpr int PRODUCTS = Layout<F>::K / 16, WORDS = INT4<F> ? 2 : 4, EACH = PRODUCTS / WORDS;
    TileDecoder<F> decoder;
    uint4 words[WORDS];
    float part[N / 2];  // SUMS: of this stage
    uint32_t a[2][4];
#pragma unroll
    for (int w = 0; w < WORDS; w++) words[w] = INT4<F> ? load_shared16(at + w * 512 + lane * 16) : load_rows(at, w, lane);
    const uint64_t b = plane_descriptor(plane);
#pragma unroll
    for (int i = 0; i < PRODUCTS; i++) {
        decoder.words = words[i / EACH];
        decoder.fetch_scales(at, 0, i / 4, i % 4, lane, i == 0);
        if constexpr (SUMS)
            decoder.make_unscaled(i % 4, i == 0, a[i & 1]);
        else
            decoder.make(i % 4, bf16_scales, i == 0, a[i & 1]);
        const uint64_t tokens = descriptor_behind(b, (i / 4) * (N * 128) + (i % 4) * 32);
        products_begin();
        if constexpr (!SUMS)
            FewProduct<N>::template run<true>(acc, a[i & 1], tokens);
        else if (i == 0)
            FewProduct<N>::template run<false>(part, a[i & 1], tokens);
        else
            FewProduct<N>::template run<true>(part, a[i & 1], tokens);
        products_end();
        if (i < PRODUCTS - 1) products_wait<1>();  // the operands of product i - 1 are free
    }
    products_wait<0>();
    if constexpr (SUMS) {
        hold(part);
        float upper, lower;
        decoder.row_scales(bf16_scales, upper, lower);
#pragma unroll
        for (int i = 0; i < N / 2; i++) acc[i] = fmaf(part[i], i % 4 < 2 ? upper : lower, acc[i]);
    } else {
        hold(acc);
    }
}

// Where a lane's sum `i` of tile `at` belongs: row lane / 4 (+ 8), token 2 * (lane % 4) (+ 1) of eight.
DEVICE int few_row(int at, int i, int lane) { return at * TILE_ROWS + (lane >> 2) + 8 * (i % 4 / 2); }
DEVICE int few_token(int i, int lane) { return 8 * (i / 4) + 2 * (lane & 3) + i % 2; }

// The residual (or null) is where sums begin: it comes while the weights do.
template <int N> DEVICE void few_begin(const GemmParams &p, const float *residual, int at, int lane, float (&acc)[N / 2]) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) acc[i] = 0.f;
    if (!residual) return;
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        const int row = few_row(at, i, lane), token = few_token(i, lane);
        if (token < p.tokens && row < p.width) acc[i] = residual[static_cast<size_t>(token) * p.width + row];
    }
}

// Lanes of neighbouring rows exchange tokens, so that each writes two outputs of one.
template <int N> DEVICE void few_write(const GemmParams &p, float *y, int at, int lane, const float (&acc)[N / 2]) {
    if (p.width % 2) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            const int row = few_row(at, i, lane), token = few_token(i, lane);
            if (token < p.tokens && row < p.width) y[static_cast<size_t>(token) * p.width + row] = acc[i];
        }
        return;
    }
    const bool odd = lane & 4;
    const int token = 2 * (lane & 3) + odd, row = at * TILE_ROWS + (lane >> 2 & ~1);
    float *to = y + static_cast<size_t>(token) * p.width + row;
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float first = acc[4 * j + 2 * h], second = acc[4 * j + 2 * h + 1];
            const float other = __shfl_xor_sync(ALL_LANES, odd ? first : second, 4);
            if (token + 8 * j < p.tokens && row + 8 * h < p.width)
                *reinterpret_cast<float2 *>(to + static_cast<size_t>(8 * j) * p.width + 8 * h) = odd ? make_float2(other, second) : make_float2(first, other);
        }
}

template <int F, int N> DEVICE void linear_few(const GemmParams &p) {
    using S = FewShared<F, N>;
    extern __shared__ uint8_t shared[];
    const S s(shared);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31;
    if (warp == FEW_TILES) {
        for (int i = lane; i < S::PLANES; i += WARP) barrier_init(&s.plane_full[i], 1), barrier_init(&s.plane_empty[i], FEW_TILES);
        barrier_init_fence();
        block_barrier<FEW_THREADS>();
        wait_for_inputs();
        allow_next_kernel();
        if (lane == 0) few_planes<F, N>(p, s);
        return;
    }
    FewWork<S::K> work(p);
    StageQueue<F, FEW_DEPTH, FewRuns<F>> queue({&p, work, warp}, s.rings + warp * S::RING, s.ring_full + warp * FEW_DEPTH, lane);
    queue.fill();
    block_barrier<FEW_THREADS>();
    wait_for_inputs();
    allow_next_kernel();
    const uint32_t planes = shared_address(s.planes);
    Turn place;
#pragma unroll 1
    for (; work.more(); work.advance()) {
        const int at = work.tile(warp), part = work.part();
        float acc[N / 2];
        few_begin<N>(p, part == 0 && at < p.tiles ? p.residual : nullptr, at, lane, acc);
#pragma unroll 1
        for (int left = work.count(); left > 0; left -= Layout<F>::SPAN) {
            uint32_t stage = queue.front();
#pragma unroll
            for (int i = 0; i < Layout<F>::SPAN; i++) {
                if (i > 0 && i == left) break;
                barrier_wait(&s.plane_full[place.slot], place.parity);
                few_stage<F, N>(stage, planes + place.slot * S::PLANE, lane, p.segments[0].bf16_scales, acc);
                if (lane == 0) barrier_arrive(&s.plane_empty[place.slot]);
                place.template advance<S::PLANES>();
                stage += Layout<F>::BYTES;
            }
            queue.pop();
        }
        if (at < p.tiles) few_write<N>(p, p.y + static_cast<size_t>(part) * p.tokens * p.width, at, lane, acc);
    }
}

// A dense weight times a plane of up to 128 tokens: every weight is read once, and memory serves all blocks in the order in which they multiply.
//
// A tile of work is 192 or 128 weight rows of a part of the inputs: twelve or eight warps own one 16-row tile of the stream each and bring it through
// rings of their own (gemv.cuh), four of them multiply together. One warp more copies the plane's stages, which all of them share. Rings are
// shallow on purpose: with all of a block's weights asked for at once some blocks have their last stage before others have their first one, and the
// products of those begin when they should end. Of many tokens what counts is what a block writes at its end, when nothing else is left to do:
// fewer rows, and so fewer parts. Up to 64 tokens sums of a stage are scaled, not its weights (decode.cuh).
#pragma once
#include "../../cuda/decode.cuh"
#include "../../cuda/gemv.cuh"
#include "../../cuda/plane.cuh"
#include "../../cuda/turn.cuh"
#include "../../cuda/wgmma_few.cuh"
#include "few_results.cuh"

// Shared memory of a block; barriers' share of it, and most of the plane's steps of 128 inputs there.
constexpr int FEW_ROOM = 226 * 1024, FEW_BARRIERS = 1024, FEW_PLANE_STEPS = 8;

// Weights of format F times N tokens: a block's tiles, slots of a warp's ring and of the plane's.
template <int F_, int N_> struct Few {
    static constexpr int F = F_, N = N_, TILES = N <= (F == BF16 ? 64 : 96) ? 12 : 8, THREADS = (TILES + 1) * WARP;
    static constexpr int DEPTH = TILES == 8 || F == BF16 ? 3 : 2, RING = DEPTH * SLOT_BYTES<F>;
    static constexpr int K = Layout<F>::K, CHUNKS = K / 64, PLANE = CHUNKS * N * 128;
    using Results = FewResults<N, TILES, 1>;
    static constexpr int IN_ROOM = (FEW_ROOM - 1024 - FEW_BARRIERS - TILES * RING - Results::BYTES) / PLANE, MOST = FEW_PLANE_STEPS * 128 / K;
    static constexpr int PLANES = IN_ROOM < MOST ? IN_ROOM : MOST;
    static_assert(PLANES >= 2 && (TILES * DEPTH + 2 * PLANES) * 8 <= FEW_BARRIERS);

    uint8_t *planes, *rings;
    Results results;
    uint64_t *ring_full, *plane_full, *plane_empty;
    __device__ __forceinline__ explicit Few(uint8_t *shared) {
        planes = shared + (-shared_address(shared) & 1023);
        rings = planes + PLANES * PLANE;
        results.room = shared_address(rings + TILES * RING);
        ring_full = reinterpret_cast<uint64_t *>(rings + TILES * RING + Results::BYTES);
        plane_full = ring_full + TILES * DEPTH;
        plane_empty = plane_full + PLANES;
    }
};

// A block's works, one after the other: tile m of the block's rows, and a part of the inputs in stages of K.
template <class S> struct FewWork {
    int m_tiles, each, steps, work, stride, end;
    DEVICE explicit FewWork(const GemmParams &p)
        : m_tiles(ceil_div(p.tiles, S::TILES)), each(ceil_div(p.steps, p.parts)), steps(p.steps), work(blockIdx.x), stride(gridDim.x), end(m_tiles * p.parts) {}
    DEVICE bool more() const { return work < end; }
    DEVICE void advance() { work += stride; }
    DEVICE int part() const { return work / m_tiles; }
    DEVICE int tile(int warp) const { return work % m_tiles * S::TILES + warp; }
    DEVICE int first() const { return min(part() * each, steps) * (128 / S::K); }
    DEVICE int count() const { return min(each, steps - min(part() * each, steps)) * (128 / S::K); }
};

template <class S> struct FewRuns {
    const GemmParams *p;
    FewWork<S> work;
    int warp;
    __device__ __forceinline__ bool operator()(Run &run) {
        if (!work.more()) return false;
        // A warp without a tile reads the last one beside the others: all of a warpgroup multiply.
        int at = min(work.tile(warp), p->tiles - 1);
        const Weight &w = segment_of(p->segments, at);
        run.from = w.stream + (static_cast<size_t>(at) * w.stages + work.first()) * Layout<S::F>::BYTES;
        run.stages = work.count();
        work.advance();
        return true;
    }
};

// All works' stages of the plane, by one thread.
template <class S> DEVICE void few_planes(const GemmParams &p, const S &s) {
    const size_t chunk_bytes = static_cast<size_t>(p.blocks) * PLANE_BLOCK;
    Turn place;
    bool again = false;  // the ring has been round once
    for (FewWork<S> work(p); work.more(); work.advance()) {
        const uint8_t *from = p.plane + work.first() * S::CHUNKS * chunk_bytes;
#pragma unroll 1
        for (int left = work.count(); left > 0; left--) {
            uint64_t *full = &s.plane_full[place.slot];
            if (again) barrier_wait(&s.plane_empty[place.slot], place.parity ^ 1);
            barrier_expect(full, S::PLANE);
#pragma unroll
            for (int c = 0; c < S::CHUNKS; c++, from += chunk_bytes) bulk_copy(s.planes + place.slot * S::PLANE + c * S::N * 128, from, S::N * 128, full);
            place.template advance<S::PLANES>();
            again |= place.slot == 0;
        }
    }
}

// Product w's words of a stage, of BF16 and INT4, or two products' of FP8.
template <int F> DEVICE uint4 few_words(uint32_t at, int w, int lane) { return INT4<F> ? load_shared16(at + w * 512 + lane * 16) : load_rows(at, w, lane); }

// acc += a stage of a warp's tile, at `at`, times the tokens' inputs at `plane`.
template <int F, int N> DEVICE void few_stage(uint32_t at, uint32_t plane, int lane, int bf16_scales, float (&acc)[N / 2]) {
    constexpr bool SUMS = (F == INT4_G128 || F == FP8) && N <= 64;
    constexpr int PRODUCTS = Layout<F>::K / 16, WORDS = INT4<F> ? 2 : 4, EACH = PRODUCTS / WORDS;
    TileDecoder<F> decoder;
    uint4 words[WORDS];
    float part[N / 2];  // SUMS: of this stage
    uint32_t a[2][4];
#pragma unroll
    for (int w = 0; w < WORDS; w++) words[w] = few_words<F>(at, w, lane);
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

// acc += all stages of a work.
template <class S, class Queue> DEVICE void few_multiply(const S &s, Queue &queue, Turn &place, int count, int bf16_scales, int lane, float (&acc)[S::N / 2]) {
    constexpr int F = S::F;
    const uint32_t planes = shared_address(s.planes);
#pragma unroll 1
    for (int left = count; left > 0; left -= Layout<F>::SPAN) {
        uint32_t stage = queue.front();
#pragma unroll
        for (int i = 0; i < Layout<F>::SPAN; i++) {
            if (i > 0 && i == left) break;
            barrier_wait(&s.plane_full[place.slot], place.parity);
            few_stage<F, S::N>(stage, planes + place.slot * S::PLANE, lane, bf16_scales, acc);
            if (lane == 0) barrier_arrive(&s.plane_empty[place.slot]);
            place.template advance<S::PLANES>();
            stage += Layout<F>::BYTES;
        }
        queue.pop();
    }
}

// The same of BF16, which needs no decoding: a stage's products run while the next one's words come. Stages are in pairs.
template <class S, class Queue> DEVICE void few_multiply_bf16(const S &s, Queue &queue, Turn &place, int count, int lane, float (&acc)[S::N / 2]) {
    static_assert(S::K == 64 && Layout<S::F>::SPAN == 1);
    const uint32_t planes = shared_address(s.planes);
    uint32_t words[2][4][4] = {}, used = 0;
#pragma unroll 1
    for (int at = 0; at < count; at += 2) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint32_t stage = queue.front();
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint4 v = few_words<BF16>(stage, i, lane);
                words[h][i][0] = v.x, words[h][i][1] = v.y, words[h][i][2] = v.z, words[h][i][3] = v.w;
            }
            barrier_wait(&s.plane_full[place.slot], place.parity);
            const uint64_t tokens = plane_descriptor(planes + place.slot * S::PLANE);
            products_begin();
#pragma unroll
            for (int i = 0; i < 4; i++) FewProduct<S::N>::template run<true>(acc, words[h][i], descriptor_behind(tokens, i * 32));
            products_end();
            // The products have been issued, so the words are in registers.
            queue.pop();
            products_wait<1>();
            // The stage before is done, and only now may its words' registers be used again, which the compiler does not see across the loop's turn.
#pragma unroll
            for (int i = 0; i < 4; i++) hold_operands(words[h ^ 1][i]);
            if (lane == 0 && at + h > 0) barrier_arrive(&s.plane_empty[used]);
            used = place.slot;
            place.template advance<S::PLANES>();
        }
    }
    products_wait<0>();
#pragma unroll
    for (int i = 0; i < 4; i++) hold_operands(words[1][i]);
    hold(acc);
    if (lane == 0 && count > 0) barrier_arrive(&s.plane_empty[used]);
}

template <int F, int N, bool AS_BF16> DEVICE void linear_few(const GemmParams &p) {
    using S = Few<F, N>;
    extern __shared__ uint8_t shared[];
    const S s(shared);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31;
    if (warp == S::TILES) {
        for (int i = lane; i < S::PLANES; i += WARP) barrier_init(&s.plane_full[i], 1), barrier_init(&s.plane_empty[i], S::TILES);
        barrier_init_fence();
        block_barrier<S::THREADS>();
        wait_for_inputs();
        allow_next_kernel();
        if (lane == 0) few_planes(p, s);
        return;
    }
    FewWork<S> work(p);
    StageQueue<F, S::DEPTH, FewRuns<S>> queue({&p, work, warp}, s.rings + warp * S::RING, s.ring_full + warp * S::DEPTH, lane);
    queue.fill();
    block_barrier<S::THREADS>();
    wait_for_inputs();
    allow_next_kernel();
    Turn place;
    bool again = false;
#pragma unroll 1
    for (; work.more(); work.advance(), again = true) {
        float acc[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; i++) acc[i] = 0.f;
        hold(acc);
        if constexpr (F == BF16)
            few_multiply_bf16(s, queue, place, work.count(), lane, acc);
        else
            few_multiply(s, queue, place, work.count(), p.segments[0].bf16_scales, lane, acc);
        if (again) s.results.meet();  // what was there has been sent
        s.results.leave(0, warp, lane, acc);
        s.results.meet();
        s.results.template send<AS_BF16>(p, work.part(), work.tile(0) * TILE_ROWS, threadIdx.x);
    }
}

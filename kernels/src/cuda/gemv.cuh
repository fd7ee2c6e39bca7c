// Few tokens times a large weight, at the speed of the memory: shared parts of the linear and expert kernels.
//
// A block is 16 warps. A unit of work is R tiles of 16 rows; R * S = 16, and each tile's inputs are cut into S runs,
// one a warp. Every warp streams its own runs, unit after unit, through its own ring of shared-memory stages filled
// by the bulk copy engine: no block-wide barrier but one a unit, where the S partial sums meet (always in the order
// of the splits, so results do not depend on timing).
#pragma once
#include "stream.cuh"

constexpr int GEMV_WARPS = 16, GEMV_THREADS = GEMV_WARPS * WARP;

// Contiguous stages of one tile.
struct Run {
    const uint8_t *from;
    int stages;
};

// The warp's private ring. `Next` yields the warp's runs in order: bool next(Run &).
template <int F, int DEPTH, class Next> struct StageQueue {
    static constexpr uint32_t BYTES = Layout<F>::BYTES;
    Next next;
    Run ahead;
    uint32_t slots;
    uint64_t *full;
    uint64_t policy;
    uint32_t slot, parity;
    bool leader;

    // `memory`: DEPTH * BYTES for this warp; `barriers`: DEPTH, initialised by `init`.
    __device__ StageQueue(Next n, uint8_t *memory, uint64_t *barriers, int lane)
        : next(n), ahead{nullptr, 0}, slots(shared_address(memory)), full(barriers), policy(evict_first_policy()),
          slot(0), parity(0), leader(lane == 0) {
        if (leader) {
#pragma unroll 1
            for (int i = 0; i < DEPTH; i++) barrier_init(&full[i], 1);
            barrier_init_fence();
        }
        __syncwarp();
    }

    __device__ void request(uint32_t into) {
        while (ahead.stages == 0)
            if (!next(ahead)) return;
        if (leader) {
            barrier_expect(&full[into], BYTES);
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], "
                         "%2, [%3], %4;" ::"r"(slots + into * BYTES),
                         "l"(ahead.from), "r"(BYTES), "r"(shared_address(&full[into])), "l"(policy)
                         : "memory");
        }
        ahead.from += BYTES;
        ahead.stages--;
    }

    __device__ void fill() {
#pragma unroll 1
        for (uint32_t i = 0; i < DEPTH; i++) request(i);
    }

    // Address of the oldest stage, once it has arrived.
    __device__ uint32_t front() {
        barrier_wait(&full[slot], parity);
        return slots + slot * BYTES;
    }

    // The oldest stage has been read by every lane: its place takes the next request.
    __device__ void pop() {
        __syncwarp();
        request(slot);
        if (++slot == DEPTH) slot = 0, parity ^= 1;
    }
};

// Partial sums of a unit: [16 warps][4 * NT tokens][24 floats, 16 used]; 24 keeps the four lane columns apart.
constexpr int PARTIAL_STRIDE = 24;
template <int NT> constexpr int PARTIAL_FLOATS = GEMV_WARPS * 4 * NT * PARTIAL_STRIDE;

template <int NT> DEVICE void store_partials(float *partial, int warp, int lane, const float (&acc)[NT][4]) {
    const int row = lane >> 2, t = lane & 3;
#pragma unroll
    for (int n = 0; n < NT; n++) {
        float *at = partial + (warp * 4 * NT + n * 4 + t) * PARTIAL_STRIDE + row;
        at[0] = acc[n][0] + acc[n][1];
        at[8] = acc[n][2] + acc[n][3];
    }
}

// Sum over the splits of tile `r`.
DEVICE float sum_partials(const float *partial, int tokens_held, int r, int splits, int token, int row) {
    float sum = 0.f;
    for (int s = 0; s < splits; s++)
        sum += partial[((r * splits + s) * tokens_held + token) * PARTIAL_STRIDE + row];
    return sum;
}

// The stages [first, first + count) of a tile's run `s` of `splits` over `stages` stages.
DEVICE void split_stages(int stages, int splits, int s, int &first, int &count) {
    const int each = ceil_div(stages, splits);
    first = min(s * each, stages);
    count = min(each, stages - first);
}

// One warp's share of a unit: `count` stages starting at stage `first` of the activations' slice.
template <int F, int NT, class Queue>
DEVICE void multiply_run(Queue &queue, uint32_t image, uint32_t sums, uint32_t token_bytes, int first, int count,
                         int lane, int bf16_scales, float (&acc)[NT][4]) {
    constexpr int K = Layout<F>::K;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[n][i] = 0.f;
    uint32_t x = image + first * (K / IMAGE_CHUNK) * IMAGE_CHUNK_BYTES;
    uint32_t sum = sums + first * (K / IMAGE_GROUP) * 4;
    for (int i = 0; i < count; i++) {
        multiply_stage<F, NT>(queue.front(), x, sum, token_bytes, lane, bf16_scales, acc);
        queue.pop();
        x += (K / IMAGE_CHUNK) * IMAGE_CHUNK_BYTES;
        sum += (K / IMAGE_GROUP) * 4;
    }
}

// ---- activations into shared memory ----------------------------------------------------------------------------

// A residual stream that is the sum of several arrays (the parts of the op before), and the norm that reads it.
struct NormInput {
    const float *x0;      // [tokens, k]
    const float *x1;      // [more][tokens, k], or null; few tokens' own norm adds one of them at most
    const float *weight;  // [k]
    float *sum_out;       // the sum, written by one block; or null
    float eps;
    int k, more, stride;  // stride: values from one of x1 to the next
};

constexpr int INLINE_TOKENS = 4, INLINE_WIDTH = 3072;

// rmsnorm of up to TOKENS (1, 2 or 4) tokens by the whole block, in three steps, so that their waits overlap others.
// The code is straight and short on purpose: it runs once a launch, from a cold instruction cache.
template <int TOKENS> struct InlineNorm {
    static constexpr int SHARE = GEMV_THREADS / TOKENS, PAIRS = INLINE_WIDTH / 2 / SHARE, WARPS = SHARE / WARP;
    float2 v[PAIRS], w[PAIRS];
    int token, rank;

    // Before the inputs are there.
    __device__ __forceinline__ void load_weights(const NormInput &in) {
        token = threadIdx.x / SHARE, rank = threadIdx.x % SHARE;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const int k = 2 * (rank + i * SHARE);
            w[i] = k < in.k ? *reinterpret_cast<const float2 *>(in.weight + k) : make_float2(0.f, 0.f);
        }
    }

    __device__ __forceinline__ void load(const NormInput &in, int tokens, bool writer) {
        const size_t base = static_cast<size_t>(token) * in.k;
        const bool active = token < tokens;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const int k = 2 * (rank + i * SHARE);
            v[i] = make_float2(0.f, 0.f);
            if (active && k < in.k) v[i] = *reinterpret_cast<const float2 *>(in.x0 + base + k);
        }
        if (in.x1) {
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                const int k = 2 * (rank + i * SHARE);
                if (active && k < in.k) {
                    const float2 x = *reinterpret_cast<const float2 *>(in.x1 + base + k);
                    v[i].x += x.x, v[i].y += x.y;
                }
            }
        }
        if (writer && in.sum_out) {
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                const int k = 2 * (rank + i * SHARE);
                if (active && k < in.k) *reinterpret_cast<float2 *>(in.sum_out + base + k) = v[i];
            }
        }
    }

    // The slice [begin, end) of the images into shared memory; padded inputs are 0. `token_bytes`: image_bytes(end -
    // begin). `scratch`: 16 floats.
    __device__ __forceinline__ void store(const NormInput &in, int tokens, int begin, int end, uint8_t *image,
                                          uint32_t token_bytes, float *scratch) {
        float squares = 0.f;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) squares += v[i].x * v[i].x + v[i].y * v[i].y;
        squares = warp_sum(squares);
        if ((threadIdx.x & 31) == 0) scratch[threadIdx.x / WARP] = squares;
        __syncthreads();
        float total = 0.f;
#pragma unroll
        for (int i = 0; i < WARPS; i++) total += scratch[token * WARPS + i];
        const float inverse = rsqrtf(total / in.k + in.eps);
        uint8_t *mine = image + token * token_bytes;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const int k = 2 * (rank + i * SHARE) - begin;
            const bool inside = token < tokens && k >= 0 && k < end - begin;
            image_store_pair(mine, end - begin, k, v[i].x * inverse * w[i].x, v[i].y * inverse * w[i].y, inside);
        }
        __syncthreads();
    }
};

// The slice [begin, end) of `tokens` images of `padded` values from global memory, by one thread.
DEVICE void request_images(const uint8_t *images, int padded, int tokens, int begin, int end, uint8_t *to,
                           uint32_t token_bytes, uint64_t *barrier) {
    const uint32_t values = (end - begin) * 4, sums = (end - begin) / IMAGE_GROUP * 4;
    barrier_expect(barrier, tokens * (values + sums));
    for (int t = 0; t < tokens; t++) {
        const uint8_t *from = images + static_cast<size_t>(t) * image_bytes(padded);
        bulk_copy(to + t * token_bytes, from + begin * 4, values, barrier);
        bulk_copy(to + t * token_bytes + values, from + padded * 4 + begin / IMAGE_GROUP * 4, sums, barrier);
    }
}

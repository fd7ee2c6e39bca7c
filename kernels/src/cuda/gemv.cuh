// Few tokens times a large weight, at the speed of the memory: shared parts of the linear and expert kernels.
//
// A block is 16 warps. A unit of work is R tiles of 16 rows; R * S = 16, and each tile's inputs are cut into S runs,
// one a warp. Every warp streams its own runs, unit after unit, through its own ring of shared-memory stages filled
// by the bulk copy engine: no block-wide barrier but one a unit, where the S partial sums meet (always in the order
// of the splits, so results do not depend on timing).
#pragma once
#include "int4.cuh"
#include "trio.cuh"

constexpr int GEMV_WARPS = 16, GEMV_THREADS = GEMV_WARPS * WARP;

// Contiguous stages of one tile.
struct Run {
    const uint8_t *from;
    int stages;
};

// Bytes of a ring's slot. FP8 of experts: its stages lie as in memory, on lines of their own behind one whose end has the scale block.
// INT4_TOGETHER stages of INT4 lie in theirs as in memory, modulo a line: a copy then moves whole lines, wherever it begins.
constexpr int COPY_LINE = 128;
template <int F, int SPAN> constexpr bool AS_IN_MEMORY = INT4<F> && SPAN == INT4_TOGETHER;
template <int F, int SPAN = Layout<F>::SPAN>
constexpr int SLOT_BYTES = AS_IN_MEMORY<F, SPAN> ? (Layout<F>::BYTES * SPAN + COPY_LINE - 16 + COPY_LINE - 1) / COPY_LINE * COPY_LINE : Layout<F>::LINE + Layout<F>::BYTES * SPAN;

// The warp's private ring: up to DEPTH slots of up to STAGES stages. `Next` yields the warp's runs in order: bool next(Run &).
template <int F, int DEPTH, class Next, int STAGES = Layout<F>::SPAN> struct StageQueue {
    static constexpr uint32_t BYTES = Layout<F>::BYTES, SPAN = STAGES, SLOT = SLOT_BYTES<F, STAGES>;
    Next next;
    Run ahead;
    uint32_t slots, full;  // addresses in shared memory
    uint64_t policy;
    uint32_t slot, parity, depth;
    int of;  // FP8 of experts, a stage a copy: the next stage in its trio
    uint32_t places;  // AS_IN_MEMORY: where in its slot's first line each copy begins, a byte each
    bool leader;

    // `memory`: `held` slots for this warp; `barriers`: as many.
    __device__ __forceinline__ StageQueue(Next n, uint8_t *memory, uint64_t *barriers, int lane, uint32_t held = DEPTH)
        : next(n), ahead{nullptr, 0}, slots(shared_address(memory) + Layout<F>::LINE), full(shared_address(barriers)),
          policy(evict_first_policy()), slot(0), parity(0), depth(held), of(0), places(0), leader(lane == 0) {
        if (leader) {
#pragma unroll 1
            for (uint32_t i = 0; i < depth; i++) barrier_init(&barriers[i], 1);
            barrier_init_fence();
        }
        __syncwarp();
    }

    __device__ __forceinline__ void copy(uint32_t to, const uint8_t *from, uint32_t bytes, uint32_t barrier) { bulk_copy_once(to, from, bytes, barrier, policy); }

    // A stage of a trio, the first one with the scale block in front of it. Runs begin with a trio.
    __device__ __forceinline__ void request_of_trio(uint32_t into) {
        while (ahead.stages == 0) {
            if (!next(ahead)) return;
            of = 0, ahead.from -= SCALE_BLOCK;
        }
        const uint32_t bytes = of == 0 ? BYTES + SCALE_BLOCK : BYTES;
        if (leader) {
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full + into * 8), "r"(bytes) : "memory");
            copy(slots + into * SLOT + BYTES - bytes, ahead.from, bytes, full + into * 8);
        }
        of = of == TRIO - 1 ? 0 : of + 1;
        // Past the next trio's line, but for its scale block.
        ahead.from += of == 0 ? bytes + Layout<F>::LINE - SCALE_BLOCK : bytes;
        ahead.stages--;
    }

    // A trio, or what a tile has of its last one, with the scale block in front of it.
    __device__ __forceinline__ void request_trio(uint32_t into) {
        while (ahead.stages == 0) {
            if (!next(ahead)) return;
            ahead.from -= SCALE_BLOCK;
        }
        const uint32_t stages = min(ahead.stages, TRIO), bytes = stages * BYTES + SCALE_BLOCK;
        if (leader) {
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full + into * 8), "r"(bytes) : "memory");
            copy(slots + into * SLOT - SCALE_BLOCK, ahead.from, bytes, full + into * 8);
        }
        ahead.from += TRIO_BYTES<F>;
        ahead.stages -= stages;
    }

    __device__ __forceinline__ void request(uint32_t into) {
        if constexpr (TRIOS<F> && SPAN == TRIO) return request_trio(into);
        if constexpr (TRIOS<F>) return request_of_trio(into);
        while (ahead.stages == 0)
            if (!next(ahead)) return;
        const uint32_t stages = min(static_cast<uint32_t>(ahead.stages), SPAN), bytes = stages * BYTES;
        uint32_t place = 0;
        if constexpr (AS_IN_MEMORY<F, STAGES>) {
            place = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(ahead.from)) % COPY_LINE;
            places = (places & ~(0xffu << into * 8)) | place << into * 8;
        }
        if (leader) {
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full + into * 8), "r"(bytes) : "memory");
            copy(slots + into * SLOT + place, ahead.from, bytes, full + into * 8);
        }
        ahead.from += bytes;
        ahead.stages -= stages;
    }

    __device__ __forceinline__ void fill() {
#pragma unroll 1
        for (uint32_t i = 0; i < depth; i++) request(i);
    }

    // Address of the oldest slot's first stage, once it has arrived.
    __device__ __forceinline__ uint32_t front() {
        asm volatile(
            "{\n"
            ".reg .pred done;\n"
            "again:\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
            "@!done bra again;\n"
            "}\n" ::"r"(full + slot * 8),
            "r"(parity)
            : "memory");
        return slots + slot * SLOT + (AS_IN_MEMORY<F, STAGES> ? places >> slot * 8 & 0xff : 0);
    }

    // The oldest slot has been read by every lane: its place takes the next request.
    __device__ __forceinline__ void pop() {
        __syncwarp();
        request(slot);
        if (++slot == depth) slot = 0, parity ^= 1;
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

// The same from `multiply_rows_run`, of eight tokens.
DEVICE void store_row_partials(float *partial, int warp, int lane, const float (&acc)[1][4]) {
    float *at = partial + (warp * 8 + 2 * (lane & 3)) * PARTIAL_STRIDE + (lane >> 2);
    at[0] = acc[0][0], at[PARTIAL_STRIDE] = acc[0][1];
    at[8] = acc[0][2], at[PARTIAL_STRIDE + 8] = acc[0][3];
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

// The same in whole trios, where there are such.
template <int F> DEVICE void split_runs(int stages, int splits, int s, int &first, int &count) {
    if constexpr (TRIOS<F>) {
        split_stages(ceil_div(stages, TRIO), splits, s, first, count);
        first *= TRIO, count = max(0, min(count * TRIO, stages - first));
    } else {
        split_stages(stages, splits, s, first, count);
    }
}

// The scales of a run of FP8 of experts, which begins with a trio.
template <int F> struct RunScales {
    float second = 0.f, third = 0.f;
    int of = 0;

    // Of the next stage, which has arrived; `block`: address of its trio's scale block, if it is the first one.
    __device__ __forceinline__ float next(uint32_t block) {
        if constexpr (!TRIOS<F>) return 0.f;
        float scale = second;
        second = third;
        if (of == 0) {
            const uint4 all = load_shared16(block);
            scale = __uint_as_float(all.x), second = __uint_as_float(all.y), third = __uint_as_float(all.z);
        }
        if (++of == TRIO) of = 0;
        return scale;
    }
};

// One warp's share of a unit: `count` stages starting at stage `first` of the activations' slice. `tails`: address of
// token 0's tails (INT4) or of the images' steps (FP8 of experts, a trio a copy). In the kernels of groups both lie together for a block of 128 values.
template <int F, int NT, class Queue>
DEVICE void multiply_run(Queue &queue, uint32_t image, uint32_t tails, uint32_t token_bytes, int first, int count,
                         int lane, int bf16_scales, float (&acc)[NT][4]) {
    constexpr int STEP = Layout<F>::K / 64 * 256 / (INT4<F> ? 2 : 1);  // image bytes of a stage
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[n][i] = 0.f;
    constexpr bool TOGETHER = AS_IN_MEMORY<F, Queue::SPAN>;
    constexpr int TAILS = TOGETHER ? BLOCK_TAIL_BYTES : IMAGE_TAIL_BYTES;
    uint32_t x = image + first * STEP, tail = tails + first * TAILS;
    if constexpr (F == INT4_G128 && TOGETHER) {
        multiply_bytes_run<NT>(queue, x, tail, token_bytes, count, lane, bf16_scales, acc);
        return;
    }
    if constexpr (TRIOS<F> && Queue::SPAN == TRIO) {
        multiply_trios<NT, false>(queue, x, tail, token_bytes, count, lane, acc);
        return;
    }
    RunScales<F> scales;
#pragma unroll 1
    while (count > 0) {
        uint32_t stage = queue.front();
#pragma unroll
        for (int i = 0; i < Queue::SPAN; i++) {
            if (i > 0 && i == count) break;
            multiply_stage<F, NT>(stage, x, tail, token_bytes, TOGETHER ? IMAGE_TAIL_BYTES : token_bytes, lane, bf16_scales, scales.next(stage - SCALE_BLOCK), acc);
            stage += Layout<F>::BYTES, x += STEP, tail += TAILS;
        }
        queue.pop();
        count -= Queue::SPAN;
    }
}

// The same for images of BF16 values, of BF16 weights or FP8 of experts.
template <int F, class Queue>
DEVICE void multiply_rows_run(Queue &queue, uint32_t image, uint32_t steps, uint32_t token_bytes, int first, int count, int lane, float (&acc)[1][4]) {
    static_assert(TRIOS<F> || F == BF16, "weights of one part");
    constexpr int STEP = Layout<F>::K * 2;
#pragma unroll
    for (int i = 0; i < 4; i++) acc[0][i] = 0.f;
    uint32_t x = image + first * STEP;
    if constexpr (TRIOS<F>) {
        multiply_trios<1, true>(queue, x, steps + first * IMAGE_TAIL_BYTES, token_bytes, count, lane, acc);
    } else {
#pragma unroll 1
        for (; count > 0; count--) {
            multiply_rows_stage(queue.front(), x, token_bytes, lane, acc[0]);
            queue.pop();
            x += STEP;
        }
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

DEVICE float4 load_quad(const float *from, bool inside) {
    return inside ? *reinterpret_cast<const float4 *>(from) : make_float4(0.f, 0.f, 0.f, 0.f);
}

// rmsnorm of up to TOKENS (1, 2 or 4) tokens by the whole block, in three steps, so that their waits overlap others.
// A warp has 128 neighbouring values at a time: one block of an image. The code is straight and short on purpose: it runs
// once a launch, from a cold instruction cache.
template <bool BYTES, int TOKENS> struct InlineNorm {
    static constexpr int SHARE = GEMV_THREADS / TOKENS, QUADS = (INLINE_WIDTH / 4 + SHARE - 1) / SHARE, WARPS = SHARE / WARP;
    float4 v[QUADS], w[QUADS];
    int token, rank;

    // Before the inputs are there. k is a multiple of 4.
    __device__ __forceinline__ void load_weights(const NormInput &in) {
        token = threadIdx.x / SHARE, rank = threadIdx.x % SHARE;
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            const int k = 4 * (rank + i * SHARE);
            w[i] = load_quad(in.weight + k, k < in.k);
        }
    }

    __device__ __forceinline__ void load(const NormInput &in, int tokens, bool writer) {
        const size_t base = static_cast<size_t>(token) * in.k;
        const bool active = token < tokens;
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            const int k = 4 * (rank + i * SHARE);
            v[i] = load_quad(in.x0 + base + k, active && k < in.k);
        }
        if (in.x1) {
#pragma unroll
            for (int i = 0; i < QUADS; i++) {
                const int k = 4 * (rank + i * SHARE);
                const float4 x = load_quad(in.x1 + base + k, active && k < in.k);
                v[i].x += x.x, v[i].y += x.y, v[i].z += x.z, v[i].w += x.w;
            }
        }
        if (writer && in.sum_out) {
#pragma unroll
            for (int i = 0; i < QUADS; i++) {
                const int k = 4 * (rank + i * SHARE);
                if (active && k < in.k) *reinterpret_cast<float4 *>(in.sum_out + base + k) = v[i];
            }
        }
    }

    // The slice [begin, end) (multiples of 128) of the images into shared memory; padded inputs are 0. `scratch`: 16
    // floats.
    __device__ __forceinline__ void store(const NormInput &in, int tokens, int begin, int end, uint8_t *image,
                                          uint32_t token_bytes, float *scratch) {
        float squares = 0.f;
#pragma unroll
        for (int i = 0; i < QUADS; i++) squares += (v[i].x * v[i].x + v[i].y * v[i].y) + (v[i].z * v[i].z + v[i].w * v[i].w);
        squares = warp_sum(squares);
        if ((threadIdx.x & 31) == 0) scratch[threadIdx.x / WARP] = squares;
        __syncthreads();
        float total = 0.f;
#pragma unroll
        for (int i = 0; i < WARPS; i++) total += scratch[token * WARPS + i];
        const float inverse = rsqrtf(total / in.k + in.eps);
        uint8_t *mine = image + token * token_bytes;
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            const int block = (rank + i * SHARE) / WARP;  // the same for the warp
            if (token >= tokens || block * IMAGE_BLOCK < begin || block * IMAGE_BLOCK >= end) continue;
            const float4 y = make_float4(v[i].x * inverse * w[i].x, v[i].y * inverse * w[i].y, v[i].z * inverse * w[i].z,
                                         v[i].w * inverse * w[i].w);
            image_store_block<BYTES>(mine, end - begin, block - begin / IMAGE_BLOCK, y, threadIdx.x & 31);
        }
        __syncthreads();
    }
};

// Images of rows of `k` F32 values by the whole block: a warp a block of 128 at a time. `row(i)`: address of row i;
// `store(i, block, values)`. Ends with a barrier.
template <class Row, class Store> DEVICE void fill_blocks(const Row &row, int rows, int k, int begin, int end, const Store &store) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, blocks = (end - begin) / IMAGE_BLOCK;
#pragma unroll 1
    for (int first = warp; first < rows * blocks; first += 4 * GEMV_WARPS) {
        float4 v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int task = first + i * GEMV_WARPS, r = task / blocks, at = begin + task % blocks * IMAGE_BLOCK + 4 * lane;
            v[i] = task < rows * blocks ? load_quad(row(r) + at, at < k) : make_float4(0.f, 0.f, 0.f, 0.f);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int task = first + i * GEMV_WARPS;
            if (task < rows * blocks) store(task / blocks, task % blocks, v[i]);
        }
    }
    __syncthreads();
}

// The slice [begin, end) of images.
template <bool BYTES, class Row>
DEVICE void fill_images(const Row &row, int rows, int k, int begin, int end, uint8_t *image, uint32_t token_bytes) {
    const int lane = threadIdx.x & 31;
    fill_blocks(row, rows, k, begin, end, [&](int r, int block, const float4 &v) {
        image_store_block<BYTES>(image + r * token_bytes, end - begin, block, v, lane);
    });
}

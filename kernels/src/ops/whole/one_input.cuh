// What the products of `one.cu` read: every block makes the whole input of its products itself, as images in shared memory, from
// values that others left. A norm's factor comes later: results are multiplied with it.
#pragma once
#include "one_product.cuh"

// The residual stream as a sum of arrays, times the norm's weights: a warp has 128 neighbouring values, the lower eight warps
// twice.
struct OneNorm {
    float4 v[2];  // the norm's weights, then what is multiplied

    static __device__ __forceinline__ int place(int thread, int i) { return 4 * (thread + i * GEMV_THREADS); }
    // What a thread without a value at that place reads may be anything that is there.
    static __device__ __forceinline__ int inside(int thread, int i, int width) {
        return place(thread, i) < width ? place(thread, i) : thread % WARP * 4;
    }

    // Before the values are there.
    __device__ __forceinline__ void load_weights(const float *weight, int width) {
        const int thread = thread_here();
#pragma unroll
        for (int i = 0; i < 2; i++) v[i] = load_quad(weight + place(thread, i), place(thread, i) < width);
    }

    // Multiplies with what has come; the weights of places outside are zeros. Returns the sum of squares.
    template <int ARRAYS> __device__ __forceinline__ float multiply(int i, const uint4 *part, int arrays, bool inside) {
        float4 x = as_floats(part[0]);
#pragma unroll
        for (int a = 1; a < ARRAYS; a++) {
            const float4 more = as_floats(part[a]);
            if (a < arrays) x.x += more.x, x.y += more.y, x.z += more.z, x.w += more.w;
        }
        if (!inside) x = make_float4(0.f, 0.f, 0.f, 0.f);
        v[i].x *= x.x, v[i].y *= x.y, v[i].z *= x.z, v[i].w *= x.w;
        return (x.x * x.x + x.y * x.y) + (x.z * x.z + x.w * x.w);
    }

    static __device__ __forceinline__ void leave_squares(float squares, float *scratch, int thread) {
        __syncwarp();
        squares = warp_sum(squares);
        if (thread % WARP == 0) scratch[thread / WARP] = squares;
    }

    // Leaves the warp's sum of squares in `scratch`.
    template <int ARRAYS> __device__ __forceinline__ void receive_sum(const float *x, int arrays, int width, uint32_t turn, uint32_t check, float *scratch) {
        const int thread = thread_here();
        const float *first = x + inside(thread, 0, width), *second = x + inside(thread, 1, width);
        hold(first), hold(second);
        uint4 part[2 * ARRAYS];
        while (true) {
#pragma unroll
            for (int j = 0; j < 2 * ARRAYS; j++) {
                const int a = j % ARRAYS;
                part[j] = peek_quad(behind(j < ARRAYS ? first : second, a < arrays ? a * width : 0));
            }
            uint32_t wrong = 0;
#pragma unroll
            for (int j = 0; j < 2 * ARRAYS; j++) part[j] = turned_quad(part[j], turn & check), wrong |= part[j].x | part[j].y | part[j].z | part[j].w;
            if (none_set(wrong & check)) break;
        }
        float squares = 0.f;
#pragma unroll
        for (int i = 0; i < 2; i++) squares += multiply<ARRAYS>(i, part + i * ARRAYS, arrays, place(thread, i) < width);
        leave_squares(squares, scratch, thread);
    }

    // The same of the stream behind the attention, and, for the upper warps, which have one place each, the sum of their
    // experts' logits' parts.
    __device__ __forceinline__ float receive_attended(const OneParams &p, uint32_t turn, float *scratch) {
        static_assert(MAX_LOGIT_PARTS >= 4 * MAX_PARTS && 2 * MAX_EXPERTS == GEMV_THREADS, "an expert takes a place's registers");
        const int thread = thread_here(), parts = p.parts, logits = GATE_PARTS + parts * FOLD_CUTS;
        const bool upper = thread >= GEMV_THREADS / 2;
        const float *first = p.attended + inside(thread, 0, p.width);
        const float *other = upper ? p.logits + min(thread % MAX_EXPERTS, p.experts - 1) : p.attended + inside(thread, 1, p.width);
        hold(first), hold(other);
        uint4 part[MAX_PARTS];
        uint32_t rest[MAX_LOGIT_PARTS];
        while (true) {
#pragma unroll
            for (int a = 0; a < MAX_PARTS; a++) part[a] = peek_quad(behind(first, a < parts ? a * p.width : 0));
            if (upper) {
#pragma unroll
                for (int i = 0; i < MAX_LOGIT_PARTS; i++) rest[i] = peek(behind(other, i < GATE_PARTS + FOLD_CUTS || i < logits ? i * MAX_EXPERTS : 0));
            } else {
#pragma unroll
                for (int a = 0; a < MAX_PARTS; a++) {
                    const uint4 quad = peek_quad(behind(other, a < parts ? a * p.width : 0));
                    rest[4 * a] = quad.x, rest[4 * a + 1] = quad.y, rest[4 * a + 2] = quad.z, rest[4 * a + 3] = quad.w;
                }
#pragma unroll
                for (int i = 4 * MAX_PARTS; i < MAX_LOGIT_PARTS; i++) rest[i] = turn;
            }
            uint32_t wrong = 0;
#pragma unroll
            for (int a = 0; a < MAX_PARTS; a++) part[a] = turned_quad(part[a], turn), wrong |= part[a].x | part[a].y | part[a].z | part[a].w;
#pragma unroll
            for (int i = 0; i < MAX_LOGIT_PARTS; i++) rest[i] ^= turn, wrong |= rest[i];
            if (none_set(wrong & 1)) break;
        }
        float squares = multiply<MAX_PARTS>(0, part, parts, place(thread, 0) < p.width), z = 0.f;
        if (upper) {
#pragma unroll
            for (int i = 0; i < MAX_LOGIT_PARTS; i++)
                if (i < logits) z += __uint_as_float(rest[i]);
        } else {
            uint4 second[MAX_PARTS];
#pragma unroll
            for (int a = 0; a < MAX_PARTS; a++) second[a] = make_uint4(rest[4 * a], rest[4 * a + 1], rest[4 * a + 2], rest[4 * a + 3]);
            squares += multiply<MAX_PARTS>(1, second, parts, place(thread, 1) < p.width);
        }
        leave_squares(squares, scratch, thread);
        return z;
    }

    // The whole input as an image. Once in the source, as all code of which a layer's warps run a lot.
    template <int F> __device__ __forceinline__ void store(OneShared &shared, int width) const {
        const int thread = thread_here();
        float4 now = v[0];
#pragma unroll 1
        for (int i = 0; i < 2; i++, now = v[1]) {
            const int block = place(thread, i) / IMAGE_BLOCK;  // the same for the warp
            if (block * IMAGE_BLOCK < width) store_image<F>(shared.image, shared.steps + block, width, block, now);
        }
    }
};

// The gate's input: the residual stream before the attention times the weights of the norm behind it. It was there for the norm
// before q, k and v.
DEVICE void image_for_gate(OneShared &shared, const float *weight, const float *x, int arrays, uint32_t turn, uint32_t check) {
    const OnePlan &plan = shared.plan[GATE];
    const int thread = thread_here(), at = plan.begin + 4 * thread, width = shared.p.width;
    if (at >= plan.end) return;  // the same for the warp
    const float4 w = *reinterpret_cast<const float4 *>(weight + at);
    float4 part[2];
    receive(part, x, turn, check, [&](int a) { return (a < arrays ? a * width : 0) + at; });
    __syncwarp();
    float4 v = part[0];
    if (arrays > 1) v.x += part[1].x, v.y += part[1].y, v.z += part[1].z, v.w += part[1].w;
    store_image<BF16>(shared.gate_image, nullptr, plan.end - plan.begin, thread / WARP, make_float4(v.x * w.x, v.y * w.y, v.z * w.z, v.w * w.w));
}

// The norm's factor, once all warps' sums are there.
DEVICE float norm_factor(const float *scratch, int width, float eps) {
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < GEMV_WARPS; i += 4) {
        const float4 v = *reinterpret_cast<const float4 *>(scratch + i);
        total += (v.x + v.y) + (v.z + v.w);
    }
    return rsqrtf(__fdividef(total, width) + eps);
}

// Splits whose sums are on their way together.
constexpr int SPLITS_AT_ONCE = 5;

// The output projection's input: heads' weighted sums over their splits; a warp a head. `folds`: also for the gate's units.
template <int F> DEVICE void image_from_splits(OneShared &shared, int begin, int end, bool folds, uint32_t turn) {
    const OneParams &p = shared.p;
    const int thread = thread_here(), lane = thread & 31, block = thread / WARP, splits = shared.splits;
    if (block >= (end - begin) / IMAGE_BLOCK) return;
    const float *partial = p.partial + shared.split_row[block] * HEAD_DIM + lane * 4;
    const float2 *partial_sums = p.partial_sums + shared.split_row[block];
    hold(partial), hold(partial_sums);
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
    float top = -INFINITY, total = 0.f;
#pragma unroll 1
    for (int s0 = 0; s0 < splits; s0 += SPLITS_AT_ONCE) {
        uint4 part[SPLITS_AT_ONCE];
        uint2 sums[SPLITS_AT_ONCE];
        while (true) {
#pragma unroll
            for (int s = 0; s < SPLITS_AT_ONCE; s++) {
                const uint32_t at = min(s0 + s, splits - 1) * HEADS_HELD;
                part[s] = peek_quad(behind(partial, at * HEAD_DIM)), sums[s] = peek_pair(behind(partial_sums, at));
            }
            uint32_t wrong = 0;
#pragma unroll
            for (int s = 0; s < SPLITS_AT_ONCE; s++) {
                part[s] = turned_quad(part[s], turn), sums[s].x ^= turn, sums[s].y ^= turn;
                wrong |= part[s].x | part[s].y | part[s].z | part[s].w | sums[s].x | sums[s].y;
            }
            if (none_set(wrong & 1)) break;
        }
        float best = top;
#pragma unroll
        for (int s = 0; s < SPLITS_AT_ONCE; s++) best = fmaxf(best, __uint_as_float(sums[s].x));
        const float keep = exp2_fast(top - best);
        top = best, total *= keep, v.x *= keep, v.y *= keep, v.z *= keep, v.w *= keep;
#pragma unroll
        for (int s = 0; s < SPLITS_AT_ONCE; s++) {
            const float weight = s0 + s < splits ? exp2_fast(__uint_as_float(sums[s].x) - best) : 0.f;
            const float4 x = as_floats(part[s]);
            total += weight * __uint_as_float(sums[s].y);
            v.x += weight * x.x, v.y += weight * x.y, v.z += weight * x.z, v.w += weight * x.w;
        }
    }
    const float share = __fdividef(1.f, total);
    v.x *= share, v.y *= share, v.z *= share, v.w *= share;
    __syncwarp();
    store_image<F>(shared.image, shared.steps + block, end - begin, block, v);
    if (F != BF16 && folds) store_image<BF16>(shared.image + FOLD_IMAGE, nullptr, end - begin, block, v);
}

// Images of rows of `inter` values, `all` blocks of 128 together: a warp a block, the loads of up to three at a time.
template <int F> DEVICE void images_of_rows(OneShared &shared, const float *from, int all, int bytes, uint32_t turn) {
    const int thread = thread_here(), warp = thread / WARP, lane = thread & 31, k = shared.p.inter;
#pragma unroll 1
    for (int first = warp; first < all; first += 3 * GEMV_WARPS) {
        float4 v[3];
        receive(v, from, turn, 1, [&](int i) { return min(first + i * GEMV_WARPS, all - 1) * IMAGE_BLOCK + lane * 4; });
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 3; i++) {
            const int task = first + i * GEMV_WARPS;
            if (task >= all) break;
            const float4 now = v[i];
            const int slot = shared.slot[task];
            store_image<F>(shared.image + slot * bytes, shared.steps + task, k, task - slot * (k / IMAGE_BLOCK), now);
        }
    }
}

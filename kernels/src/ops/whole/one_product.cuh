// Products of one token with a slot of weights, and its inputs as images: `stream.cuh` and `image.cuh` for one token, in
// few instructions: sixteen warps share four schedulers, so an instruction of every warp costs four cycles.
#pragma once
#include "one_stream.cuh"

// The format whose images weights of format F meet.
template <int F> constexpr int IMAGE_OF = F == FP8_EXPERTS ? FP8 : F;

// Bytes from a block's tail to the next one's.
template <int F> constexpr int TAIL_BYTES = INT4<F> ? IMAGE_TAIL_BYTES : sizeof(float);

// acc += one stage times the token's image.
// FP8: both as F16, which is exact for the weights and leaves 22 bits of the inputs; `tail`: their step; `scale`: of experts.
template <int F> DEVICE void multiply_one(uint32_t stage, uint32_t x, uint32_t tail, int lane, int bf16_scales, float scale, float (&acc)[1][4]) {
    if constexpr (E4M3<F>) {
        // Two chains of products: each waits half as long.
        float part[2][4] = {};
        uint4 words[4];
        float step;
#pragma unroll
        for (int i = 0; i < 4; i++) words[i] = load_rows(stage, i, lane);
        if constexpr (!TRIOS<F>) asm volatile("ld.shared.f32 %0, [%1];" : "=f"(scale) : "r"(stage + 2048));
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(step) : "r"(tail));
        Operands<1> ops[2];
        ops[0].load(x, 0, lane), ops[1].load(x + 256, 0, lane);
#pragma unroll
        for (int s = 0; s < 4; s++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const uint4 w = words[c * 2 + s / 2];
                uint32_t a[4];
                e4m3_to_f16(s % 2 ? w.z : w.x, a[0], a[2]);
                e4m3_to_f16(s % 2 ? w.w : w.y, a[1], a[3]);
                mma_f16(part[c], a, ops[c].b[0][2 * s], ops[c].b[0][2 * s + 1]);
            }
        scale *= step;
        acc[0][0] += scale * ((part[0][0] + part[0][1]) + (part[1][0] + part[1][1]));
        acc[0][2] += scale * ((part[0][2] + part[0][3]) + (part[1][2] + part[1][3]));
    } else {
        multiply_stage<F, 1>(stage, x, tail, 0, 0, lane, bf16_scales, scale, acc);
    }
}

// The token's inputs of N stages of INT4 as a lane needs them. Not tokens but these stages are the products' columns, and lane
// column t is that of stage t.
template <int N> struct StageInputs {
    uint4 operands[2];  // of a stage's two halves; as `ByteOperands`
    float step;         // 0 where the column has no stage
    int sum;

    __device__ __forceinline__ void load(uint32_t x, uint32_t tail, int lane) {
        static_assert(N <= 4, "a pair of columns a stage");
        const int column = lane >> 2, low = column & 1;
        const uint32_t input = x + (column >> 1) * IMAGE_BLOCK_BYTES<true> + low * 128 + (((lane & 3) * 32) ^ (low * 16));
        operands[0] = load_shared16(input), operands[1] = load_shared16(input ^ 16);
        const int2 scaled = load_shared8(tail + min(lane & 3, N - 1) * IMAGE_TAIL_BYTES);
        step = (lane & 3) < N ? __int_as_float(scaled.x) : 0.f, sum = scaled.y;
    }
};

// N stages of INT4 at once: of a stage's products only its own columns are kept, so scales are applied once; a lane's sums, of the
// rows lane / 4 and lane / 4 + 8, are of its stage. The second row of a byte is multiplied with the first still below it, which is
// taken away from the sum.
template <int N> DEVICE float2 multiply_together(uint32_t stage, const StageInputs<N> &x, int lane, int bf16_scales) {
    constexpr int BYTES = Layout<INT4_G128>::BYTES;
    const int row = lane >> 2, t = min(lane & 3, N - 1);
    int part[N][4] = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {  // the stages' chains of products take turns
        uint4 word[N];
#pragma unroll
        for (int s = 0; s < N; s++) word[s] = load_shared16(stage + s * BYTES + half * 512 + lane * 16);
        const uint4 b = x.operands[half];
#pragma unroll
        for (int s = 0; s < N; s++) {
            const uint32_t a[4] = {word[s].x & 0x0f0f0f0fu, word[s].x, word[s].y & 0x0f0f0f0fu, word[s].y};
            mma_bytes(part[s], a, b.x, b.y);
        }
#pragma unroll
        for (int s = 0; s < N; s++) {
            const uint32_t a[4] = {word[s].z & 0x0f0f0f0fu, word[s].z, word[s].w & 0x0f0f0f0fu, word[s].w};
            mma_bytes(part[s], a, b.z, b.w);
        }
    }
    const uint32_t scales = stage + t * BYTES + 1024;
    const float scale0 = scale_value(load_shared_u16(scales + row * 2), bf16_scales);
    const float scale1 = scale_value(load_shared_u16(scales + 16 + row * 2), bf16_scales);
    const int zero0 = load_shared_u8(scales + 32 + row), zero1 = load_shared_u8(scales + 40 + row);
    int own[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        own[i] = part[N - 1][i];
#pragma unroll
        for (int s = 0; s < N - 1; s++)
            if (t == s) own[i] = part[s][i];
    }
    const int v0 = own[0] * 256 + own[1] - zero0 * x.sum;
    const int v1 = ((own[2] - own[0]) >> 4) * 256 + ((own[3] - own[1]) >> 4) - zero1 * x.sum;
    return make_float2(static_cast<float>(v0) * (scale0 * x.step), static_cast<float>(v1) * (scale1 * x.step));
}

// Adds the columns' sums.
DEVICE float2 sum_columns(float2 v) {
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2)
        v.x += __shfl_xor_sync(ALL_LANES, v.x, offset), v.y += __shfl_xor_sync(ALL_LANES, v.y, offset);
    return v;
}

// Units one after the other of which this warp has the same N stages of inputs, all of its run: up to `end`, one every `step`, as
// many as wait for each other. Leaves their sums.
template <int N, class Scales>
DEVICE void multiply_units(OneStream &stream, OneShared &shared, uint32_t image, uint32_t tail, int lane, int warp, int &unit, int &held, int end,
                           int step, const Scales &scales_of) {
    constexpr int BYTES = N * Layout<INT4_G128>::BYTES;
    StageInputs<N> x;
    x.load(image, tail, lane);
#pragma unroll 1
    for (; held < MAX_UNITS && unit < end; held++, unit += step) {
        const int bf16_scales = scales_of(unit);
        const float2 mine = multiply_together<N>(stream.front(BYTES), x, lane, bf16_scales);
        stream.pop(BYTES);
        const float2 sum = sum_columns(mine);
        if ((lane & 3) == 0) {
            float *to = shared.partial[held] + warp * TILE_ROWS + (lane >> 2);
            to[0] = sum.x, to[8] = sum.y;
        }
    }
}

// A warp's run: `count` stages from stage `first` on.
template <int F>
DEVICE void multiply_stages(OneStream &stream, uint32_t image, uint32_t tails, int first, int count, int lane, int bf16_scales, float (&acc)[1][4]) {
    constexpr int STEP = Layout<F>::K / 64 * 256 / (INT4<F> ? 2 : 1);
    uint32_t x = image + first * STEP, tail = tails + first * TAIL_BYTES<F>;
    RunScales<F> scales;
#pragma unroll 1
    while (count > 0) {
        const bool leads = TRIOS<F> && scales.of == 0;  // with a scale block
        const int held = min(count, COPY_STAGES<F>), bytes = held * Layout<F>::BYTES + (leads ? SCALE_BLOCK : 0);
        uint32_t stage = stream.front(bytes);
        if constexpr (F == INT4_G128) {
            static_assert(COPY_STAGES<F> == 3, "one product of them all");
            const auto add = [&](auto inputs) {
                inputs.load(x, tail, lane);
                const float2 sum = multiply_together(stage, inputs, lane, bf16_scales);
                acc[0][0] += sum.x, acc[0][2] += sum.y;
            };
            if (held == 3)
                add(StageInputs<3>{});
            else if (held == 2)
                add(StageInputs<2>{});
            else
                add(StageInputs<1>{});
            x += held * STEP, tail += held * IMAGE_TAIL_BYTES;
        } else {
#pragma unroll 1
            for (int i = 0; i < held; i++) {
                const float scale = scales.next(stage);
                multiply_one<F>(leads ? stage + SCALE_BLOCK : stage, x, tail, lane, bf16_scales, scale, acc);
                stage += Layout<F>::BYTES, x += STEP, tail += TAIL_BYTES<F>;
            }
        }
        stream.pop(bytes);
        count -= held;
    }
    if constexpr (F == INT4_G128) {
        const float2 sum = sum_columns(make_float2(acc[0][0], acc[0][2]));
        acc[0][0] = sum.x, acc[0][2] = sum.y;
    }
}

// The gate's part: stages of BF16 in pairs (high, low) that meet the same 64 inputs.
DEVICE void multiply_gate(OneStream &stream, uint32_t image, int first, int count, int lane, float (&acc)[1][4]) {
#pragma unroll 1
    for (int i = first; i < first + count; i++) {
        multiply_one<BF16>(stream.front(Layout<BF16>::BYTES), image + (i / 2) * 256, 0, lane, 0, 0.f, acc);
        stream.pop(Layout<BF16>::BYTES);
    }
}

// The same for whole pairs, one copy each: two chains of products.
DEVICE void multiply_pairs(OneStream &stream, uint32_t image, int first, int count, int lane, float (&acc)[1][4]) {
    constexpr int BYTES = Layout<BF16>::BYTES;
    float low[4] = {};
#pragma unroll 1
    for (int i = first; i < first + count; i++) {
        const uint32_t stage = stream.front(2 * BYTES);
        Operands<1> ops;
        ops.load(image + i * 256, 0, lane);
#pragma unroll
        for (int s = 0; s < 4; s++) {
            const uint4 h = load_rows(stage, s, lane), l = load_rows(stage + BYTES, s, lane);
            const uint32_t a[4] = {h.x, h.y, h.z, h.w}, b[4] = {l.x, l.y, l.z, l.w};
            mma_bf16(acc[0], a, ops.b[0][2 * s], ops.b[0][2 * s + 1]);
            mma_bf16(low, b, ops.b[0][2 * s], ops.b[0][2 * s + 1]);
        }
        stream.pop(2 * BYTES);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) acc[0][i] += low[i];
}

// Sums of a unit: [warp][row].
DEVICE void store_sums(float *partial, int warp, int lane, const float (&acc)[1][4]) {
    if ((lane & 3) == 0) {
        partial[warp * TILE_ROWS + lane / 4] = acc[0][0] + acc[0][1];
        partial[warp * TILE_ROWS + 8 + lane / 4] = acc[0][2] + acc[0][3];
    }
}

template <int RUNS_OF_TILE> DEVICE float sum_runs(const float *partial, int tile, int row) {
    float sum = 0.f;
#pragma unroll
    for (int s = 0; s < RUNS_OF_TILE; s++) sum += partial[(tile * RUNS_OF_TILE + s) * TILE_ROWS + row];
    return sum;
}

// The larger absolute value; NaN if there is one.
DEVICE float larger(float a, float b) {
    float v;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(fabsf(a)), "f"(fabsf(b)));
    return v;
}

DEVICE float reciprocal(float a) {
    float v;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(v) : "f"(a));
    return v;
}

// One block of 128 values of an image by one warp, lane l with 4l .. 4l + 3; `tail`: the block's: INT4's step and sums, FP8's step.
template <int F> DEVICE void store_block(uint8_t *to, uint8_t *tail, float4 v) {
    const int lane = thread_here() & 31;
    if constexpr (INT4<F>) {
        // Of absolute values; NaN is the largest, behind infinity.
        uint32_t most = __float_as_uint(larger(larger(v.x, v.y), larger(v.z, v.w)));
        most = __reduce_max_sync(ALL_LANES, most);
        const bool bad = most >= 0x7f800000u;
        const float largest = __uint_as_float(most), step = largest * (1.f / 32512.f);
        // Below that a block is as good as zero, and the reciprocal may be infinite.
        const float inverse = largest > 1e-30f ? 32512.f * reciprocal(largest) : 0.f;
        // Rounded by an addition that leaves no bits below 1: the lower half of a sum's bits is x + 128. So its upper byte is that
        // of x's high part, and its lower byte x's low part but for the sign.
        constexpr float SHIFT = 12582912.f + 128.f;  // 1.5 * 2^23
        constexpr uint32_t SHIFTED = 0x4b400080;
        const uint32_t y[4] = {__float_as_uint(fmaf(v.x, inverse, SHIFT)), __float_as_uint(fmaf(v.y, inverse, SHIFT)),
                               __float_as_uint(fmaf(v.z, inverse, SHIFT)), __float_as_uint(fmaf(v.w, inverse, SHIFT))};
        const uint32_t even = __byte_perm(y[0], y[2], 0x5140), odd = __byte_perm(y[1], y[3], 0x5140);
        const int at = (lane % 8 / 2) * 32 + (lane / 8) * 8 + (lane % 2) * 4;
        *reinterpret_cast<uint32_t *>(to + at) = __byte_perm(even, odd, 0x7632);
        *reinterpret_cast<uint32_t *>(to + 128 + (at ^ 16)) = __byte_perm(even, odd, 0x5410) ^ 0x80808080u;
        int sum = static_cast<int>(y[0] + y[1] + y[2] + y[3] - 4 * SHIFTED);
        if constexpr (F == INT4_G32) {
            int group = sum;
#pragma unroll
            for (int offset = 1; offset < 8; offset *= 2) group += __shfl_xor_sync(ALL_LANES, group, offset);
            if (lane % 8 == 0) *reinterpret_cast<int *>(tail + 16 + lane / 2) = group;
        }
        sum = __reduce_add_sync(ALL_LANES, sum);
        if (lane == 0) *reinterpret_cast<int2 *>(tail) = make_int2(__float_as_int(bad ? NAN : step), sum);
    } else {
        uint2 high, low;
        if constexpr (F == FP8) {
            // The largest becomes 2^14 or more; infinity and NaN stay. Steps are powers of two.
            uint32_t most = __float_as_uint(larger(larger(v.x, v.y), larger(v.z, v.w)));
            most = max(__reduce_max_sync(ALL_LANES, most) >> 23, 15u);
            const float up = __uint_as_float((268 - most) << 23);
            split_f16(v.x * up, v.y * up, high.x, low.x);
            split_f16(v.z * up, v.w * up, high.y, low.y);
            if (lane == 0) *reinterpret_cast<uint32_t *>(tail) = (most - 14) << 23;
        } else {
            split_bf16(v.x, v.y, high.x, low.x);
            split_bf16(v.z, v.w, high.y, low.y);
        }
        to += (lane / 16) * 256;
        const int at = (lane % 16) * 8;
        *reinterpret_cast<uint2 *>(to + at) = high;
        *reinterpret_cast<uint2 *>(to + 128 + (at ^ 64)) = low;
    }
}

// Block `block` of an image of `k` values. `step`: FP8: where its step is left.
template <int F> DEVICE void store_image(uint8_t *image, float *step, int k, int block, float4 v) {
    uint8_t *tail = INT4<F> ? image + k * 2 + block * IMAGE_TAIL_BYTES : reinterpret_cast<uint8_t *>(step);
    store_block<F>(image + block * IMAGE_BLOCK_BYTES<INT4<F>>, tail, v);
}

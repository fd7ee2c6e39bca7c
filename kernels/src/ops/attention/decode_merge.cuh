// How what warps and splits have summed up becomes one result: always in the same order.
#pragma once
#include "../../cuda/plane.cuh"
#include "decode_tiles.cuh"

// So many warps meet in shared memory; of more than these the upper half joins the lower half first.
constexpr int MERGED = 4;
static_assert(DECODE_WARPS == MERGED || DECODE_WARPS == 2 * MERGED);

// By what sums that were made under `maximum` count under `top`.
DEVICE float share_of(float maximum, float top) { return maximum == -INFINITY ? 0.f : exp2_fast(maximum - top); }

// Writes four neighbouring values of the result.
DEVICE void write_out(const AttentionParams &p, int token, int width, int k, float4 v) {
    if (p.out) *reinterpret_cast<float4 *>(p.out + static_cast<size_t>(token) * width + k) = v;
    if (p.plane) {
        *reinterpret_cast<uint32_t *>(p.plane + plane_offset(token, k, p.plane_blocks)) = pack_bf16(v.x, v.y);
        *reinterpret_cast<uint32_t *>(p.plane + plane_offset(token, k + 2, p.plane_blocks)) = pack_bf16(v.z, v.w);
    }
}

DEVICE void add_scaled(float4 &sum, float by, const float4 &v) {
    sum.x += by * v.x, sum.y += by * v.y, sum.z += by * v.z, sum.w += by * v.w;
}

DEVICE float4 divided(const float4 &v, float by) { return make_float4(v.x / by, v.y / by, v.z / by, v.w / by); }

// All splits of a token and head block, in order: eight at a time, with a running maximum over the groups of eight.
template <int HD> DEVICE void merge_splits(const AttentionParams &p, const Work &item, int head_blocks, int width) {
    const size_t base = (static_cast<size_t>(item.first_index) * head_blocks + item.block) * HEADS_HELD;
    const size_t step = static_cast<size_t>(head_blocks) * HEADS_HELD;
#pragma unroll 1
    for (int i = 4 * threadIdx.x; i < item.held * HD; i += 4 * DECODE_THREADS) {
        const int h = i / HD, d = i % HD;
        float top = -INFINITY, total = 0.f;
        float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
        for (int k0 = 0; k0 < item.splits; k0 += 8) {
            float2 sums[8];
            float4 part[8];
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const size_t at = base + (k0 + k) * step + h;
                const bool there = k0 + k < item.splits;
                sums[k] = there ? __ldcg(p.partial_sums + at) : make_float2(-INFINITY, 0.f);
                part[k] = there ? __ldcg(reinterpret_cast<const float4 *>(p.partial + at * HD + d)) : make_float4(0.f, 0.f, 0.f, 0.f);
            }
            float higher = top;
#pragma unroll
            for (int k = 0; k < 8; k++) higher = fmaxf(higher, sums[k].x);
            const float keep = exp2_fast(top - higher);
            total *= keep, top = higher;
            v = make_float4(v.x * keep, v.y * keep, v.z * keep, v.w * keep);
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const float weight = exp2_fast(sums[k].x - top);
                total += weight * sums[k].y;
                add_scaled(v, weight, part[k]);
            }
        }
        write_out(p, item.token, width, item.head0 * HD + i, divided(v, total));
    }
}

// The warps' values, maxima and sums come to shared memory as those of MERGED warps. out[n][0], [1] and [2], [3] are high and low parts.
template <int KV, int HD, class Shared>
DEVICE void meet(Shared &shared, int warp, int lane, float maximum, float sum, float (&out)[HD / 8][4]) {
    const int row = lane >> 2, t = lane & 3;
#pragma unroll
    for (int n = 0; n < HD / 8; n++) out[n][0] += out[n][2], out[n][1] += out[n][3];
    if constexpr (DECODE_WARPS > MERGED) {
        // A lane of an upper warp leaves what it has for the same lane of a lower one.
        float *slot = &shared.out[warp % MERGED][0][0] + lane;
        static_assert(HD / 4 * WARP <= HEADS_HELD * (HD + 4));
        if (warp >= MERGED) {
#pragma unroll
            for (int i = 0; i < HD / 4; i++) slot[i * WARP] = out[i / 2][i % 2];
            if (t == 0) shared.maximum[warp][row] = maximum, shared.sum[warp][row] = sum;
        }
        __syncthreads();
        if (warp < MERGED) {
            const float other = shared.maximum[warp + MERGED][row], top = fmaxf(maximum, other);
            const float mine = share_of(maximum, top), theirs = share_of(other, top);
            maximum = top, sum = sum * mine + shared.sum[warp + MERGED][row] * theirs;
#pragma unroll
            for (int i = 0; i < HD / 4; i++) out[i / 2][i % 2] = out[i / 2][i % 2] * mine + slot[i * WARP] * theirs;
            __syncwarp();  // the slot has been read
        }
    }
    if (warp < MERGED) {
        if (t == 0) shared.maximum[warp][row] = maximum, shared.sum[warp][row] = sum;
#pragma unroll
        for (int n = 0; n < HD / 8; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) shared.out[warp][row][value_dim<KV>(n, t, e)] = out[n][e];
    }
    __syncthreads();
}

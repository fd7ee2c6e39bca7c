// After the q, k and v projections: normalise q and k, rotate them, write q for the attention kernel and k, v to their
// pages. One block a token. The projections may come in parts (cut inputs), which are added here. Decode steps: few.cu.
#include "rope.cuh"

constexpr int ROPE_THREADS = 512, ROPE_WARPS = ROPE_THREADS / WARP, MAX_HEADS = 256;

// Quad `n` of a thread's, of which the first is at `begin`; zeros past the end.
DEVICE float4 rope_quad(const float *from, int n, int begin, int width) {
    const int at = 4 * n * ROPE_THREADS;
    return begin + at < width ? *reinterpret_cast<const float4 *>(from + at) : make_float4(0.f, 0.f, 0.f, 0.f);
}

// Pairs of values whose weights a thread has before the projections are there: 56 heads of 128.
constexpr int ROPE_AHEAD = 7;

template <int KV, int HD> DEVICE void rope_kv(const RopeParams &p) {
    extern __shared__ float values[];  // q, k, v of the token
    __shared__ float scratch[2][ROPE_WARPS], inverse_of_head[MAX_HEADS];
    __shared__ float2 turn[MAX_ROTARY_PAIRS];  // cosine and sine
    const int token = blockIdx.x, kv_heads = p.pages.kv_heads, warp = threadIdx.x / WARP, lane = threadIdx.x & 31;
    const int q_width = p.heads * HD, kv_width = kv_heads * HD, width = q_width + 2 * kv_width;
    // All that does not depend on the projections is there before they are: the angles, the page, and the weights of this
    // thread's values.
    const int position = __ldcg(p.positions + token), half = p.rotary / 2, normed_heads = p.heads + kv_heads;
    const uint32_t page = page_of(p, token, position);
    const auto weight_of = [&](int i) {
        const RopePair pair = rope_pair<HD>(i, half);
        return rope_weight<HD>(p, pair.head, pair);
    };
    float2 weight[ROPE_AHEAD];
#pragma unroll
    for (int n = 0; n < ROPE_AHEAD; n++) {
        const int i = threadIdx.x + n * ROPE_THREADS;
        weight[n] = i < normed_heads * (HD / 2) ? weight_of(i) : make_float2(1.f, 1.f);
    }
    if (threadIdx.x < half) turn[threadIdx.x] = rope_turn(p, threadIdx.x, position);
    wait_for_inputs();
    allow_next_kernel();
    const size_t stride = static_cast<size_t>(p.tokens) * width;
    float q_squares = 0.f, k_squares = 0.f;
    const auto square_sum = [&](int i, float square) {
        if (i < q_width)
            q_squares += square;
        else if (i < q_width + kv_width)
            k_squares += square;
    };
    if (p.bf16) {
        // Two eights of a thread at a time.
#pragma unroll 1
        for (int begin = 8 * threadIdx.x; begin < width; begin += 2 * 8 * ROPE_THREADS) {
            const __nv_bfloat16 *from = reinterpret_cast<const __nv_bfloat16 *>(p.qkv) + static_cast<size_t>(token) * width + begin;
            uint4 v[2];
#pragma unroll
            for (int n = 0; n < 2; n++)
                v[n] = begin + 8 * n * ROPE_THREADS < width ? *reinterpret_cast<const uint4 *>(from + 8 * n * ROPE_THREADS) : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const int i = begin + 8 * n * ROPE_THREADS;
                if (i >= width) continue;
                const float4 a = make_float4(bf16_low(v[n].x), bf16_high(v[n].x), bf16_low(v[n].y), bf16_high(v[n].y));
                const float4 b = make_float4(bf16_low(v[n].z), bf16_high(v[n].z), bf16_low(v[n].w), bf16_high(v[n].w));
                *reinterpret_cast<float4 *>(values + i) = a, *reinterpret_cast<float4 *>(values + i + 4) = b;
                square_sum(i, ((a.x * a.x + a.y * a.y) + (a.z * a.z + a.w * a.w)) + ((b.x * b.x + b.y * b.y) + (b.z * b.z + b.w * b.w)));
            }
        }
    }
    // Four quads of a thread at a time, and of all parts together, as far as there are four.
#pragma unroll 1
    for (int begin = p.bf16 ? width : 4 * threadIdx.x; begin < width; begin += 4 * 4 * ROPE_THREADS) {
        const float *from = p.qkv + static_cast<size_t>(token) * width + begin;
        float4 v[4];
#pragma unroll
        for (int n = 0; n < 4; n++) v[n] = rope_quad(from, n, begin, width);
#pragma unroll 3
        for (int part = 1; part < p.parts; part++) {
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const float4 more = rope_quad(from + part * stride, n, begin, width);
                v[n].x += more.x, v[n].y += more.y, v[n].z += more.z, v[n].w += more.w;
            }
        }
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const int i = begin + 4 * n * ROPE_THREADS;
            if (i >= width) continue;
            *reinterpret_cast<float4 *>(values + i) = v[n];
            square_sum(i, (v[n].x * v[n].x + v[n].y * v[n].y) + (v[n].z * v[n].z + v[n].w * v[n].w));
        }
    }
    q_squares = warp_sum(q_squares), k_squares = warp_sum(k_squares);
    if (lane == 0) scratch[0][warp] = q_squares, scratch[1][warp] = k_squares;
    __syncthreads();
    if (p.norm == 1) {
#pragma unroll 1
        for (int h = warp; h < normed_heads; h += ROPE_WARPS) {
            float sum = 0.f;
            for (int d = lane; d < HD; d += WARP) sum += values[h * HD + d] * values[h * HD + d];
            sum = warp_sum(sum);
            if (lane == 0) inverse_of_head[h] = rsqrtf(sum / HD + p.eps);
        }
    } else if (threadIdx.x < normed_heads) {
        float sum = 0.f;
        const int which = threadIdx.x < p.heads ? 0 : 1;
#pragma unroll
        for (int w = 0; w < ROPE_WARPS; w++) sum += scratch[which][w];
        inverse_of_head[threadIdx.x] = p.norm ? rsqrtf(sum / (which ? kv_width : q_width) + p.eps) : 1.f;
    }
    __syncthreads();
    const auto turn_one = [&](int i, const float2 &w) {
        const RopePair pair = rope_pair<HD>(i, half);
        turn_pair(values + pair.head * HD, pair, inverse_of_head[pair.head], w, half, turn);
    };
#pragma unroll
    for (int n = 0; n < ROPE_AHEAD; n++) {
        const int i = threadIdx.x + n * ROPE_THREADS;
        if (i < normed_heads * (HD / 2)) turn_one(i, weight[n]);
    }
#pragma unroll 1
    for (int i = threadIdx.x + ROPE_AHEAD * ROPE_THREADS; i < normed_heads * (HD / 2); i += ROPE_THREADS)
        turn_one(i, weight_of(i));
    __syncthreads();
    const size_t row_of_q = static_cast<size_t>(token) * q_width;
    if (token < p.first16) {
        for (int i = 4 * threadIdx.x; i < q_width; i += 4 * ROPE_THREADS)
            *reinterpret_cast<float4 *>(p.q + row_of_q + i) = *reinterpret_cast<const float4 *>(values + i);
    } else {
        for (int i = 4 * threadIdx.x; i < q_width; i += 4 * ROPE_THREADS) {
            const float4 v = *reinterpret_cast<const float4 *>(values + i);
            *reinterpret_cast<uint2 *>(p.q16 + row_of_q + i) =
                make_uint2(pack_kv<KV>(v.x * p.scale, v.y * p.scale), pack_kv<KV>(v.z * p.scale, v.w * p.scale));
        }
    }
    for (int i = threadIdx.x * 2; i < kv_width; i += ROPE_THREADS * 2) {
        const int head = i / HD, d = i % HD, row = position % TILE_TOKENS;
        const size_t at = tile_offset<HD * KV_BYTES<KV>>(p.pages, page, head, position);
        const float *k = values + q_width + i, *v = k + kv_width;
        store_pair<KV, HD>(p.pages.k + at, row, d, k[0], k[1]);
        store_pair<KV, HD>(p.pages.v + at, row, d, v[0], v[1]);
    }
}

#define ROPE(NAME, KV, HD)                                                                                             \
    extern "C" __global__ void __launch_bounds__(ROPE_THREADS)                                                         \
        rope_kv_##NAME##_##HD(const __grid_constant__ RopeParams p) { rope_kv<KV, HD>(p); }

KV_KERNELS(ROPE)

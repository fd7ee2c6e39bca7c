// After the q, k and v projections: normalise q and k, rotate them, write q for the attention kernel and k, v to their
// pages. One block a token. The projections may come in parts (cut inputs), which are added here.
#include "../attention/pages.cuh"

struct RopeParams {
    const float *qkv;  // [parts][tokens, width]
    int parts, tokens, heads, rotary;
    int norm;  // 0: none, 1: per head, 2: over the whole projection
    float eps;
    const float *q_norm, *k_norm;
    const double *turns;
    const int *positions, *token_run;
    Pages pages;
    float *q;  // [tokens, heads * head_dim]
};

constexpr int ROPE_THREADS = 512, ROPE_WARPS = ROPE_THREADS / WARP, MAX_ROTARY_PAIRS = 64, MAX_HEADS = 256;

template <int KV, int HD> DEVICE void rope_kv(const RopeParams &p) {
    extern __shared__ float values[];  // q, k, v of the token
    __shared__ float scratch[2][ROPE_WARPS], inverse_of_head[MAX_HEADS];
    __shared__ float2 turn[MAX_ROTARY_PAIRS];  // cosine and sine
    wait_for_inputs();
    allow_next_kernel();
    const int token = blockIdx.x, kv_heads = p.pages.kv_heads, warp = threadIdx.x / WARP, lane = threadIdx.x & 31;
    const int q_width = p.heads * HD, kv_width = kv_heads * HD, width = q_width + 2 * kv_width;
    const int position = p.positions[token];
    const size_t stride = static_cast<size_t>(p.tokens) * width;
    float q_squares = 0.f, k_squares = 0.f;
#pragma unroll 4
    for (int i = 4 * threadIdx.x; i < width; i += 4 * ROPE_THREADS) {
        const float *from = p.qkv + static_cast<size_t>(token) * width + i;
        float4 v = *reinterpret_cast<const float4 *>(from);
        for (int part = 1; part < p.parts; part++) {
            const float4 more = *reinterpret_cast<const float4 *>(from + part * stride);
            v.x += more.x, v.y += more.y, v.z += more.z, v.w += more.w;
        }
        *reinterpret_cast<float4 *>(values + i) = v;
        const float square = (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
        if (i < q_width)
            q_squares += square;
        else if (i < q_width + kv_width)
            k_squares += square;
    }
    const int half = p.rotary / 2, normed_heads = p.heads + kv_heads;
    if (threadIdx.x < half) {
        const double turns = position * p.turns[threadIdx.x];
        float sine, cosine;
        sincospif(2.f * static_cast<float>(turns - rint(turns)), &sine, &cosine);
        turn[threadIdx.x] = make_float2(cosine, sine);
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
    // A thread takes two values of a head: a pair that turns together, or two neighbours past the rotated ones.
#pragma unroll 1
    for (int i = threadIdx.x; i < normed_heads * (HD / 2); i += ROPE_THREADS) {
        const int head = i / (HD / 2), j = i % (HD / 2);
        const bool turns = j < half;
        const int a = turns ? j : 2 * j, b = turns ? j + half : a + 1;
        float *at = values + head * HD;
        float x = at[a] * inverse_of_head[head], y = at[b] * inverse_of_head[head];
        if (p.norm) {  // weights: one per value of the projection, or one per value of a head
            const bool is_q = head < p.heads;
            const float *weight = (is_q ? p.q_norm : p.k_norm) + (p.norm == 2 ? (is_q ? head : head - p.heads) * HD : 0);
            x *= weight[a], y *= weight[b];
        }
        if (turns) {
            const float2 angle = turn[j];
            at[a] = x * angle.x - y * angle.y, at[b] = y * angle.x + x * angle.y;
        } else {
            at[a] = x, at[b] = y;
        }
    }
    __syncthreads();
    for (int i = 4 * threadIdx.x; i < q_width; i += 4 * ROPE_THREADS)
        *reinterpret_cast<float4 *>(p.q + static_cast<size_t>(token) * q_width + i) = *reinterpret_cast<const float4 *>(values + i);
    const uint32_t page = p.pages.tables[static_cast<size_t>(p.token_run[token]) * p.pages.table_stride + position / p.pages.page_tokens];
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

ROPE(bf16, KV_BF16, 128)
ROPE(bf16, KV_BF16, 64)
ROPE(e4m3, KV_E4M3, 128)
ROPE(e4m3, KV_E4M3, 64)
ROPE(e5m2, KV_E5M2, 128)
ROPE(e5m2, KV_E5M2, 64)

// After the q, k and v projections: normalise q and k, rotate them, write q for the attention kernel and k, v to their
// pages. One block a token. The projections may come in parts (cut inputs), which are added here.
#include "../attention/pages.cuh"
#include "rope.cuh"

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

constexpr int ROPE_THREADS = 512;

template <int KV, int HD> DEVICE void rope_kv(const RopeParams &p) {
    extern __shared__ float values[];  // q, k, v of the token
    __shared__ float scratch[ROPE_THREADS / WARP];
    __shared__ float inverse_of_head[256];
    wait_for_inputs();
    allow_next_kernel();
    const int token = blockIdx.x, kv_heads = p.pages.kv_heads;
    const int q_width = p.heads * HD, kv_width = kv_heads * HD, width = q_width + 2 * kv_width;
    for (int i = threadIdx.x; i < width; i += ROPE_THREADS) {
        float v = 0.f;
        for (int part = 0; part < p.parts; part++)
            v += p.qkv[(static_cast<size_t>(part) * p.tokens + token) * width + i];
        values[i] = v;
    }
    __syncthreads();
    const int normed_heads = p.heads + kv_heads;
    if (p.norm == 2) {
        float q = 0.f, k = 0.f;
        for (int i = threadIdx.x; i < q_width; i += ROPE_THREADS) q += values[i] * values[i];
        for (int i = threadIdx.x; i < kv_width; i += ROPE_THREADS) k += values[q_width + i] * values[q_width + i];
        q = rsqrtf(block_sum(q, scratch) / q_width + p.eps);
        k = rsqrtf(block_sum(k, scratch) / kv_width + p.eps);
        for (int h = threadIdx.x; h < normed_heads; h += ROPE_THREADS) inverse_of_head[h] = h < p.heads ? q : k;
    } else {
        const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31;
        for (int h = warp; h < normed_heads; h += ROPE_THREADS / WARP) {
            float sum = 0.f;
            for (int d = lane; d < HD; d += WARP) sum += values[h * HD + d] * values[h * HD + d];
            sum = warp_sum(sum);
            if (lane == 0) inverse_of_head[h] = p.norm ? rsqrtf(sum / HD + p.eps) : 1.f;
        }
    }
    __syncthreads();
    const int position = p.positions[token];
    const uint32_t page = p.pages.tables[static_cast<size_t>(p.token_run[token]) * p.pages.table_stride + position / p.pages.page_tokens];
    // Norm weights: one per value of the projection, or one per value of a head.
    const auto rotate = [&](int head, int d, const float *weight, int first_head) {
        const auto normed = [&](int e) {
            const int at = p.norm == 2 ? (head - first_head) * HD + e : e;
            return values[head * HD + e] * inverse_of_head[head] * (p.norm ? weight[at] : 1.f);
        };
        return rotated(normed, d, p.rotary, position, p.turns);
    };
    for (int i = threadIdx.x; i < q_width; i += ROPE_THREADS)
        p.q[static_cast<size_t>(token) * q_width + i] = rotate(i / HD, i % HD, p.q_norm, 0);
    for (int i = threadIdx.x * 2; i < kv_width; i += ROPE_THREADS * 2) {
        const int head = i / HD, d = i % HD, row = position % TILE_TOKENS;
        const size_t at = tile_offset<HD * KV_BYTES<KV>>(p.pages, page, head, position);
        store_pair<KV, HD>(p.pages.k + at, row, d, rotate(p.heads + head, d, p.k_norm, p.heads),
                           rotate(p.heads + head, d + 1, p.k_norm, p.heads));
        store_pair<KV, HD>(p.pages.v + at, row, d, values[q_width + kv_width + i], values[q_width + kv_width + i + 1]);
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

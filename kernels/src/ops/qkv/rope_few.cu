// The same as rope_kv.cu for the tokens of a decode step: a cluster of eight blocks a token, each with an eighth of its heads, so that few
// tokens' projections are read by many multiprocessors. Norms over the whole projection only (or none): the blocks add up their squares.
#include "../../cuda/cluster.cuh"
#include "rope.cuh"

constexpr int SPREAD = 8, SPREAD_THREADS = 256, SPREAD_WARPS = SPREAD_THREADS / WARP;
// Pairs of values whose weights a thread has before the projections are there: eight heads of 128.
constexpr int SPREAD_AHEAD = 2;

template <int KV, int HD> DEVICE void rope_few(const RopeParams &p) {
    extern __shared__ float values[];  // this block's heads
    __shared__ float2 scratch[SPREAD_WARPS], squares[SPREAD], turn[MAX_ROTARY_PAIRS];
    cluster_arrive();
    const int token = blockIdx.x / SPREAD, rank = blockIdx.x % SPREAD, kv_heads = p.pages.kv_heads;
    const int q_width = p.heads * HD, kv_width = kv_heads * HD, width = q_width + 2 * kv_width;
    const int heads = p.heads + 2 * kv_heads, normed_heads = p.heads + kv_heads, each = ceil_div(heads, SPREAD);
    const int head0 = min(rank * each, heads), held = min(each, heads - head0), normed = max(0, min(held, normed_heads - head0));
    const int position = __ldcg(p.positions + token), half = p.rotary / 2;
    const uint32_t page = page_of(p, token, position);
    const auto weight_of = [&](int i) {
        const RopePair pair = rope_pair<HD>(i, half);
        return rope_weight<HD>(p, head0 + pair.head, pair);
    };
    float2 weight[SPREAD_AHEAD];
#pragma unroll
    for (int n = 0; n < SPREAD_AHEAD; n++) {
        const int i = threadIdx.x + n * SPREAD_THREADS;
        weight[n] = i < normed * (HD / 2) ? weight_of(i) : make_float2(1.f, 1.f);
    }
    if (threadIdx.x < half) turn[threadIdx.x] = rope_turn(p, threadIdx.x, position);
    allow_next_kernel();  // early, see ptx.cuh
    wait_for_inputs();
    const size_t stride = static_cast<size_t>(p.tokens) * width, from = static_cast<size_t>(token) * width + head0 * HD;
    const auto quad = [&](size_t at) {
        if (!p.bf16) return *reinterpret_cast<const float4 *>(p.qkv + at);
        const uint2 v = *reinterpret_cast<const uint2 *>(reinterpret_cast<const __nv_bfloat16 *>(p.qkv) + at);
        return make_float4(bf16_low(v.x), bf16_high(v.x), bf16_low(v.y), bf16_high(v.y));
    };
    float2 sum = make_float2(0.f, 0.f);  // of the squares of q, and of k
#pragma unroll 1
    for (int i = 4 * threadIdx.x; i < held * HD; i += 4 * SPREAD_THREADS) {
        float4 v = quad(from + i);
#pragma unroll 4
        for (int part = 1; part < p.parts; part++) {
            const float4 more = quad(from + part * stride + i);
            v.x += more.x, v.y += more.y, v.z += more.z, v.w += more.w;
        }
        *reinterpret_cast<float4 *>(values + i) = v;
        const float square = (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
        const int head = head0 + i / HD;
        if (head < p.heads)
            sum.x += square;
        else if (head < normed_heads)
            sum.y += square;
    }
    sum.x = warp_sum(sum.x), sum.y = warp_sum(sum.y);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = sum;
    __syncthreads();
    cluster_wait();  // all blocks are there
    if (threadIdx.x < SPREAD) {
        sum = make_float2(0.f, 0.f);
#pragma unroll
        for (int w = 0; w < SPREAD_WARPS; w++) sum.x += scratch[w].x, sum.y += scratch[w].y;
        store_in(in_block(shared_address(squares + rank), threadIdx.x), sum);
    }
    cluster_sync();
    sum = make_float2(0.f, 0.f);
#pragma unroll
    for (int r = 0; r < SPREAD; r++) sum.x += squares[r].x, sum.y += squares[r].y;
    const float q_inverse = p.norm ? rsqrtf(sum.x / q_width + p.eps) : 1.f, k_inverse = p.norm ? rsqrtf(sum.y / kv_width + p.eps) : 1.f;
    const auto turn_one = [&](int i, const float2 &w) {
        const RopePair pair = rope_pair<HD>(i, half);
        turn_pair(values + pair.head * HD, pair, head0 + pair.head < p.heads ? q_inverse : k_inverse, w, half, turn);
    };
#pragma unroll
    for (int n = 0; n < SPREAD_AHEAD; n++) {
        const int i = threadIdx.x + n * SPREAD_THREADS;
        if (i < normed * (HD / 2)) turn_one(i, weight[n]);
    }
#pragma unroll 1
    for (int i = threadIdx.x + SPREAD_AHEAD * SPREAD_THREADS; i < normed * (HD / 2); i += SPREAD_THREADS) turn_one(i, weight_of(i));
    __syncthreads();
    const int queries = max(0, min(held, p.heads - head0)) * HD;
    float *q = p.q + static_cast<size_t>(token) * q_width + head0 * HD;
    for (int i = 4 * threadIdx.x; i < queries; i += 4 * SPREAD_THREADS)
        *reinterpret_cast<float4 *>(q + i) = *reinterpret_cast<const float4 *>(values + i);
    for (int i = queries + 2 * threadIdx.x; i < held * HD; i += 2 * SPREAD_THREADS) {
        const int head = head0 + i / HD - p.heads, d = i % HD;
        const size_t at = tile_offset<HD * KV_BYTES<KV>>(p.pages, page, head % kv_heads, position);
        store_pair<KV, HD>((head < kv_heads ? p.pages.k : p.pages.v) + at, position % TILE_TOKENS, d, values[i], values[i + 1]);
    }
}

#define ROPE(NAME, KV, HD)                                                                                             \
    extern "C" __global__ void __cluster_dims__(SPREAD) __launch_bounds__(SPREAD_THREADS)                              \
        rope_few_##NAME##_##HD(const __grid_constant__ RopeParams p) { rope_few<KV, HD>(p); }

KV_KERNELS(ROPE)

// out[t, h] = softmax(q[t, h] K^T / sqrt(d)) V, causal, for runs of many tokens over their paged context: heads that
// prefill_wide.cu does not serve.
//
// A row is one (token, query head of the kv head), packed, so any number of heads per kv head fills the 128 rows of a
// block. Eight warps own 16 rows each; a ninth copies tiles of 64 positions of keys and values into a ring of shared
// memory; running maximum and sum in registers. Operations: 4 * head_dim per (row, position); bytes: keys and values
// once a block, from the L2.
#include "../../cuda/plane.cuh"
#include "prefill.cuh"

constexpr int PREFILL_WARPS = 8, PREFILL_THREADS = (PREFILL_WARPS + 1) * WARP;
constexpr int PREFILL_TOKENS = 64, PREFILL_CHUNKS = PREFILL_TOKENS / TILE_TOKENS;

template <int KV, int HD> constexpr int CHUNK_BYTES = TILE_TOKENS *HD *KV_BYTES<KV>;
template <int KV, int HD> constexpr int PREFILL_DEPTH = 98304 / (2 * PREFILL_CHUNKS * CHUNK_BYTES<KV, HD>);

template <int KV, int HD> struct PrefillShared {
    uint8_t ring[PREFILL_DEPTH<KV, HD>][2][PREFILL_CHUNKS][CHUNK_BYTES<KV, HD>];
    uint64_t full[PREFILL_DEPTH<KV, HD>], empty[PREFILL_DEPTH<KV, HD>];
};

DEVICE void consumers_meet() { asm volatile("bar.sync 1, %0;" ::"n"(PREFILL_WARPS * WARP) : "memory"); }

template <int KV, int HD> DEVICE void attention_prefill(const PrefillParams &p) {
    extern __shared__ __align__(128) uint8_t raw[];
    PrefillShared<KV, HD> &shared = *reinterpret_cast<PrefillShared<KV, HD> *>(raw);
    constexpr int DEPTH = PREFILL_DEPTH<KV, HD>;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31;
    if (threadIdx.x == 0) {
        for (int i = 0; i < DEPTH; i++) {
            barrier_init(&shared.full[i], 1);
            barrier_init(&shared.empty[i], PREFILL_WARPS);
        }
        barrier_init_fence();
    }
    __syncthreads();
    wait_for_inputs();
    allow_next_kernel();
    const PrefillBlock block = p.blocks[blockIdx.x];
    const int kv_head = blockIdx.y, per_kv = p.heads / p.pages.kv_heads;
    const int first_token = block.first_token, position = block.position, last_row = block.last_row;
    const int end = position + last_row / per_kv + 1, tiles = ceil_div(end, PREFILL_TOKENS);

    if (warp == PREFILL_WARPS) {
        if (lane == 0) {
            const uint32_t *table = p.pages.tables + static_cast<size_t>(block.run) * p.pages.table_stride;
            uint32_t slot = 0, parity = 1;
            for (int tile = 0; tile < tiles; tile++) {
                barrier_wait(&shared.empty[slot], parity);
                const int chunks = min(PREFILL_CHUNKS, ceil_div(end - tile * PREFILL_TOKENS, TILE_TOKENS));
                barrier_expect(&shared.full[slot], chunks * 2 * CHUNK_BYTES<KV, HD>);
                for (int c = 0; c < chunks; c++) {
                    const int at = tile * PREFILL_TOKENS + c * TILE_TOKENS;
                    const size_t from = tile_offset<HD * KV_BYTES<KV>>(p.pages, table[at / p.pages.page_tokens], kv_head, at);
                    bulk_copy(shared.ring[slot][0][c], p.pages.k + from, CHUNK_BYTES<KV, HD>, &shared.full[slot]);
                    bulk_copy(shared.ring[slot][1][c], p.pages.v + from, CHUNK_BYTES<KV, HD>, &shared.full[slot]);
                }
                if (++slot == DEPTH) slot = 0, parity ^= 1;
            }
        }
        return;
    }

    // This lane's two rows.
    const int g = lane >> 2, t = lane & 3, width = p.heads * HD;
    int token[2], head[2], reach[2];
    uint32_t q[HD / 16][4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = min(block.first_row + warp * 16 + g + 8 * i, last_row);
        token[i] = first_token + row / per_kv, head[i] = kv_head * per_kv + row % per_kv;
        reach[i] = position + row / per_kv;
        const float *from = p.q + static_cast<size_t>(token[i]) * width + head[i] * HD;
#pragma unroll
        for (int s = 0; s < HD / 16; s++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float2 v = *reinterpret_cast<const float2 *>(from + query_dim<KV>(s, half, t));
                q[s][2 * half + i] = pack_kv<KV>(v.x * p.scale, v.y * p.scale);
            }
    }
    const int least = position + (block.first_row + warp * 16) / per_kv;  // no row of the warp is before it
    float out[HD / 8][4] = {};
    float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
    uint32_t slot = 0, parity = 0;
    for (int tile = 0; tile < tiles; tile++) {
        const int first = tile * PREFILL_TOKENS;
        barrier_wait(&shared.full[slot], parity);
        if (first + PREFILL_TOKENS > end) {  // rows past the context hold anything; 0 * NaN must not reach the sum
            uint32_t *values = reinterpret_cast<uint32_t *>(shared.ring[slot][1]);
            for (int i = threadIdx.x; i < PREFILL_CHUNKS * CHUNK_BYTES<KV, HD> / 4; i += PREFILL_WARPS * WARP) {
                const int byte = i * 4, c = byte / CHUNK_BYTES<KV, HD>;
                if (first + c * TILE_TOKENS + tile_row<HD * KV_BYTES<KV>>(byte % CHUNK_BYTES<KV, HD>) >= end) values[i] = 0;
            }
            consumers_meet();
        }
        float scores[PREFILL_CHUNKS][2][4] = {};
#pragma unroll
        for (int c = 0; c < PREFILL_CHUNKS; c++) multiply_keys<KV, HD>(shared_address(shared.ring[slot][0][c]), lane, q, scores[c]);
        if (first + PREFILL_TOKENS - 1 > least) {
#pragma unroll
            for (int c = 0; c < PREFILL_CHUNKS; c++)
#pragma unroll
                for (int i = 0; i < 8; i++)
                    if (first + c * TILE_TOKENS + i / 4 * 8 + 2 * t + i % 2 > reach[i % 4 / 2]) scores[c][i / 4][i % 4] = -INFINITY;
        }
        float top[2] = {maximum[0], maximum[1]};
#pragma unroll
        for (int c = 0; c < PREFILL_CHUNKS; c++)
#pragma unroll
            for (int i = 0; i < 8; i++) top[i % 4 / 2] = fmaxf(top[i % 4 / 2], scores[c][i / 4][i % 4]);
        float keep[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            top[i] = fmaxf(top[i], __shfl_xor_sync(ALL_LANES, top[i], 1));
            top[i] = fmaxf(top[i], __shfl_xor_sync(ALL_LANES, top[i], 2));
            // A tile wholly past the row's reach leaves the maximum as it is; the first tile never is.
            keep[i] = exp2_fast(maximum[i] - top[i]);
            maximum[i] = top[i];
            sum[i] *= keep[i];
        }
#pragma unroll
        for (int n = 0; n < HD / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) out[n][i] *= keep[i / 2];
#pragma unroll
        for (int c = 0; c < PREFILL_CHUNKS; c++) {
            float(&s)[2][4] = scores[c];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                s[i / 4][i % 4] = exp2_fast(s[i / 4][i % 4] - top[i % 4 / 2]);
                sum[i % 4 / 2] += s[i / 4][i % 4];
            }
            const uint32_t probability[4] = {pack_kv<KV>(s[0][0], s[0][1]), pack_kv<KV>(s[0][2], s[0][3]),
                                             pack_kv<KV>(s[1][0], s[1][1]), pack_kv<KV>(s[1][2], s[1][3])};
            multiply_values<KV, HD>(shared_address(shared.ring[slot][1][c]), lane, probability, out);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(&shared.empty[slot]);
        if (++slot == DEPTH) slot = 0, parity ^= 1;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 1);
        sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 2);
        if (block.first_row + warp * 16 + g + 8 * i > last_row) continue;
        const float inverse = 1.f / sum[i];
#pragma unroll
        for (int n = 0; n < HD / 8; n++) {
            if constexpr (KV == KV_BF16) {
                const int k = head[i] * HD + value_dim<KV>(n, t, 0);
                const float v0 = out[n][2 * i] * inverse, v1 = out[n][2 * i + 1] * inverse;
                if (p.out) *reinterpret_cast<float2 *>(p.out + static_cast<size_t>(token[i]) * width + k) = make_float2(v0, v1);
                if (p.plane) *reinterpret_cast<uint32_t *>(p.plane + plane_offset(token[i], k, p.plane_blocks)) = pack_bf16(v0, v1);
            } else if (n % 2 == 0) {  // tiles n and n + 1 hold even and odd dims
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int k = head[i] * HD + value_dim<KV>(n, t, e);
                    const float v0 = out[n][2 * i + e] * inverse, v1 = out[n + 1][2 * i + e] * inverse;
                    if (p.out) *reinterpret_cast<float2 *>(p.out + static_cast<size_t>(token[i]) * width + k) = make_float2(v0, v1);
                    if (p.plane) *reinterpret_cast<uint32_t *>(p.plane + plane_offset(token[i], k, p.plane_blocks)) = pack_bf16(v0, v1);
                }
            }
        }
    }
}

#define PREFILL(NAME, KV, HD)                                                                                          \
    extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, 1)                                                   \
        attention_prefill_##NAME##_##HD(const __grid_constant__ PrefillParams p) { attention_prefill<KV, HD>(p); }

PREFILL(bf16, KV_BF16, 64)
PREFILL(e4m3, KV_E4M3, 64)
PREFILL(e5m2, KV_E5M2, 64)

// out[t, h] = softmax(q[t, h] K^T / sqrt(d)) V over positions 0..=position(t): few tokens, split over the context.
//
// Work is (split, head block): up to eight query heads of one kv head share each key and value that is read. Four warps
// take tiles of 16 tokens in turn, each with its own ring of bulk copies, its own running maximum and its own sum; they
// meet in shared memory, and the last split to arrive adds all splits in order. Query and probability are split into
// high and low parts in the two halves of the 16-row operand: almost-f32 scores for one product's price.
// Bytes: keys and values once. In a decode step (`qkv`) the kernel also normalises and rotates q and k and writes the
// new key and value; the context before them is already on its way while the projection still runs.
#include "../../cuda/image.cuh"
#include "../../cuda/plane.cuh"
#include "../qkv/rope.cuh"
#include "decode.cuh"

constexpr int DECODE_WARPS = 4, DECODE_THREADS = DECODE_WARPS * WARP;

template <int KV, int HD> constexpr int TILE_BYTES = TILE_TOKENS *HD *KV_BYTES<KV>;
template <int KV, int HD> constexpr int DECODE_DEPTH = 24576 / (2 * TILE_BYTES<KV, HD>);  // 24 KB a warp

template <int KV, int HD> struct DecodeShared {
    // Between items, when every tile has been read, a warp's ring holds its share of the result.
    union Ring {
        uint8_t tiles[DECODE_DEPTH<KV, HD>][2][TILE_BYTES<KV, HD>];
        float out[HEADS_HELD][HD + 4];
    } ring[DECODE_WARPS];
    float query[HEADS_HELD][HD];
    float key[HD], value[HD];
    float maximum[DECODE_WARPS][HEADS_HELD], sum[DECODE_WARPS][HEADS_HELD];
    uint64_t full[DECODE_WARPS][DECODE_DEPTH<KV, HD>];
    float norm[2][DECODE_WARPS];
    int last;
};

// Writes one value of the result; a warp holds 32 neighbouring dims of one head.
DEVICE void write_out(const AttentionParams &p, int token, int width, int k, float v) {
    if (p.out) p.out[static_cast<size_t>(token) * width + k] = v;
    if (p.plane)
        *reinterpret_cast<__nv_bfloat16 *>(p.plane + plane_offset(token, k & ~1, p.plane_blocks) + (k & 1) * 2) = __float2bfloat16_rn(v);
    if (p.image) {
        uint8_t *image = p.image + static_cast<size_t>(token) * image_bytes(p.image_padded);
        const __nv_bfloat16 high = __float2bfloat16_rn(v), low = __float2bfloat16_rn(v - __bfloat162float(high));
        *reinterpret_cast<__nv_bfloat16 *>(image + image_high(k & ~1) + (k & 1) * 2) = high;
        *reinterpret_cast<__nv_bfloat16 *>(image + image_low(k & ~1) + (k & 1) * 2) = low;
        const float sum = warp_sum(__bfloat162float(high) + __bfloat162float(low));
        if ((threadIdx.x & 31) == 0)
            *reinterpret_cast<float *>(image + image_sum(p.image_padded, k / IMAGE_GROUP)) = sum;
    }
}

// 1 / rms of a projection from the sums of squares of its parts of 32 values.
DEVICE float inverse_rms(const float *squares, int first, int count, float eps, float *scratch) {
    float sum = 0.f;
    for (int i = threadIdx.x; i < count; i += DECODE_THREADS) sum += squares[first + i];
    sum = warp_sum(sum);
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x / WARP] = sum;
    __syncthreads();
    return rsqrtf((scratch[0] + scratch[1] + scratch[2] + scratch[3]) / (count * 32) + eps);
}

// The context's tiles of one item that this warp takes: begin / 16 + warp, then every fourth.
template <int KV, int HD> struct DecodeTiles {
    const Pages *pages;
    const uint32_t *table;
    int head, next, end;
    __device__ bool request(uint8_t (&slot)[2][TILE_BYTES<KV, HD>], uint64_t *full, bool leader) {
        if (next >= end) return false;
        if (leader) {
            const int position = next * TILE_TOKENS;
            const size_t at = tile_offset<HD * KV_BYTES<KV>>(*pages, __ldcg(table + position / pages->page_tokens), head, position);
            barrier_expect(full, 2 * TILE_BYTES<KV, HD>);
            bulk_copy(slot[0], pages->k + at, TILE_BYTES<KV, HD>, full);
            bulk_copy(slot[1], pages->v + at, TILE_BYTES<KV, HD>, full);
        }
        next += DECODE_WARPS;
        return true;
    }
};

template <int KV, int HD> DEVICE void attention_decode(const AttentionParams &p) {
    extern __shared__ __align__(128) uint8_t raw[];
    DecodeShared<KV, HD> &shared = *reinterpret_cast<DecodeShared<KV, HD> *>(raw);
    constexpr int DEPTH = DECODE_DEPTH<KV, HD>;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, row = lane >> 2, t = lane & 3;
    const int per_kv = p.heads / p.pages.kv_heads, blocks_per_kv = ceil_div(per_kv, HEADS_HELD);
    const int head_blocks = p.pages.kv_heads * blocks_per_kv, width = p.heads * HD;
    const bool leader = lane == 0;
    if (leader) {
        for (int i = 0; i < DEPTH; i++) barrier_init(&shared.full[warp][i], 1);
        barrier_init_fence();
    }
    __syncthreads();
    uint32_t slot = 0, parity = 0;
    bool waited = false;
    if (!p.qkv) {  // the kernel before this one writes the newest keys and values
        wait_for_inputs();
        allow_next_kernel();
        waited = true;
    }
    const int work = __ldcg(p.item_count) * head_blocks;
    for (int w = blockIdx.x; w < work; w += gridDim.x) {
        const int index = w / head_blocks, block = w % head_blocks;
        const int kv_head = block / blocks_per_kv, held0 = block % blocks_per_kv * HEADS_HELD;
        const int held = min(HEADS_HELD, per_kv - held0), head0 = kv_head * per_kv + held0;
        AttentionItem item;
        {
            const int2 *from = reinterpret_cast<const int2 *>(p.items + index);
            const int2 a = __ldcg(from), b = __ldcg(from + 1), c = __ldcg(from + 2);
            item = {a.x, a.y, b.x, b.y, c.x, c.y};
        }
        const int position = __ldcg(p.positions + item.token);
        const uint32_t *table = p.pages.tables + static_cast<size_t>(__ldcg(p.token_run + item.token)) * p.pages.table_stride;
        const int end_tile = ceil_div(item.end, TILE_TOKENS);
        DecodeTiles<KV, HD> tiles{&p.pages, table, kv_head, item.begin / TILE_TOKENS + warp, end_tile};
        // All slots are free here; requests start at the slot that is read next.
        for (uint32_t i = 0; i < DEPTH; i++) {
            const uint32_t into = (slot + i) % DEPTH;
            tiles.request(shared.ring[warp].tiles[into], &shared.full[warp][into], leader);
        }
        if (!waited) {
            wait_for_inputs();
            allow_next_kernel();
            waited = true;
        }
        const bool newest = p.qkv && item.end == position + 1;
        if (p.qkv) {
            const int kv_width = p.pages.kv_heads * HD, row_width = width + 2 * kv_width;
            const float *projection = p.qkv + static_cast<size_t>(item.token) * row_width;
            float inverse_q = 1.f, inverse_k = 1.f;
            if (p.squares) {
                const float *squares = p.squares + static_cast<size_t>(item.token) * (row_width / 32);
                inverse_q = inverse_rms(squares, 0, width / 32, p.eps, shared.norm[0]);
                inverse_k = inverse_rms(squares, width / 32, kv_width / 32, p.eps, shared.norm[1]);
            }
            for (int i = threadIdx.x; i < HEADS_HELD * HD; i += DECODE_THREADS) {
                const int h = i / HD, d = i % HD;
                float v = 0.f;
                if (h < held) {
                    const auto normed = [&](int e) {
                        const int at = (head0 + h) * HD + e;
                        return projection[at] * inverse_q * (p.q_norm ? p.q_norm[at] : 1.f);
                    };
                    v = rotated(normed, d, p.rotary, position, p.turns) * p.scale;
                }
                shared.query[h][d] = v;
            }
            if (newest && threadIdx.x < HD) {
                const int d = threadIdx.x;
                const auto normed = [&](int e) {
                    const int at = kv_head * HD + e;
                    return projection[width + at] * inverse_k * (p.k_norm ? p.k_norm[at] : 1.f);
                };
                shared.key[d] = rotated(normed, d, p.rotary, position, p.turns);
                shared.value[d] = projection[width + kv_width + kv_head * HD + d];
            }
        } else {
            for (int i = threadIdx.x; i < HEADS_HELD * HD; i += DECODE_THREADS) {
                const int h = i / HD, d = i % HD;
                shared.query[h][d] =
                    h < held ? p.q[static_cast<size_t>(item.token) * width + (head0 + h) * HD + d] * p.scale : 0.f;
            }
        }
        __syncthreads();
        if (newest && held0 == 0 && threadIdx.x < HD / 2) {
            const int d = threadIdx.x * 2;
            const size_t at = tile_offset<HD * KV_BYTES<KV>>(p.pages, __ldcg(table + position / p.pages.page_tokens), kv_head, position);
            store_pair<KV, HD>(p.pages.k + at, position % TILE_TOKENS, d, shared.key[d], shared.key[d + 1]);
            store_pair<KV, HD>(p.pages.v + at, position % TILE_TOKENS, d, shared.value[d], shared.value[d + 1]);
        }

        uint32_t q[HD / 16][4];
#pragma unroll
        for (int s = 0; s < HD / 16; s++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float *from = shared.query[row] + query_dim<KV>(s, half, t);
                split_kv<KV>(from[0], from[1], q[s][2 * half], q[s][2 * half + 1]);
            }
        float out[HD / 8][4] = {};
        float maximum = -INFINITY, sum = 0.f;
        for (int tile = item.begin / TILE_TOKENS + warp; tile < end_tile; tile += DECODE_WARPS) {
            barrier_wait(&shared.full[warp][slot], parity);
            uint8_t(&data)[2][TILE_BYTES<KV, HD>] = shared.ring[warp].tiles[slot];
            const int first = tile * TILE_TOKENS, valid = item.end - first;
            if (valid < TILE_TOKENS || (newest && valid == TILE_TOKENS)) {
                // The last tile: the newest row comes from here, rows past it hold anything and must not spoil the sum.
                if (newest)
                    for (int d = lane * 2; d < HD; d += 64) {
                        store_pair<KV, HD>(data[0], valid - 1, d, shared.key[d], shared.key[d + 1]);
                        store_pair<KV, HD>(data[1], valid - 1, d, shared.value[d], shared.value[d + 1]);
                    }
                for (int i = lane; i < TILE_BYTES<KV, HD> / 4; i += WARP)
                    if (tile_row<HD * KV_BYTES<KV>>(i * 4) >= valid) reinterpret_cast<uint32_t *>(data[1])[i] = 0;
                fence_async_proxy();
                __syncwarp();
            }
            float scores[2][4] = {};
            multiply_keys<KV, HD>(shared_address(data[0]), lane, q, scores);
            float s[4];
            float top = maximum;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[i] = scores[i / 2][i % 2] + scores[i / 2][i % 2 + 2];
                if (i / 2 * 8 + 2 * t + i % 2 >= valid) s[i] = -INFINITY;
                top = fmaxf(top, s[i]);
            }
            top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
            top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
            const float keep = exp2_fast(maximum - top);
            maximum = top;
            if (__any_sync(ALL_LANES, keep != 1.f)) {
                sum *= keep;
#pragma unroll
                for (int n = 0; n < HD / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) out[n][i] *= keep;
            }
            uint32_t probability[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[i] = exp2_fast(s[i] - top);
                sum += s[i];
            }
            split_kv<KV>(s[0], s[1], probability[0], probability[1]);
            split_kv<KV>(s[2], s[3], probability[2], probability[3]);
            multiply_values<KV, HD>(shared_address(data[1]), lane, probability, out);
            __syncwarp();
            tiles.request(data, &shared.full[warp][slot], leader);
            if (++slot == DEPTH) slot = 0, parity ^= 1;
        }

        // The four warps' sums, in order.
        sum += __shfl_xor_sync(ALL_LANES, sum, 1);
        sum += __shfl_xor_sync(ALL_LANES, sum, 2);
        if (t == 0) shared.maximum[warp][row] = maximum, shared.sum[warp][row] = sum;
#pragma unroll
        for (int n = 0; n < HD / 8; n++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                shared.ring[warp].out[row][value_dim<KV>(n, t, e)] = out[n][e] + out[n][e + 2];
        __syncthreads();
        const bool alone = item.splits == 1;
        const size_t slot_of_item = static_cast<size_t>(index) * head_blocks + block;
        for (int i = threadIdx.x; i < held * HD; i += DECODE_THREADS) {
            const int h = i / HD, d = i % HD;
            float top = -INFINITY;
            for (int k = 0; k < DECODE_WARPS; k++) top = fmaxf(top, shared.maximum[k][h]);
            float total = 0.f, v = 0.f;
            for (int k = 0; k < DECODE_WARPS; k++) {
                const float weight = shared.maximum[k][h] == -INFINITY ? 0.f : exp2_fast(shared.maximum[k][h] - top);
                total += weight * shared.sum[k][h];
                v += weight * shared.ring[k].out[h][d];
            }
            if (alone) {
                write_out(p, item.token, width, (head0 + h) * HD + d, v / total);
            } else {
                p.partial[(slot_of_item * HEADS_HELD + h) * HD + d] = v;
                if (d == 0) p.partial_sums[slot_of_item * HEADS_HELD + h] = make_float2(top, total);
            }
        }
        if (!alone) {
            __threadfence();
            __syncthreads();
            if (threadIdx.x == 0) {
                unsigned *arrived = p.arrived + item.token * head_blocks + block;
                shared.last = atomicAdd(arrived, 1u) == static_cast<unsigned>(item.splits - 1);
                if (shared.last) *arrived = 0;
            }
            __syncthreads();
            if (shared.last) {
                __threadfence();
                for (int i = threadIdx.x; i < held * HD; i += DECODE_THREADS) {
                    const int h = i / HD, d = i % HD;
                    float top = -INFINITY, total = 0.f, v = 0.f;
                    for (int k = 0; k < item.splits; k++)
                        top = fmaxf(top, __ldcg(p.partial_sums + (static_cast<size_t>(item.first_item + k) * head_blocks + block) * HEADS_HELD + h).x);
                    for (int k = 0; k < item.splits; k++) {
                        const size_t at = (static_cast<size_t>(item.first_item + k) * head_blocks + block) * HEADS_HELD + h;
                        const float2 sums = __ldcg(p.partial_sums + at);
                        const float weight = exp2_fast(sums.x - top);
                        total += weight * sums.y;
                        v += weight * __ldcg(p.partial + at * HD + d);
                    }
                    write_out(p, item.token, width, (head0 + h) * HD + d, v / total);
                }
            }
        }
        fence_async_proxy();
        __syncthreads();  // the rings and the query are free again
    }
    if (!waited) {
        wait_for_inputs();
        allow_next_kernel();
    }
}

#define DECODE(NAME, KV, HD)                                                                                           \
    extern "C" __global__ void __launch_bounds__(DECODE_THREADS, 2)                                                    \
        attention_decode_##NAME##_##HD(const __grid_constant__ AttentionParams p) { attention_decode<KV, HD>(p); }

DECODE(bf16, KV_BF16, 128)
DECODE(bf16, KV_BF16, 64)
DECODE(e4m3, KV_E4M3, 128)
DECODE(e4m3, KV_E4M3, 64)
DECODE(e5m2, KV_E5M2, 128)
DECODE(e5m2, KV_E5M2, 64)

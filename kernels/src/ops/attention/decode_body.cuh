// out[t, h] = softmax(q[t, h] K^T / sqrt(d)) V over positions 0..=position(t): few tokens, split over the context.
//
// Work is (split, head block): up to eight query heads of one kv head share each key and value that is read. Warps
// take tiles of 16 tokens in turn, each with its own ring of bulk copies that runs ahead into the block's next work, its
// own running maximum and its own sum; they meet in shared memory, and the last split to arrive adds all splits in
// order. Query and probability are split into high and low parts in the two halves of the 16-row operand: almost-f32
// scores for one product's price.
// Bytes: keys and values once. MAKES_QUERIES (decode_inline.cu): the kernel also normalises and rotates q and k and writes the
// new key and value; the context before them is already on its way while the projection still runs.
#pragma once
#include <climits>

#include "decode_merge.cuh"

constexpr int MAX_ROTARY_PAIRS = 64;

template <int KV, int HD> struct DecodeShared {
    uint8_t ring[DECODE_WARPS][DECODE_DEPTH<KV, HD>][2][TILE_BYTES<KV, HD>];
    float out[MERGED][HEADS_HELD][HD + 4];
    float query[HEADS_HELD][HD];
    float key[HD], value[HD];
    float2 turn[MAX_ROTARY_PAIRS];  // cosine and sine of the pair at the token's position
    Work work[LISTED];
    float maximum[DECODE_WARPS][HEADS_HELD], sum[DECODE_WARPS][HEADS_HELD];
    uint64_t full[DECODE_WARPS][DECODE_DEPTH<KV, HD>];
    float norm[2][DECODE_WARPS];
    int last;
};

// 1 / rms of `count` parts of 32 values from a thread's share of their sums of squares. The first call's barrier also
// covers the second's: both sums go in at once.
DEVICE float2 inverse_rms(float q, float k, int q_width, int kv_width, float eps, float (&scratch)[2][DECODE_WARPS]) {
    q = warp_sum(q), k = warp_sum(k);
    if ((threadIdx.x & 31) == 0) scratch[0][threadIdx.x / WARP] = q, scratch[1][threadIdx.x / WARP] = k;
    __syncthreads();
    q = 0.f, k = 0.f;
#pragma unroll
    for (int i = 0; i < DECODE_WARPS; i++) q += scratch[0][i], k += scratch[1][i];
    return make_float2(rsqrtf(q / q_width + eps), rsqrtf(k / kv_width + eps));
}

template <int KV, int HD> DEVICE void attention_decode(const AttentionParams &p) {
    extern __shared__ __align__(128) uint8_t raw[];
    DecodeShared<KV, HD> &shared = *reinterpret_cast<DecodeShared<KV, HD> *>(raw);
    constexpr int DEPTH = DECODE_DEPTH<KV, HD>, PER_THREAD = HEADS_HELD * HD / DECODE_THREADS, QUADS = (PER_THREAD + 3) / 4;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, row = lane >> 2, t = lane & 3;
    const int per_kv = p.heads / p.pages.kv_heads, blocks_per_kv = ceil_div(per_kv, HEADS_HELD);
    const int head_blocks = p.pages.kv_heads * blocks_per_kv, width = p.heads * HD;
    if (lane == 0) {
#pragma unroll 1
        for (int i = 0; i < DEPTH; i++) barrier_init(&shared.full[warp][i], 1);
        barrier_init_fence();
    }
    uint32_t slot = 0, parity = 0;
    bool waited = false;
    // Items are looked up before their number is known: the list has room for the first ones of every block.
    int work = INT_MAX;
#pragma unroll 1
    for (int first = blockIdx.x; first < work; first += LISTED * gridDim.x) {
        // This block's next pieces of work.
        __syncthreads();
        if (threadIdx.x < LISTED && first + threadIdx.x * gridDim.x < work) {
            const int w = first + threadIdx.x * gridDim.x, index = w / head_blocks, block = w % head_blocks;
            const int4 *from = reinterpret_cast<const int4 *>(p.items + index);
            const int4 a = __ldcg(from), b = __ldcg(from + 1);
            const int kv_head = block / blocks_per_kv, held0 = block % blocks_per_kv * HEADS_HELD;
            shared.work[threadIdx.x] = {a.x, a.y, a.z, a.w, b.x, b.z, index, b.w,
                                        block, kv_head, kv_head * per_kv + held0, min(HEADS_HELD, per_kv - held0)};
        }
        work = __ldcg(p.item_count) * head_blocks;
        const int listed = max(0, min(LISTED, ceil_div(work - first, static_cast<int>(gridDim.x))));
        __syncthreads();
        DecodeTiles<KV, HD> tiles{&p, shared.work, 0, warp, lane, 0, 0, 0, 0, 0, 0, 0};
        tiles.start(listed);
        // All slots are free here; requests start at the slot that is read next. MAKES_QUERIES: the newest token is in no tile
        // that is read, else the kernel before this one writes it: its tile waits.
        uint32_t requested = 0;
        const auto fill = [&](bool all) {
#pragma unroll 1
            for (; requested < DEPTH && (all || tiles.settled()); requested++) {
                const uint32_t into = (slot + requested) % DEPTH;
                tiles.request(shared.ring[warp][into], &shared.full[warp][into]);
            }
        };
        fill(waited || MAKES_QUERIES);
        // Queries are loaded a piece ahead.
        float4 query[QUADS];
        const auto load_query = [&](int piece) {
            const Work &item = shared.work[piece];
#pragma unroll
            for (int i = 0; i < QUADS; i++) {
                const int at = 4 * (threadIdx.x + i * DECODE_THREADS);
                query[i] = make_float4(0.f, 0.f, 0.f, 0.f);
                if (piece < listed && at < item.held * HD)
                    query[i] = *reinterpret_cast<const float4 *>(p.q + static_cast<size_t>(item.token) * width + item.head0 * HD + at);
            }
        };
        if constexpr (!MAKES_QUERIES) {
            if (!waited) {
                wait_for_inputs();
                allow_next_kernel();
                waited = true;
            }
            load_query(0);
            fill(true);
        }
#pragma unroll 1
        for (int piece = 0; piece < listed; piece++) {
            const Work item = shared.work[piece];
            const int kv_head = item.kv_head, head0 = item.head0, held = item.held;
            const bool newest = MAKES_QUERIES && item.end == item.position + 1;
            if constexpr (MAKES_QUERIES) {
                const int kv_width = p.pages.kv_heads * HD, row_width = width + 2 * kv_width;
                if (threadIdx.x < p.rotary / 2) {
                    const double turn = item.position * p.turns[threadIdx.x];
                    float sine, cosine;
                    sincospif(2.f * static_cast<float>(turn - rint(turn)), &sine, &cosine);
                    shared.turn[threadIdx.x] = make_float2(cosine, sine);
                }
                float weight[PER_THREAD], k_weight = 1.f;
#pragma unroll
                for (int i = 0; i < PER_THREAD; i++) {
                    const int at = threadIdx.x + i * DECODE_THREADS;
                    weight[i] = p.q_norm && at < held * HD ? p.q_norm[head0 * HD + at] : 1.f;
                }
                if (p.k_norm && threadIdx.x < HD) k_weight = p.k_norm[kv_head * HD + threadIdx.x];
                if (!waited) {
                    wait_for_inputs();
                    allow_next_kernel();
                    waited = true;
                }
                const float *projection = p.qkv + static_cast<size_t>(item.token) * row_width;
                float value[PER_THREAD], key = 0.f, fresh = 0.f;
#pragma unroll
                for (int i = 0; i < PER_THREAD; i++) {
                    const int at = threadIdx.x + i * DECODE_THREADS;
                    value[i] = at < held * HD ? projection[head0 * HD + at] : 0.f;
                }
                if (newest && threadIdx.x < HD) {
                    key = projection[width + kv_head * HD + threadIdx.x];
                    fresh = projection[width + kv_width + kv_head * HD + threadIdx.x];
                }
                float2 inverse = make_float2(1.f, 1.f);
                if (p.squares) {
                    const float *squares = p.squares + static_cast<size_t>(item.token) * (row_width / 32);
                    float q = 0.f, k = 0.f;
#pragma unroll 2
                    for (int i = threadIdx.x; i < width / 32; i += DECODE_THREADS) q += squares[i];
                    if (threadIdx.x < kv_width / 32) k = squares[width / 32 + threadIdx.x];
                    inverse = inverse_rms(q, k, width, kv_width, p.eps, shared.norm);
                }
#pragma unroll
                for (int i = 0; i < PER_THREAD; i++)
                    (&shared.query[0][0])[threadIdx.x + i * DECODE_THREADS] = value[i] * inverse.x * weight[i] * p.scale;
                if (threadIdx.x < HD) shared.key[threadIdx.x] = key * inverse.y * k_weight, shared.value[threadIdx.x] = fresh;
                __syncthreads();
                const int half = p.rotary / 2;
#pragma unroll 1
                for (int i = threadIdx.x; i < (held + 1) * half; i += DECODE_THREADS) {
                    const int h = i / half, d = i % half;
                    float *head = h < held ? shared.query[h] : shared.key;
                    const float2 turn = shared.turn[d];
                    const float a = head[d], b = head[d + half];
                    head[d] = a * turn.x - b * turn.y;
                    head[d + half] = b * turn.x + a * turn.y;
                }
            } else {
#pragma unroll
                for (int i = 0; i < QUADS; i++) {
                    const int at = threadIdx.x + i * DECODE_THREADS;
                    const float4 v = query[i];
                    if (4 * at < HEADS_HELD * HD)
                        reinterpret_cast<float4 *>(shared.query)[at] = make_float4(v.x * p.scale, v.y * p.scale, v.z * p.scale, v.w * p.scale);
                }
                load_query(piece + 1);
            }
            __syncthreads();
            if (newest && head0 == kv_head * per_kv && threadIdx.x < HD / 2) {
                const int d = threadIdx.x * 2, position = item.position;
                const uint32_t *table = p.pages.tables + static_cast<size_t>(item.run) * p.pages.table_stride;
                const size_t at = tile_offset<HD * KV_BYTES<KV>>(p.pages, __ldcg(table + position / p.pages.page_tokens), kv_head, position);
                store_pair<KV, HD>(p.pages.k + at, position % TILE_TOKENS, d, shared.key[d], shared.key[d + 1]);
                store_pair<KV, HD>(p.pages.v + at, position % TILE_TOKENS, d, shared.value[d], shared.value[d + 1]);
            }

            uint32_t q[HD / 16][4];
#pragma unroll
            for (int s = 0; s < HD / 16; s++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float2 v = *reinterpret_cast<const float2 *>(shared.query[row] + query_dim<KV>(s, half, t));
                    split_kv<KV>(v.x, v.y, q[s][2 * half], q[s][2 * half + 1]);
                }
            float out[HD / 8][4] = {};
            float maximum = -INFINITY, sum = 0.f;
#pragma unroll 1
            for (int tile = item.begin / TILE_TOKENS + warp; tile * TILE_TOKENS < item.end; tile += DECODE_WARPS) {
                barrier_wait(&shared.full[warp][slot], parity);
                uint8_t(&data)[2][TILE_BYTES<KV, HD>] = shared.ring[warp][slot];
                const int valid = item.end - tile * TILE_TOKENS;
                if (valid < TILE_TOKENS || (newest && valid == TILE_TOKENS)) {
                    // The last tile: the newest row comes from here, rows past it hold anything and must not spoil the sum.
                    if (newest) {
#pragma unroll 1
                        for (int d = lane * 2; d < HD; d += 64) {
                            store_pair<KV, HD>(data[0], valid - 1, d, shared.key[d], shared.key[d + 1]);
                            store_pair<KV, HD>(data[1], valid - 1, d, shared.value[d], shared.value[d + 1]);
                        }
                    }
#pragma unroll 1
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
                tiles.request(data, &shared.full[warp][slot]);
                if (++slot == DEPTH) slot = 0, parity ^= 1;
            }

            sum += __shfl_xor_sync(ALL_LANES, sum, 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
            meet<KV, HD>(shared, warp, lane, maximum, sum, out);
            const bool alone = item.splits == 1 && !p.leave_splits;
            const size_t place = static_cast<size_t>(item.index) * head_blocks + item.block;
#pragma unroll 1
            for (int i = 4 * threadIdx.x; i < held * HD; i += 4 * DECODE_THREADS) {
                const int h = i / HD, d = i % HD;
                float top = -INFINITY;
#pragma unroll
                for (int k = 0; k < MERGED; k++) top = fmaxf(top, shared.maximum[k][h]);
                float total = 0.f;
                float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
                for (int k = 0; k < MERGED; k++) {
                    const float weight = share_of(shared.maximum[k][h], top);
                    total += weight * shared.sum[k][h];
                    add_scaled(v, weight, *reinterpret_cast<const float4 *>(&shared.out[k][h][d]));
                }
                if (alone) {
                    write_out(p, item.token, width, head0 * HD + i, divided(v, total));
                } else {
                    *reinterpret_cast<float4 *>(p.partial + place * HEADS_HELD * HD + i) = v;
                    if (d == 0) p.partial_sums[place * HEADS_HELD + h] = make_float2(top, total);
                }
            }
            if (!alone && !p.leave_splits) {
                __threadfence();
                __syncthreads();
                if (threadIdx.x == 0) {
                    unsigned *arrived = p.arrived + item.token * head_blocks + item.block;
                    shared.last = atomicAdd(arrived, 1u) == static_cast<unsigned>(item.splits - 1);
                    if (shared.last) *arrived = 0;
                }
                __syncthreads();
                if (shared.last) {
                    __threadfence();
                    merge_splits<HD>(p, item, head_blocks, width);
                }
            }
            __syncthreads();  // the results and the query are free again
        }
    }
    if (!waited) {
        wait_for_inputs();
        allow_next_kernel();
    }
}

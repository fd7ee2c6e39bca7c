// Attention of `one.cu`: a block takes a share of one kv head's context, a warp every sixteenth tile of it.
#pragma once
#include "one_product.cuh"

// The layer's row of the table, by the last warp; the block meets before anybody reads it. Its vectors are asked for, so
// that no norm waits for the memory: a few lines by each block.
DEVICE void copy_layer(const OneParams &p, OneShared &shared, int layer) {
    static_assert(sizeof(OneLayer) % 8 == 0 && sizeof(OneLayer) / 8 <= WARP, "a lane copies one word");
    const int lane = threadIdx.x - (GEMV_THREADS - WARP);
    if (lane >= 0 && lane < static_cast<int>(sizeof(OneLayer) / 8))
        reinterpret_cast<uint64_t *>(&shared.layers[layer & 1])[lane] = reinterpret_cast<const uint64_t *>(p.layer + layer)[lane];
    if (lane < 0) return;
    __syncwarp();
    const OneLayer &l = shared.layers[layer & 1];
    constexpr int LINE = 128 / sizeof(float);
#pragma unroll 1
    for (int line = blockIdx.x + gridDim.x * lane, v = 0; v < 5; v++) {
        const float *vector = v == 0 ? l.norm : v == 1 ? l.q_norm : v == 2 ? l.k_norm : v == 3 ? l.moe_norm : l.bias;
        const int lines = (v == 1 ? p.q_width : v == 2 ? p.kv_width : v == 4 ? p.experts : p.width) / LINE;
        if (vector && line >= 0 && line < lines) asm volatile("prefetch.global.L2 [%0];" ::"l"(vector + line * LINE));
        line -= lines;
    }
}

// The pair of dims that thread `j` of 64 normalises and rotates: the two of a rotation, or two neighbours behind them.
DEVICE void pair_of(int j, int rotary, int &a, int &b) {
    const int half = rotary / 2;
    a = j < half ? j : rotary + 2 * (j - half);
    b = j < half ? j + half : a + 1;
}

DEVICE float2 turned(const OneShared &shared, int j, float a, float b) {
    if (j >= shared.p.rotary / 2) return make_float2(a, b);
    const float2 turn = shared.turn[j];
    return make_float2(a * turn.x - b * turn.y, b * turn.x + a * turn.y);
}

// The norms' weights of the thread's values.
struct QueryWeights {
    float qa, qb, ka, kb;

    __device__ __forceinline__ void load(const OneShared &shared, const OneLayer &l) {
        const OneParams &p = shared.p;
        const int per_kv = p.q_width / p.kv_width, h = threadIdx.x / 64;
        int a, b;
        pair_of(threadIdx.x % 64, p.rotary, a, b);
        qa = qb = ka = kb = 1.f;
        if (!l.q_norm) return;
        const float *q = l.q_norm + (shared.head * per_kv + h) * HEAD_DIM, *k = l.k_norm + shared.head * HEAD_DIM;
        if (h < per_kv) qa = __ldg(q + a), qb = __ldg(q + b);
        if (h == 0) ka = __ldg(k + a), kb = __ldg(k + b);
    }
};

// Query (as operands), and the token's own key and value where the block's share ends with it.
template <int KV> DEVICE void prepare_query(OneShared &shared, const OneLayer &l, bool newest) {
    const OneParams &p = shared.p;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / WARP, per_kv = p.q_width / p.kv_width;
    const int h = threadIdx.x / 64, j = threadIdx.x % 64, head0 = shared.head * per_kv;
    int a, b;
    pair_of(j, p.rotary, a, b);
    QueryWeights weights;
    weights.load(shared, l);
    float qa = 0.f, qb = 0.f, ka = 0.f, kb = 0.f, fresh = 0.f;
    if (h < per_kv) {
        const float *q = p.projection + (head0 + h) * HEAD_DIM;
        qa = __ldcg(q + a), qb = __ldcg(q + b);
    }
    const float *k = p.projection + p.q_width + shared.head * HEAD_DIM;
    if (newest && threadIdx.x < 64) {
        ka = __ldcg(k + a), kb = __ldcg(k + b);
    }
    if (newest && threadIdx.x < HEAD_DIM) fresh = __ldcg(k + p.kv_width + threadIdx.x);
    float q_squares = 0.f, k_squares = 0.f;
    if (l.q_norm) {
#pragma unroll 2
        for (int i = lane; i < p.q_width / 32; i += WARP) q_squares += __ldcg(p.squares + i);
        for (int i = lane; i < p.kv_width / 32; i += WARP) k_squares += __ldcg(p.squares + p.q_width / 32 + i);
        q_squares = rsqrtf(__fdividef(warp_sum(q_squares), p.q_width) + p.eps);
        k_squares = rsqrtf(__fdividef(warp_sum(k_squares), p.kv_width) + p.eps);
    } else {
        q_squares = k_squares = 1.f;
    }
    const float2 q = turned(shared, j, qa * q_squares * weights.qa * p.scale, qb * q_squares * weights.qb * p.scale);
    shared.query[h][a] = q.x, shared.query[h][b] = q.y;
    if (newest && threadIdx.x < 64) {
        const float2 key = turned(shared, j, ka * k_squares * weights.ka, kb * k_squares * weights.kb);
        shared.key[a] = key.x, shared.key[b] = key.y;
    }
    if (newest && threadIdx.x < HEAD_DIM) shared.value[threadIdx.x] = fresh;
    __syncthreads();
    if (warp < HEAD_DIM / 16) {
        uint32_t part[4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float2 v = *reinterpret_cast<const float2 *>(shared.query[lane >> 2] + query_dim<KV>(warp, half, lane & 3));
            split_kv<KV>(v.x, v.y, part[2 * half], part[2 * half + 1]);
        }
        shared.operands[warp][lane] = make_uint4(part[0], part[1], part[2], part[3]);
    } else if (newest && threadIdx.x >= GEMV_THREADS - HEAD_DIM / 2) {
        const int d = (threadIdx.x - (GEMV_THREADS - HEAD_DIM / 2)) * 2, tile = shared.tiles - 1;
        const int row = __ldcg(p.position) % TILE_TOKENS;
        const size_t place = static_cast<size_t>(shared.tile[tile - shared.tile0]) * 16;
        store_pair<KV, HEAD_DIM>(l.stream[STREAM_KEYS] + place, row, d, shared.key[d], shared.key[d + 1]);
        store_pair<KV, HEAD_DIM>(l.stream[STREAM_VALUES] + place, row, d, shared.value[d], shared.value[d + 1]);
    }
    __syncthreads();
}

// One row of a tile's chunk of dims, from shared memory.
template <int KV, int CHUNK> DEVICE void patch_row(uint32_t slot, const float *from, int row, int lane) {
    uint8_t *tile = static_cast<uint8_t *>(__cvta_shared_to_generic(slot));
#pragma unroll 1
    for (int d = lane * 2; d < CHUNK; d += 2 * WARP) store_pair<KV, CHUNK>(tile, row, d, from[d], from[d + 1]);
}

// Rows behind the newest one hold anything and must not spoil the sum.
DEVICE void clear_rows(uint32_t slot, int first, int lane) {
    uint32_t *tile = static_cast<uint32_t *>(__cvta_shared_to_generic(slot));
#pragma unroll 1
    for (int i = first * 32 + lane; i < TILE_TOKENS * 32; i += WARP) tile[i] = 0;
}

// `prepared` is called between the query and the products.
template <int DENSE, int EXPERT, int KV, class Prepared>
DEVICE void attend(OneShared &shared, const OneLayer &l, OneStream<DENSE, EXPERT, KV> &stream, const Prepared &prepared) {
    constexpr int SLOTS = OneShape<DENSE, EXPERT, KV>::KEY_SLOTS, CHUNK = HEAD_DIM / SLOTS;
    const OneParams &p = shared.p;
    if (shared.split >= shared.splits) return;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, row = lane >> 2, t = lane & 3;
    const int position = __ldcg(p.position), held = p.q_width / p.kv_width;
    prepare_query<KV>(shared, l, shared.tile1 == shared.tiles && shared.tile0 < shared.tile1);
    prepared();

    float out[SLOTS][CHUNK / 8][4] = {};
    float maximum = -INFINITY, sum = 0.f;
#pragma unroll 1
    for (int tile = shared.tile0 + warp; tile < shared.tile1; tile += GEMV_WARPS) {
        const int valid = position + 1 - tile * TILE_TOKENS;  // rows of the tile, 16 or more: all
        const bool last = tile == shared.tiles - 1;  // its newest row comes from here
        uint32_t slots[SLOTS];
#pragma unroll
        for (int i = 0; i < SLOTS; i++) {
            slots[i] = stream.front(i);
            if (last) patch_row<KV, CHUNK>(slots[i], shared.key + i * CHUNK, valid - 1, lane);
        }
        if (last) {
            fence_async_proxy();
            __syncwarp();
        }
        float scores[2][4] = {};
#pragma unroll
        for (int i = 0; i < SLOTS; i++) {
            uint32_t q[CHUNK / 16][4];
#pragma unroll
            for (int s = 0; s < CHUNK / 16; s++) {
                const uint4 v = shared.operands[i * (CHUNK / 16) + s][lane];
                q[s][0] = v.x, q[s][1] = v.y, q[s][2] = v.z, q[s][3] = v.w;
            }
            multiply_keys<KV, CHUNK>(slots[i], lane, q, scores);
        }
        stream.pop(SLOTS);
        float s[4], top = maximum;
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
        sum *= keep;
#pragma unroll
        for (int i = 0; i < SLOTS; i++)
#pragma unroll
            for (int n = 0; n < CHUNK / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) out[i][n][e] *= keep;
        uint32_t probability[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s[i] = exp2_fast(s[i] - top);
            sum += s[i];
        }
        split_kv<KV>(s[0], s[1], probability[0], probability[1]);
        split_kv<KV>(s[2], s[3], probability[2], probability[3]);
#pragma unroll
        for (int i = 0; i < SLOTS; i++) {
            slots[i] = stream.front(i);
            if (!last) continue;
            patch_row<KV, CHUNK>(slots[i], shared.value + i * CHUNK, valid - 1, lane);
            clear_rows(slots[i], valid, lane);
        }
        if (last) {
            fence_async_proxy();
            __syncwarp();
        }
#pragma unroll
        for (int i = 0; i < SLOTS; i++) multiply_values<KV, CHUNK>(slots[i], lane, probability, out[i]);
        stream.pop(SLOTS);
    }
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    sum += __shfl_xor_sync(ALL_LANES, sum, 2);

    // The upper warps' results join the lower ones', these the block's, always in this order. Pairs of neighbouring dims.
    constexpr int HALF = GEMV_WARPS / 2, PAIRS = HEAD_DIM / 8;
    const int place = warp % HALF;
    float2 mine[PAIRS];
    const auto dim = [&](int i) { return KV == KV_BF16 ? 8 * i + 2 * t : 16 * (i / 2) + 4 * t + 2 * (i % 2); };
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        constexpr int TILES = CHUNK / 8;
        if constexpr (KV == KV_BF16) {
            const float(&o)[4] = out[i / TILES][i % TILES];
            mine[i] = make_float2(o[0] + o[2], o[1] + o[3]);
        } else {
            const float(&even)[4] = out[0][i / 2 * 2], (&odd)[4] = out[0][i / 2 * 2 + 1];
            mine[i] = make_float2(even[i % 2] + even[i % 2 + 2], odd[i % 2] + odd[i % 2 + 2]);
        }
    }
    if (warp >= HALF) {
        if (t == 0) shared.maximum[place][row] = maximum, shared.sum[place][row] = sum;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) *reinterpret_cast<float2 *>(&shared.merged[place][row][dim(i)]) = mine[i];
    }
    __syncthreads();
    if (warp < HALF) {
        const float other = shared.maximum[place][row], top = fmaxf(maximum, other);
        const float my_share = maximum == -INFINITY ? 0.f : exp2_fast(maximum - top);
        const float other_share = other == -INFINITY ? 0.f : exp2_fast(other - top);
        sum = my_share * sum + other_share * shared.sum[place][row];
        __syncwarp();
        if (t == 0) shared.maximum[place][row] = top, shared.sum[place][row] = sum;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            float2 &at = *reinterpret_cast<float2 *>(&shared.merged[place][row][dim(i)]);
            at = make_float2(my_share * mine[i].x + other_share * at.x, my_share * mine[i].y + other_share * at.y);
        }
    }
    __syncthreads();
    const size_t first = (static_cast<size_t>(shared.head) * shared.splits + shared.split) * HEADS_HELD;
#pragma unroll 1
    for (int i = threadIdx.x; i < held * HEAD_DIM; i += GEMV_THREADS) {
        const int h = i / HEAD_DIM, d = i % HEAD_DIM;
        float top = -INFINITY, total = 0.f, v = 0.f;
#pragma unroll
        for (int w = 0; w < HALF; w++) top = fmaxf(top, shared.maximum[w][h]);
#pragma unroll
        for (int w = 0; w < HALF; w++) {
            const float weight = shared.maximum[w][h] == -INFINITY ? 0.f : exp2_fast(shared.maximum[w][h] - top);
            total += weight * shared.sum[w][h];
            v += weight * shared.merged[w][h][d];
        }
        p.partial[(first + h) * HEAD_DIM + d] = v;
        if (d == 0) p.partial_sums[first + h] = make_float2(top, total);
    }
}

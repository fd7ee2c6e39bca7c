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
template <int KV> DEVICE void prepare_query(OneShared &shared, const OneLayer &l, unsigned epoch, bool newest) {
    const OneParams &p = shared.p;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / WARP, per_kv = p.q_width / p.kv_width;
    const int h = threadIdx.x / 64, j = threadIdx.x % 64, head0 = shared.head * per_kv;
    int a, b;
    pair_of(j, p.rotary, a, b);
    QueryWeights weights;
    weights.load(shared, l);
    listen_together(p, QKV, epoch);
    const uint32_t turn = epoch & 1;
    // Queries a, b; keys a, b; the value of the thread; and the sums of squares of four units at a time, those of the queries,
    // then of the keys, the whole by each warp. As in `receive`, what a thread does not need is read twice.
    const int of_q = p.q_width / 128, all = of_q + p.kv_width / 128;
    const float *q0 = p.projection + (head0 + (h < per_kv ? h : 0)) * HEAD_DIM;
    const float *k = p.projection + p.q_width + shared.head * HEAD_DIM;
    const float *k0 = newest && threadIdx.x < 64 ? k : q0;
    const float *v0 = newest && threadIdx.x < HEAD_DIM ? k + p.kv_width + threadIdx.x : q0;
    uint32_t got[5];
    uint4 squares[2];
    while (true) {
        got[0] = peek(q0 + a), got[1] = peek(q0 + b), got[2] = peek(k0 + a), got[3] = peek(k0 + b), got[4] = peek(v0);
#pragma unroll
        for (int i = 0; i < 2; i++) squares[i] = peek_quad(p.squares + (lane + i * WARP < all ? lane + i * WARP : 0) * 4);
        uint32_t wrong = 0;
#pragma unroll
        for (int i = 0; i < 5; i++) wrong |= got[i] ^= turn;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            squares[i] = turned_quad(squares[i], turn);
            wrong |= squares[i].x | squares[i].y | squares[i].z | squares[i].w;
        }
        if (!(wrong & 1)) break;
    }
    float q_squares = 1.f, k_squares = 1.f;
    if (l.q_norm) {
        q_squares = k_squares = 0.f;
        const auto add = [&](int quad, float4 v) {
            const float sum = (v.x + v.y) + (v.z + v.w);
            (quad < of_q ? q_squares : k_squares) += sum;
        };
        if (lane < all) add(lane, as_floats(squares[0]));
        if (lane + WARP < all) add(lane + WARP, as_floats(squares[1]));
#pragma unroll 1
        for (int quad = lane + 2 * WARP; quad < all; quad += WARP) {
            float4 v[1];
            receive(v, p.squares, turn, 1, [&](int) { return quad * 4; });
            add(quad, v[0]);
        }
        __syncwarp();
        q_squares = rsqrtf(__fdividef(warp_sum(q_squares), p.q_width) + p.eps);
        k_squares = rsqrtf(__fdividef(warp_sum(k_squares), p.kv_width) + p.eps);
    }
    const float qa = h < per_kv ? __uint_as_float(got[0]) : 0.f, qb = h < per_kv ? __uint_as_float(got[1]) : 0.f, ka = __uint_as_float(got[2]), kb = __uint_as_float(got[3]);
    const float fresh = __uint_as_float(got[4]);
    const float2 q = turned(shared, j, qa * q_squares * weights.qa * p.scale, qb * q_squares * weights.qb * p.scale);
    shared.query[h][a] = q.x, shared.query[h][b] = q.y;
    if (newest && threadIdx.x < 64) {
        const float2 key = turned(shared, j, ka * k_squares * weights.ka, kb * k_squares * weights.kb);
        shared.key[a] = key.x, shared.key[b] = key.y;
    }
    if (newest && threadIdx.x < HEAD_DIM) shared.value[threadIdx.x] = fresh;
    meet();
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
        const int row = shared.position % TILE_TOKENS;
        const size_t place = static_cast<size_t>(shared.tile[tile - shared.tile0]) * 16;
        store_pair<KV, HEAD_DIM>(l.stream[STREAM_KEYS] + place, row, d, shared.key[d], shared.key[d + 1]);
        store_pair<KV, HEAD_DIM>(l.stream[STREAM_VALUES] + place, row, d, shared.value[d], shared.value[d + 1]);
    }
    meet();
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

// Scores of a tile's 16 tokens (rows) and 8 heads (columns), of the query's two parts.
template <int KV> DEVICE void score_tile(uint32_t tile, int lane, const uint4 (&operands)[HEAD_DIM / 16][WARP], float (&high)[4], float (&low)[4]) {
    constexpr int ROW = HEAD_DIM * KV_BYTES<KV>;
    const int matrix = lane / 8, row = lane % 8;
    if constexpr (KV == KV_BF16) {
#pragma unroll
        for (int s = 0; s < HEAD_DIM / 16; s++) {
            uint32_t k[4];
            load_matrix4(k, tile + swizzled<ROW>((matrix & 1) * 8 + row, (2 * s + matrix / 2) * 16));
            const uint4 q = operands[s][lane];
            mma_kv<KV>(high, k, q.x, q.z);
            mma_kv<KV>(low, k, q.y, q.w);
        }
    } else {
#pragma unroll
        for (int s = 0; s < HEAD_DIM / 16; s += 2) {
            uint32_t b[4];  // (tokens 0.., 8..) x (products s, s + 1)
            load_matrix4(b, tile + swizzled<ROW>((matrix / 2) * 8 + row, (s + (matrix & 1)) * 16));
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const uint32_t k[4] = {fp8_pair_to_f16<KV>(static_cast<uint16_t>(b[j])), fp8_pair_to_f16<KV>(static_cast<uint16_t>(b[2 + j])),
                                       fp8_pair_to_f16<KV>(static_cast<uint16_t>(b[j] >> 16)), fp8_pair_to_f16<KV>(static_cast<uint16_t>(b[2 + j] >> 16))};
                const uint4 q = operands[s + j][lane];
                mma_kv<KV>(high, k, q.x, q.z);
                mma_kv<KV>(low, k, q.y, q.w);
            }
        }
    }
}

// out[n] += the values of a tile, dims (rows) 16 n and on, times the heads' probabilities: high parts, low parts. BF16: a lane
// has the dims row and row + 8; FP8: 2 row and 2 row + 1.
template <int KV> DEVICE void weigh_tile(uint32_t tile, int lane, const uint32_t (&p)[4], float (&out)[HEAD_DIM / 16][4]) {
    constexpr int ROW = HEAD_DIM * KV_BYTES<KV>;
    const int matrix = lane / 8, row = lane % 8;
    if constexpr (KV == KV_BF16) {
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 16; n++) {
            uint32_t b[4];  // (tokens 0.., 8..) x (dims 16 n.., 16 n + 8..)
            load_matrix4_transposed(b, tile + swizzled<ROW>((matrix & 1) * 8 + row, (2 * n + matrix / 2) * 16));
            const uint32_t v[4] = {b[0], b[2], b[1], b[3]};
            mma_kv<KV>(out[n], v, p[0], p[1]);
            mma_kv<KV>(out[n], v, p[2], p[3]);
        }
    } else {
#pragma unroll
        for (int u = 0; u < HEAD_DIM / 16; u += 2) {
            uint32_t b[4];  // (tokens 0.., 8..) x (units u, u + 1 of 16 dims)
            load_matrix4_transposed(b, tile + swizzled<ROW>((matrix & 1) * 8 + row, (u + matrix / 2) * 16));
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const auto pair = [](uint32_t v) { return fp8_pair_to_f16<KV>(static_cast<uint16_t>(v)); };
                const uint32_t v[4] = {pair(__byte_perm(b[2 * i], 0, 0x20)), pair(__byte_perm(b[2 * i], 0, 0x31)),
                                       pair(__byte_perm(b[2 * i + 1], 0, 0x20)), pair(__byte_perm(b[2 * i + 1], 0, 0x31))};
                mma_kv<KV>(out[u + i], v, p[0], p[1]);
                mma_kv<KV>(out[u + i], v, p[2], p[3]);
            }
        }
    }
}

// What a block without a share of the context leaves: readers leave it out, but its turn must be right.
DEVICE void leave_nothing(const OneShared &shared, uint32_t turn) {
    const OneParams &p = shared.p;
    const size_t first = (static_cast<size_t>(shared.head) * p.split_stride + shared.split) * HEADS_HELD;
    if (shared.split >= p.split_stride) return;
#pragma unroll 1
    for (int i = threadIdx.x; i < HEADS_HELD * HEAD_DIM; i += GEMV_THREADS) publish(p.partial + first * HEAD_DIM + i, 0.f, turn);
    if (threadIdx.x < 2 * HEADS_HELD) publish(&p.partial_sums[first].x + threadIdx.x, 0.f, turn);
}

// `prepared` is called between the query and the products. Ends with a meeting: others write where it read.
template <int KV, class Prepared>
DEVICE void attend(OneShared &shared, const OneLayer &l, OneStream &stream, unsigned epoch, const Prepared &prepared) {
    constexpr int SLOTS = HEAD_DIM * KV_BYTES<KV> / 128, CHUNK = HEAD_DIM / SLOTS;
    const OneParams &p = shared.p;
    const uint32_t turn = epoch & 1;
    if (shared.split >= shared.splits) {
        leave_nothing(shared, turn);
        if (threadIdx.x == 0) announce(p, ATTENTION);
        return;
    }
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, row = lane >> 2, t = lane & 3;
    const int position = shared.position, held = p.q_width / p.kv_width;
    prepare_query<KV>(shared, l, epoch, shared.tile1 == shared.tiles && shared.tile0 < shared.tile1);
    prepared();

    // Tokens, then dims, are the rows of the products, heads their columns: 8, in two parts that add up. A lane has the heads
    // 2t and 2t + 1.
    float out[HEAD_DIM / 16][4] = {};
    float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};
#pragma unroll 1
    for (int tile = shared.tile0 + warp; tile < shared.tile1; tile += GEMV_WARPS) {
        const int valid = position + 1 - tile * TILE_TOKENS;  // rows of the tile, 16 or more: all
        const bool last = tile == shared.tiles - 1;  // its newest row comes from here
        uint32_t place = stream.front(KEY_BYTES<KV>);  // chunks of 128 bytes a token lie one behind the other
        if (last) {
#pragma unroll
            for (int i = 0; i < SLOTS; i++)
                patch_row<KV, CHUNK>(place + i * (KEY_BYTES<KV> / SLOTS), shared.key + i * CHUNK, valid - 1, lane);
            fence_async_proxy();
            __syncwarp();
        }
        float high[4] = {}, low[4] = {};
        score_tile<KV>(place, lane, shared.operands, high, low);
        stream.pop(KEY_BYTES<KV>);
        float s[4], keep[2];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s[i] = high[i] + low[i];
            if (row + i / 2 * 8 >= valid) s[i] = -INFINITY;
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float top = fmaxf(maximum[h], fmaxf(s[h], s[2 + h]));
#pragma unroll
            for (int offset = 4; offset < WARP; offset *= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, offset));
            keep[h] = exp2_fast(maximum[h] - top);
            maximum[h] = top;
            s[h] = exp2_fast(s[h] - top), s[2 + h] = exp2_fast(s[2 + h] - top);
            sum[h] = sum[h] * keep[h] + (s[h] + s[2 + h]);
        }
        if (tile >= shared.tile0 + GEMV_WARPS) {
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 16; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) out[n][e] *= keep[e % 2];
        }
        uint32_t part[4];  // probabilities of tokens 0 to 7, 8 to 15: high parts, low parts
        split_kv<KV>(s[0], s[1], part[0], part[2]);
        split_kv<KV>(s[2], s[3], part[1], part[3]);
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(part[i]));
        place = stream.front(KEY_BYTES<KV>);
        if (last) {
#pragma unroll
            for (int i = 0; i < SLOTS; i++) {
                patch_row<KV, CHUNK>(place + i * (KEY_BYTES<KV> / SLOTS), shared.value + i * CHUNK, valid - 1, lane);
                clear_rows(place + i * (KEY_BYTES<KV> / SLOTS), valid, lane);
            }
            fence_async_proxy();
            __syncwarp();
        }
        weigh_tile<KV>(place, lane, part, out);
        stream.pop(KEY_BYTES<KV>);
    }
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int offset = 4; offset < WARP; offset *= 2) sum[h] += __shfl_xor_sync(ALL_LANES, sum[h], offset);

    // The upper warps' results join the lower ones', these the block's, always in this order.
    constexpr int HALF = GEMV_WARPS / 2;
    const int at = warp % HALF;
    float *mine = &shared.merged[at][2 * t][0];
    const auto dim = [&](int n, int half) { return n * 16 + (KV == KV_BF16 ? row + 8 * half : 2 * row + half); };
    const auto offset = [&](int n, int e) { return e % 2 * MERGED_STRIDE + dim(n, e / 2); };
    const bool needed = 2 * t < held;
    if (warp >= HALF) {
        if (row == 0) {
#pragma unroll
            for (int h = 0; h < 2; h++) shared.maximum[at][2 * t + h] = maximum[h], shared.sum[at][2 * t + h] = sum[h];
        }
        if (needed) {
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 16; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) mine[offset(n, e)] = out[n][e];
        }
    }
    meet();
    if (warp < HALF) {
        float my_share[2], other_share[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float other = shared.maximum[at][2 * t + h], top = fmaxf(maximum[h], other);
            my_share[h] = maximum[h] == -INFINITY ? 0.f : exp2_fast(maximum[h] - top);
            other_share[h] = other == -INFINITY ? 0.f : exp2_fast(other - top);
            sum[h] = my_share[h] * sum[h] + other_share[h] * shared.sum[at][2 * t + h];
            maximum[h] = top;
        }
        __syncwarp();
        if (row == 0) {
#pragma unroll
            for (int h = 0; h < 2; h++) shared.maximum[at][2 * t + h] = maximum[h], shared.sum[at][2 * t + h] = sum[h];
        }
        if (needed) {
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 16; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) mine[offset(n, e)] = my_share[e % 2] * out[n][e] + other_share[e % 2] * mine[offset(n, e)];
        }
    }
    meet();
    const size_t first = (static_cast<size_t>(shared.head) * p.split_stride + shared.split) * HEADS_HELD;
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
        publish(p.partial + (first + h) * HEAD_DIM + d, v, turn);
        // Finite: an infinity has no turn.
        if (d < 2) publish(&p.partial_sums[first + h].x + d, d ? total : fmaxf(top, -1e38f), turn);
    }
    if (threadIdx.x == 0) announce(p, ATTENTION);
    meet();
}

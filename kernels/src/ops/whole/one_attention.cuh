// Attention of `one.cu`: a block takes a share of one kv head's context, a warp every sixteenth tile of it.
#pragma once
#include "one_product.cuh"

// The layer's row of the table, by the last warp; the block meets before anybody reads it. Its vectors are asked for, so
// that no norm waits for the memory: a few lines by each block.
DEVICE void copy_layer(const OneParams &p, OneShared &shared, int layer) {
    static_assert(sizeof(OneLayer) % 8 == 0 && sizeof(OneLayer) / 8 <= WARP, "a lane copies one word");
    const int lane = thread_here() - (GEMV_THREADS - WARP);
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

// Two pairs of neighbouring values that a lane normalises and rotates: v = factor * (own * x + other * x of the rotation's
// other half). Pairs lie in one half of a rotation: the host sees to it.
struct Rotated {
    int at[2], with[2];
    float2 own[2], other[2];

    // `weight`: the norm's, or null.
    __device__ __forceinline__ void prepare(const OneShared &shared, int first, int second, const float *weight, bool turns) {
        const int rotary = turns ? shared.p.rotary : 0, half = rotary / 2;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int d = i ? second : first;
            const bool lower = d < half, inside = d < rotary;
            at[i] = d, with[i] = lower ? d + half : inside ? d - half : d;
            float4 turn = make_float4(1.f, 0.f, 1.f, 0.f);
            if (inside) turn = *reinterpret_cast<const float4 *>(&shared.turn[lower ? d : d - half]);
            own[i] = make_float2(turn.x, turn.z), other[i] = lower ? make_float2(-turn.y, -turn.w) : make_float2(turn.y, turn.w);
            if (!weight) continue;
            const float2 mine = __ldg(reinterpret_cast<const float2 *>(weight + d)), its = __ldg(reinterpret_cast<const float2 *>(weight + with[i]));
            own[i].x *= mine.x, own[i].y *= mine.y, other[i].x *= its.x, other[i].y *= its.y;
        }
    }
};

// Four neighbouring values of a row of a tile.
template <int KV> DEVICE void store_four(uint8_t *tile, int row, int d, float4 v) {
    uint8_t *at = tile + swizzled<HEAD_DIM * KV_BYTES<KV>>(row, d * KV_BYTES<KV>);
    if constexpr (KV == KV_BF16)
        *reinterpret_cast<uint2 *>(at) = make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
    else
        *reinterpret_cast<uint32_t *>(at) = kv_pair_fp8<KV>(v.x, v.y) | static_cast<uint32_t>(kv_pair_fp8<KV>(v.z, v.w)) << 16;
}

// Query (as operands) by eight warps, and the token's own key and value, where the block's share ends with it, by one each.
template <int KV, class Note> DEVICE void prepare_query(OneShared &shared, const OneLayer &l, unsigned epoch, bool newest, const Note &note) {
    const OneParams &p = shared.p;
    const int thread = thread_here(), lane = thread & 31, warp = thread / WARP, per_kv = shared.per_kv, head = lane >> 2;
    constexpr int KEY_WARP = HEAD_DIM / 16, VALUE_WARP = KEY_WARP + 1;
    const bool query = warp < KEY_WARP, takes_part = query || (newest && warp <= VALUE_WARP);
    Rotated rotated;
    const float *from = p.projection;
    if (takes_part) {
        const int q_head = shared.head * per_kv + min(head, per_kv - 1);
        const float *weight = nullptr;
        if (l.q_norm && warp != VALUE_WARP) weight = query ? l.q_norm + q_head * HEAD_DIM : l.k_norm + shared.head * HEAD_DIM;
        from += query ? q_head * HEAD_DIM : p.q_width + shared.head * HEAD_DIM + (warp == VALUE_WARP ? p.kv_width : 0);
        rotated.prepare(shared, query ? query_dim<KV>(warp, 0, lane & 3) : 4 * lane, query ? query_dim<KV>(warp, 1, lane & 3) : 4 * lane + 2, weight,
                        warp != VALUE_WARP);
    }
    listen_together(p, QKV, epoch);
    note(ATTENTION, 0);
    if (takes_part) {
        // The values, and the sums of squares of four units at a time: those of the queries, then of the keys.
        const uint32_t turn = epoch & 1;
        const int of_q = p.q_width / 128, all = of_q + p.kv_width / 128;
        uint2 x[2], y[2];
        uint4 squares[2];
        const float *all_squares = p.squares;
        hold(from), hold(all_squares);
        while (true) {
#pragma unroll
            for (int i = 0; i < 2; i++) x[i] = peek_pair(behind(from, rotated.at[i])), y[i] = peek_pair(behind(from, rotated.with[i]));
#pragma unroll
            for (int i = 0; i < 2; i++) squares[i] = peek_quad(behind(all_squares, (lane + i * WARP < all ? lane + i * WARP : 0) * 4));
            uint32_t wrong = 0;
#pragma unroll
            for (int i = 0; i < 2; i++) wrong |= (x[i].x ^= turn) | (x[i].y ^= turn) | (y[i].x ^= turn) | (y[i].y ^= turn);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                squares[i] = turned_quad(squares[i], turn);
                wrong |= squares[i].x | squares[i].y | squares[i].z | squares[i].w;
            }
            if (none_set(wrong & 1)) break;
        }
        __syncwarp();
        float factor = 1.f;
        if (l.q_norm && warp != VALUE_WARP) {
            float sum = 0.f;
            const auto add = [&](int quad, float4 v) {
                if (quad < all && (quad < of_q) == query) sum += (v.x + v.y) + (v.z + v.w);
            };
            add(lane, as_floats(squares[0])), add(lane + WARP, as_floats(squares[1]));
#pragma unroll 1
            for (int quad = lane + 2 * WARP; quad < all; quad += WARP) {
                float4 v[1];
                receive(v, p.squares, turn, 1, [&](int) { return quad * 4; });
                add(quad, v[0]);
            }
            __syncwarp();
            factor = rsqrtf(__fdividef(warp_sum(sum), query ? p.q_width : p.kv_width) + p.eps);
        }
        if (query) factor = head < per_kv ? factor * p.scale : 0.f;
        float v[4];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            v[2 * i] = factor * (rotated.own[i].x * __uint_as_float(x[i].x) + rotated.other[i].x * __uint_as_float(y[i].x));
            v[2 * i + 1] = factor * (rotated.own[i].y * __uint_as_float(x[i].y) + rotated.other[i].y * __uint_as_float(y[i].y));
        }
        if (query) {
            uint32_t part[4];
            split_kv<KV>(v[0], v[1], part[0], part[1]);
            split_kv<KV>(v[2], v[3], part[2], part[3]);
            shared.operands[warp][lane] = make_uint4(part[0], part[1], part[2], part[3]);
        } else {
            const bool is_key = warp == KEY_WARP;
            *reinterpret_cast<float4 *>((is_key ? shared.key : shared.value) + 4 * lane) = make_float4(v[0], v[1], v[2], v[3]);
            const size_t place = static_cast<size_t>(shared.tile[shared.tiles - 1 - shared.tile0]) * 16;
            uint8_t *tile = l.stream[is_key ? STREAM_KEYS : STREAM_VALUES] + place;
            const int row = shared.position % TILE_TOKENS;
            store_four<KV>(tile, row, 4 * lane, make_float4(v[0], v[1], v[2], v[3]));
        }
    }
    meet();
}

// One row of a tile, from shared memory.
template <int KV> DEVICE void patch_row(uint32_t place, const float *from, int row, int lane) {
    static_assert(HEAD_DIM == 4 * WARP, "a lane has four values");
    store_four<KV>(static_cast<uint8_t *>(__cvta_shared_to_generic(place)), row, 4 * lane, *reinterpret_cast<const float4 *>(from + 4 * lane));
}

// Rows behind the newest one hold anything and must not spoil the sum.
template <int KV> DEVICE void clear_rows(uint32_t place, int first, int lane) {
    uint4 *tile = static_cast<uint4 *>(__cvta_shared_to_generic(place));
#pragma unroll
    for (int i = 0; i < KEY_BYTES<KV> / 16; i += WARP)
        if (tile_row<HEAD_DIM * KV_BYTES<KV>>((lane + i) * 16) >= first) tile[lane + i] = make_uint4(0, 0, 0, 0);
}

// Scores of a tile's 16 tokens (rows) and 8 heads (columns), of the query's two parts, each in two chains of products.
template <int KV> DEVICE void score_tile(uint32_t tile, int lane, const uint4 (&operands)[HEAD_DIM / 16][WARP], float (&high)[2][4], float (&low)[2][4]) {
    constexpr int ROW = HEAD_DIM * KV_BYTES<KV>;
    const int matrix = lane / 8, row = lane % 8;
    if constexpr (KV == KV_BF16) {
#pragma unroll
        for (int s = 0; s < HEAD_DIM / 16; s++) {
            uint32_t k[4];
            load_matrix4(k, tile + swizzled<ROW>((matrix & 1) * 8 + row, (2 * s + matrix / 2) * 16));
            const uint4 q = operands[s][lane];
            mma_kv<KV>(high[s % 2], k, q.x, q.z);
            mma_kv<KV>(low[s % 2], k, q.y, q.w);
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
                mma_kv<KV>(high[j], k, q.x, q.z);
                mma_kv<KV>(low[j], k, q.y, q.w);
            }
        }
    }
}

// What a block without a share of the context leaves, in a step's last layer: nobody reads it in this step, and in the next one, where
// this place may be read, it then has the turn of the layer before the first.
DEVICE void leave_nothing(const OneShared &shared, uint32_t turn) {
    const OneParams &p = shared.p;
    const size_t first = (static_cast<size_t>(shared.head) * p.split_stride + shared.split) * HEADS_HELD;
    if (shared.split >= p.split_stride) return;
#pragma unroll 1
    for (int i = thread_here(); i < HEADS_HELD * HEAD_DIM; i += GEMV_THREADS) publish(p.partial + first * HEAD_DIM + i, 0.f, turn);
    const int thread = thread_here();
    if (thread < 2 * HEADS_HELD) publish(&p.partial_sums[first].x + thread, 0.f, turn);
}

// acc = 16 dims (rows) from `unit` on times the heads' probabilities. BF16: a lane has the dims row and row + 8; FP8: 2 row
// and 2 row + 1.
template <int KV> DEVICE void weigh_unit(uint32_t tile, int unit, int lane, const uint4 &p, float (&acc)[4]) {
    constexpr int ROW = HEAD_DIM * KV_BYTES<KV>;
    const int matrix = lane / 8, row = lane % 8;
    uint32_t b[4];
    if constexpr (KV == KV_BF16) {
        load_matrix4_transposed(b, tile + swizzled<ROW>(matrix / 2 * 8 + row, (2 * unit + (matrix & 1)) * 16));
        mma_kv<KV>(acc, b, p.x, p.y);
        mma_kv<KV>(acc, b, p.z, p.w);
    } else {
        load_matrix4_transposed(b, tile + swizzled<ROW>((matrix & 1) * 8 + row, unit * 16));
        const auto pair = [](uint32_t v) { return fp8_pair_to_f16<KV>(static_cast<uint16_t>(v)); };
        const uint32_t v[4] = {pair(__byte_perm(b[0], 0, 0x20)), pair(__byte_perm(b[0], 0, 0x31)), pair(__byte_perm(b[1], 0, 0x20)),
                               pair(__byte_perm(b[1], 0, 0x31))};
        mma_kv<KV>(acc, v, p.x, p.y);
        mma_kv<KV>(acc, v, p.z, p.w);
    }
}

// A warp's tile: leaves probabilities, maximum and sum of its tokens, and where the values are. Returns whether something was
// written into the values, so that a fence must stand before the next copy to their place.
template <int KV> DEVICE bool score_one(OneShared &shared, OneStream &stream, int tile, int lane, int warp) {
    const int row = lane >> 2, t = lane & 3;
    const int valid = shared.position + 1 - tile * TILE_TOKENS;  // rows of the tile, 16 or more: all
    const bool last = tile == shared.tiles - 1;  // its newest row comes from here
    uint32_t place = stream.front(TOGETHER<KV>);
    if (last) {
        patch_row<KV>(place, shared.key, valid - 1, lane);
        __syncwarp();
    }
    float high[2][4] = {}, low[2][4] = {};
    score_tile<KV>(place, lane, shared.operands, high, low);
    // The place must be free before the values are waited for: their copy may need it.
    if (last) fence_async_proxy();
    stream.pop(KEY_BYTES<KV>);
    float s[4], sum[2], maximum[2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        s[i] = (high[0][i] + high[1][i]) + (low[0][i] + low[1][i]);
        if (row + i / 2 * 8 >= valid) s[i] = -INFINITY;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float top = fmaxf(s[h], s[2 + h]);
#pragma unroll
        for (int offset = 4; offset < WARP; offset *= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, offset));
        maximum[h] = top;
        s[h] = exp2_fast(s[h] - top), s[2 + h] = exp2_fast(s[2 + h] - top);
        sum[h] = s[h] + s[2 + h];
    }
    uint32_t part[4];  // probabilities of tokens 0 to 7, 8 to 15: high parts, low parts
    split_kv<KV>(s[0], s[1], part[0], part[2]);
    split_kv<KV>(s[2], s[3], part[1], part[3]);
#pragma unroll
    for (int i = 0; i < 4; i++) asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(part[i]));
    shared.round.likely[warp][lane] = make_uint4(part[0], part[1], part[2], part[3]);
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int offset = 4; offset < WARP; offset *= 2) sum[h] += __shfl_xor_sync(ALL_LANES, sum[h], offset);
    if (row == 0) {
        *reinterpret_cast<float2 *>(&shared.maximum[warp][2 * t]) = make_float2(maximum[0], maximum[1]);
        *reinterpret_cast<float2 *>(&shared.sum[warp][2 * t]) = make_float2(sum[0], sum[1]);
    }
    place = stream.front(KEY_BYTES<KV>);
    if (lane == 0) shared.values[warp] = place;
    if (last) {
        patch_row<KV>(place, shared.value, valid - 1, lane);
        clear_rows<KV>(place, valid, lane);
    }
    return last;
}

// Sixteen tiles at a time: a warp scores one of them, then weighs 16 dims of the values of eight.
template <int KV, class Note>
DEVICE void attend(OneShared &shared, const OneLayer &l, OneStream &stream, unsigned epoch, const Note &note) {
    const OneParams &p = shared.p;
    const uint32_t turn = epoch & 1;
    if (shared.split >= shared.splits) {
        if (epoch == shared.epoch + p.layers) leave_nothing(shared, turn);
        if (thread_here() == 0) announce(p, ATTENTION);
        return;
    }
    const int thread = thread_here(), warp = thread / WARP, lane = thread & 31, row = lane >> 2, t = lane & 3;
    constexpr int UNITS = HEAD_DIM / 16;
    const int unit = warp % UNITS, half = warp / UNITS, tile0 = shared.tile0, tile1 = shared.tile1;
    prepare_query<KV>(shared, l, epoch, tile1 == shared.tiles && tile0 < tile1, note);
    note(ATTENTION, 1);

    // Tokens, then dims, are the rows of the products, heads their columns: 8, in two parts that add up. A lane has the heads
    // 2t and 2t + 1.
    float acc[4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {};
#pragma unroll 1
    for (int base = tile0; base < tile1; base += GEMV_WARPS) {
        const int count = min(GEMV_WARPS, tile1 - base);
        bool written = false;
        if (warp < count)
            written = score_one<KV>(shared, stream, base + warp, lane, warp);
        else if (lane < HEADS_HELD)
            shared.maximum[warp][lane] = -INFINITY, shared.sum[warp][lane] = 0.f;
        meet();
        note(ATTENTION, 2);
        const float2 m0 = *reinterpret_cast<const float2 *>(&shared.maximum[row][2 * t]);
        const float2 m1 = *reinterpret_cast<const float2 *>(&shared.maximum[row + 8][2 * t]);
        const float2 s0 = *reinterpret_cast<const float2 *>(&shared.sum[row][2 * t]);
        const float2 s1 = *reinterpret_cast<const float2 *>(&shared.sum[row + 8][2 * t]);
        float best[2] = {fmaxf(m0.x, m1.x), fmaxf(m0.y, m1.y)}, keep[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int offset = 4; offset < WARP; offset *= 2) best[h] = fmaxf(best[h], __shfl_xor_sync(ALL_LANES, best[h], offset));
            best[h] = fmaxf(best[h], top[h]);
            keep[h] = exp2_fast(top[h] - best[h]);
            top[h] = best[h];
        }
        // Of the tiles `row` and `row` + 8: by how much their maxima are below the common one.
        const float2 f0 = make_float2(exp2_fast(m0.x - best[0]), exp2_fast(m0.y - best[1]));
        const float2 f1 = make_float2(exp2_fast(m1.x - best[0]), exp2_fast(m1.y - best[1]));
        total[0] = total[0] * keep[0] + (f0.x * s0.x + f1.x * s1.x);
        total[1] = total[1] * keep[1] + (f0.y * s0.y + f1.y * s1.y);
        // This half's tiles, and the same of the tile `row` of them.
        const int each = (count + 1) / 2, start = half * each, mine = half ? count - each : each;
        const float2 own = *reinterpret_cast<const float2 *>(&shared.maximum[min(start + row, GEMV_WARPS - 1)][2 * t]);
        const float fx = exp2_fast(own.x - best[0]), fy = exp2_fast(own.y - best[1]);
        acc[0] *= keep[0], acc[1] *= keep[1], acc[2] *= keep[0], acc[3] *= keep[1];
#pragma unroll 2
        for (int j = 0; j < mine; j++) {
            const int other = start + j;
            float part[4] = {};
            weigh_unit<KV>(shared.values[other], unit, lane, shared.round.likely[other][lane], part);
            const float x = __shfl_sync(ALL_LANES, fx, j * 4 + t), y = __shfl_sync(ALL_LANES, fy, j * 4 + t);
            acc[0] += x * part[0], acc[1] += y * part[1], acc[2] += x * part[2], acc[3] += y * part[3];
        }
        if (half && base + GEMV_WARPS >= tile1) shared.round.rest[unit][lane] = make_float4(acc[0], acc[1], acc[2], acc[3]);
        meet();
        if (written) fence_async_proxy();
        if (warp < count) stream.pop(KEY_BYTES<KV>);
    }
    if (thread == 0) announce(p, ATTENTION);
    if (half == 0) {
        const float4 rest = shared.round.rest[unit][lane];
        acc[0] += rest.x, acc[1] += rest.y, acc[2] += rest.z, acc[3] += rest.w;
        const size_t first = (static_cast<size_t>(shared.head) * p.split_stride + shared.split) * HEADS_HELD;
        const int held = shared.per_kv;
        float *to = p.partial + (first + 2 * t) * HEAD_DIM + unit * 16 + (KV == KV_BF16 ? row : 2 * row);
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (2 * t + e % 2 < held) publish(to + e % 2 * HEAD_DIM + e / 2 * (KV == KV_BF16 ? 8 : 1), acc[e], turn);
        if (unit == 0) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
#pragma unroll
                for (int offset = 4; offset < WARP; offset *= 2) total[h] += __shfl_xor_sync(ALL_LANES, total[h], offset);
                // Finite: an infinity has no turn.
                if (row < 2 && 2 * t + h < held)
                    publish(&p.partial_sums[first + 2 * t + h].x + row, row ? total[h] : fmaxf(top[h], -1e38f), turn);
            }
        }
    }
}

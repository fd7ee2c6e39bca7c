// out[t, h] = softmax(q[t, h] K^T / sqrt(d)) V, causal, for runs of many tokens over their paged context: 128 dims a head, on the
// warpgroup tensor cores. A row is one (token, query head of the kv head), packed.
//
// One block stays on each multiprocessor and takes (rows, kv head) by (rows, kv head), 64 rows a warpgroup. Queries lie in
// shared memory, twice, so that the next ones are there in time; tiles of 128 positions of keys and values come through one
// ring. One warpgroup multiplies (the keys of its next tile, be it of the next rows, and the values of its last one) while the
// other does its exponentials: they hand the tensor cores to each other through two named barriers.
#include "wide_tiles.cuh"

// Running maxima a row: a chain of 32 would be slow.
constexpr int CHAINS = 2;

// One of the two warpgroups that multiply.
template <int KV> DEVICE void attend_rows(const PrefillParams &p, WideShared<KV> &shared, const Division &token_of, int group, int warp, int lane) {
    using W = Wide<KV>;
    const int kv_heads = p.pages.kv_heads, per_kv = p.heads / kv_heads, width = p.heads * HD, rank_row = block_rank<W::BLOCKS>() * ROWS;
    Turns<W::BLOCKS> turns{p.block_count * kv_heads};
    const int g = lane >> 2, t = lane & 3, own_row = rank_row + group * 64 + warp % 4 * 16 + g;
    const uint32_t query_word = ((shared_address(shared.query) & 0x3ffff) >> 4) + group * (64 * 128 / 16) + (1u << 16);
    const uint32_t key_word = ((shared_address(shared.ring) & 0x3ffff) >> 4) + (1u << 16);
    const uint32_t value_word = ((shared_address(shared.ring) & 0x3ffff) >> 4) + ((1024 / 16) << 16);

    float s[64], o[64];
    uint32_t probability[8][4];
    float maximum[2], sum[2], keep[2];
    // The block whose scores are next, as far as this lane needs it.
    int reach[2], tiles, whole, end;
    Place<QUERIES> turn;
    Place<W::SLOTS> place;
    const auto open = [&](const PrefillBlock &block) {
        end = block.position + token_of(block.last_row) + 1, tiles = ceil_div(end, TOKENS);
        // Tiles that every row of the warpgroup sees whole need no mask.
        whole = (block.position + token_of(min(block.first_row + rank_row + group * 64, block.last_row)) + 1) / TOKENS;
#pragma unroll
        for (int i = 0; i < 2; i++) reach[i] = block.position + token_of(min(block.first_row + own_row + 8 * i, block.last_row));
        maximum[0] = maximum[1] = -INFINITY, sum[0] = sum[1] = 0.f;
    };
    // Scores of a tile become probabilities; `keep`: what earlier sums are to be multiplied by.
    const auto exponentials = [&](int tile) {
        if (tile >= whole) {
            const int limit0 = reach[0] - tile * TOKENS - 2 * t, limit1 = reach[1] - tile * TOKENS - 2 * t;
#pragma unroll
            for (int i = 0; i < 64; i++)
                if (i / 4 * 8 + i % 2 > (i % 4 / 2 ? limit1 : limit0)) s[i] = -INFINITY;
        }
        float top[2][CHAINS];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            top[i][0] = maximum[i];
#pragma unroll
            for (int j = 1; j < CHAINS; j++) top[i][j] = s[2 * i + 4 * j];
        }
#pragma unroll
        for (int i = 0; i < 64; i++) top[i % 4 / 2][i / 4 % (CHAINS)] = fmaxf(top[i % 4 / 2][i / 4 % (CHAINS)], s[i]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float m = top[i][0];
#pragma unroll
            for (int j = 1; j < CHAINS; j++) m = fmaxf(m, top[i][j]);
            m = fmaxf(m, __shfl_xor_sync(ALL_LANES, m, 1));
            m = fmaxf(m, __shfl_xor_sync(ALL_LANES, m, 2));
            keep[i] = exp2_fast(maximum[i] - m);
            maximum[i] = m;
            sum[i] *= keep[i];
        }
#pragma unroll
        for (int i = 0; i < 64; i++) {
            s[i] = exp2_fast(s[i] - maximum[i % 4 / 2]);
            sum[i % 4 / 2] += s[i];
        }
    };
    const auto pack = [&]() {
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) probability[i][j] = pack_kv<KV>(s[8 * i + 2 * j], s[8 * i + 2 * j + 1]);
    };
    // The keys of the next tile; its place in the ring.
    const auto multiply_next = [&]() {
        const uint32_t key_slot = place.slot;
        barrier_wait(&shared.full[key_slot], place.parity);
        place.advance();
        group_sync(2 + group);
        products_begin();
        multiply_queries<W::CONVERTS>(s, query_word + turn.slot * (2 * ROWS * 128 / 16), key_word + key_slot * (TILE / 16));
        products_end();
        return key_slot;
    };
    // Lane 0 gives a place of the ring back to this block, lane 1 to the other one, which copies into it too.
    const uint32_t given = in_block(shared_address(shared.empty), block_rank<W::BLOCKS>() ^ (lane % W::BLOCKS));
    const auto release = [&](uint32_t which) {
        if (lane < W::BLOCKS) barrier_arrive_in(given + which * 8);
    };

    if (group == 1) group_arrive(2);
    int work = turns.take();
    barrier_wait(&shared.query_full[0], 0);
    PrefillBlock block = shared.block[0];
    open(block);
    {
        const uint32_t key_slot = multiply_next();
        group_arrive(3 - group);
        products_wait<0>();
        hold(s);
        release(key_slot);
        exponentials(0);
        pack();
    }
#pragma unroll
    for (int i = 0; i < 64; i++) o[i] = 0.f;

#pragma unroll 1
    while (true) {
#pragma unroll 1
        for (int tile = 1; tile < tiles; tile++) {
            const uint32_t key_slot = multiply_next(), value_slot = place.slot;
            barrier_wait(&shared.full[value_slot], place.parity);
            multiply_probabilities<W::CONVERTS>(o, probability, value_word + value_slot * (TILE / 16));
            products_end();
            group_arrive(3 - group);
            place.advance();
            products_wait<1>();
            hold(s);
            release(key_slot);
            exponentials(tile);
            // Never so; it keeps the exponentials in front of the wait.
            if (sum[0] + sum[1] < 0.f) asm volatile("nanosleep.u32 0;");
            products_wait<0>();
            hold(o);
            release(value_slot);
            if (__any_sync(ALL_LANES, keep[0] * keep[1] != 1.f)) {
#pragma unroll
                for (int i = 0; i < 64; i++) o[i] *= keep[i % 4 / 2];
            }
            pack();
        }
        // All of this block's keys have been multiplied.
        if (lane == 0) barrier_arrive(&shared.query_empty[turn.slot]);
        turn.advance();
        const int done = work, done_end = end, done_tiles = tiles;
        const float done_sum[2] = {sum[0], sum[1]};
        const PrefillBlock done_block = block;
        work = turns.take();
        const bool more = work >= 0;
        uint32_t key_slot = 0;
        if (more) {
            barrier_wait(&shared.query_full[turn.slot], turn.parity);
            block = shared.block[turn.slot];
            open(block);
            key_slot = place.slot;
            barrier_wait(&shared.full[key_slot], place.parity);
            place.advance();
        }
        const uint32_t value_slot = place.slot;
        barrier_wait(&shared.full[value_slot], place.parity);
        if (done_tiles * TOKENS > done_end) {  // rows past the context hold anything; 0 * NaN must not reach the sum
            const int valid = done_end - (done_tiles - 1) * TOKENS;
            for (int i = threadIdx.x % 128; i < TILE / 16; i += 128)
                if (i / (CHUNK / 16) * TILE_TOKENS + tile_row<2 * HD>(i * 16 % CHUNK) >= valid)
                    reinterpret_cast<uint4 *>(shared.ring[value_slot])[i] = make_uint4(0, 0, 0, 0);
            fence_async_proxy();
            asm volatile("bar.sync %0, 128;" ::"r"(4 + group) : "memory");
        }
        group_sync(2 + group);
        products_begin();
        if (more) {
            multiply_queries<W::CONVERTS>(s, query_word + turn.slot * (2 * ROWS * 128 / 16), key_word + key_slot * (TILE / 16));
            products_end();
            multiply_probabilities<W::CONVERTS>(o, probability, value_word + value_slot * (TILE / 16));
            products_end();
            group_arrive(3 - group);
            products_wait<1>();
            hold(s);
            release(key_slot);
            exponentials(0);
            if (sum[0] + sum[1] < 0.f) asm volatile("nanosleep.u32 0;");
            products_wait<0>();
            hold(o);
            pack();
        } else {
            multiply_probabilities<W::CONVERTS>(o, probability, value_word + value_slot * (TILE / 16));
            products_end();
            if (group == 0) group_arrive(3);
            products_wait<0>();
            hold(o);
        }
        release(value_slot);
        place.advance();
        const int kv_head = done % kv_heads;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float total = done_sum[i];
            total += __shfl_xor_sync(ALL_LANES, total, 1);
            total += __shfl_xor_sync(ALL_LANES, total, 2);
            const int row = done_block.first_row + own_row + 8 * i, in_run = token_of(row);
            const int token = done_block.first_token + in_run, head = kv_head * per_kv + row - in_run * per_kv;
            const float inverse = __frcp_rn(total);
            if (row > done_block.last_row) continue;
            if (p.plane) {
                // Four of this lane's pairs are sixteen bytes of the plane (plane_place).
                uint8_t *at = p.plane + (static_cast<size_t>(head) * 2 * p.plane_blocks + token / PLANE_ROWS) * PLANE_BLOCK + token % PLANE_ROWS * 128;
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    uint32_t words[4];
#pragma unroll
                    for (int j = 0; j < 4; j++)
                        words[j] = pack_bf16(o[4 * (4 * n + j) + 2 * i] * inverse, o[4 * (4 * n + j) + 2 * i + 1] * inverse);
                    *reinterpret_cast<uint4 *>(at + static_cast<size_t>(n / 2) * p.plane_blocks * PLANE_BLOCK +
                                               ((64 * (n % 2) + 16 * t) ^ (token % PLANE_ROWS * 16))) = make_uint4(words[0], words[1], words[2], words[3]);
                }
            }
            if (p.out) {
                float *at = p.out + static_cast<size_t>(token) * width + head * HD + 2 * t;
#pragma unroll
                for (int n = 0; n < HD / 8; n++)
                    *reinterpret_cast<float2 *>(at + 8 * n) = make_float2(o[4 * n + 2 * i] * inverse, o[4 * n + 2 * i + 1] * inverse);
            }
        }
        if (!more) break;
#pragma unroll
        for (int i = 0; i < 64; i++) o[i] = 0.f;
    }
}

template <int KV> DEVICE void attention_prefill_wide(const PrefillParams &p) {
    using W = Wide<KV>;
    extern __shared__ uint8_t raw[];
    WideShared<KV> &shared = *reinterpret_cast<WideShared<KV> *>(raw + (-shared_address(raw) & 1023));
    const int warp = __shfl_sync(ALL_LANES, threadIdx.x / WARP, 0), lane = threadIdx.x & 31, group = warp / 4;
    shared.start();
    wait_for_inputs();
    allow_next_kernel();
    const Division token_of(p.heads / p.pages.kv_heads);
    if (group >= GROUPS) {
        if constexpr (W::CONVERTS)
            asm volatile("setmaxnreg.dec.sync.aligned.u32 48;");
        else
            asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        if (group > GROUPS) {
            if constexpr (W::CONVERTS) convert_tiles<KV>(p, shared, token_of, lane);
        } else if (warp % 4 == 0) {
            copy_tiles<KV>(p, shared, token_of, lane);
        } else if (warp % 4 >= 2) {
            load_queries<KV>(p, shared, token_of, lane);
        }
    } else {
        if constexpr (W::CONVERTS)
            asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
        else
            asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
        attend_rows<KV>(p, shared, token_of, group, warp, lane);
    }
    // Nobody leaves while the other block may still write to it.
    if constexpr (W::BLOCKS > 1) cluster_sync();
}

#define PREFILL_WIDE(NAME, KV)                                                                                         \
    extern "C" __global__ void __cluster_dims__(Wide<KV>::BLOCKS, 1, 1) __launch_bounds__(Wide<KV>::THREADS, 1)        \
        attention_prefill_wide_##NAME(const __grid_constant__ PrefillParams p) { attention_prefill_wide<KV>(p); }
PREFILL_WIDE(bf16, KV_BF16)
PREFILL_WIDE(e4m3, KV_E4M3)
PREFILL_WIDE(e5m2, KV_E5M2)

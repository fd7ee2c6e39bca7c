// The same as prefill.cu for BF16 keys and values and 128 dims a head, on the warpgroup tensor cores.
//
// One block stays on each multiprocessor and takes (block of rows, kv head) by (block of rows, kv head), 64 rows a
// warpgroup. Queries lie in shared memory, twice, so that the next ones are there in time; tiles of 128 positions of keys
// and values come through one ring. One warpgroup multiplies (the keys of its next tile, be it of the next block of rows,
// and the values of its last one) while the other does its exponentials: they hand the tensor cores to each other through
// two named barriers.
#include "../../cuda/plane.cuh"
#include "../../cuda/wgmma.cuh"
#include "prefill.cuh"


constexpr int HD = 128, ROWS = 128, TOKENS = 128, CHUNKS = TOKENS / TILE_TOKENS, GROUPS = 2, SLOTS = 5, QUERIES = 2;
// Running maxima a row: a chain of 32 would be slow.
constexpr int CHAINS = 2;
constexpr int THREADS = (GROUPS + 1) * 128;
// Half a head's dims of 16 tokens: what one bulk copy brings.
constexpr int PIECE = TILE_TOKENS * 128, TILE = 2 * TOKENS * 128;

struct Shared {
    uint8_t query[QUERIES][2][ROWS][128];   // [half of the dims][row]
    uint8_t ring[SLOTS][2][TOKENS][128];    // keys or values: [half][token]
    PrefillBlock block[QUERIES];
    uint64_t full[SLOTS], empty[SLOTS], query_full[QUERIES], query_empty[QUERIES];
};

DEVICE void group_sync(int id) {
    asm volatile("bar.sync %0, 256;" ::"r"(id) : "memory");
}
DEVICE void group_arrive(int id) {
    asm volatile("bar.arrive %0, 256;" ::"r"(id) : "memory");
}

DEVICE uint64_t from_words(uint32_t low, uint32_t high) { return static_cast<uint64_t>(high) << 32 | low; }

// Queries times keys: S[64, 128] = Q[64, 128] K^T, both K-major. Lower words of descriptors (`plane_descriptor`).
DEVICE void multiply_queries(float (&s)[64], uint32_t query, uint32_t key) {
    constexpr uint32_t HIGH = 64u | 1u << 30;
#pragma unroll
    for (int i = 0; i < 8; i++)
        product_shared(s, from_words(query + ((i / 4) * (ROWS * 128) + (i % 4) * 32) / 16, HIGH),
                       from_words(key + ((i / 4) * (TOKENS * 128) + (i % 4) * 32) / 16, HIGH), i > 0);
}

// Probabilities times values: O[64, 128] += P[64, 128] V; V's dims are contiguous, its 64-dim halves TOKENS rows apart.
DEVICE void multiply_probabilities(float (&o)[64], const uint32_t (&p)[8][4], uint32_t value) {
    constexpr uint32_t HIGH = 64u | 1u << 30;
#pragma unroll
    for (int i = 0; i < 8; i++) product_transposed(o, p[i], from_words(value + i * PIECE / 16, HIGH));
}

// Work of the multiprocessors: in turn, every other round backwards, so that all get as much.
struct Turns {
    int count, round;
    __device__ __forceinline__ int take() {
        const int at = round * gridDim.x + (round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
        round++;
        return at < count ? at : -1;
    }
};

// row / per_kv by a multiplication.
struct Division {
    uint32_t inverse;
    __device__ __forceinline__ explicit Division(int by) : inverse(0xffffffffu / by + 1) {}
    __device__ __forceinline__ int operator()(int row) const { return inverse ? __umulhi(row, inverse) : row; }
};

DEVICE PrefillBlock load_block(const PrefillBlock *at) {
    const int4 *from = reinterpret_cast<const int4 *>(at);
    const int4 a = from[0];
    const int b = reinterpret_cast<const int *>(at)[4];
    return {a.x, a.y, a.z, a.w, b, {}};
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_prefill_wide(const __grid_constant__ PrefillParams p) {
    extern __shared__ uint8_t raw[];
    Shared &shared = *reinterpret_cast<Shared *>(raw + (-shared_address(raw) & 1023));
    const int warp = __shfl_sync(ALL_LANES, threadIdx.x / WARP, 0), lane = threadIdx.x & 31, group = warp / 4;
    if (threadIdx.x == 0) {
        for (int i = 0; i < SLOTS; i++) barrier_init(&shared.full[i], 1), barrier_init(&shared.empty[i], GROUPS * 4);
        for (int i = 0; i < QUERIES; i++) barrier_init(&shared.query_full[i], 2), barrier_init(&shared.query_empty[i], GROUPS * 4);
        barrier_init_fence();
    }
    __syncthreads();
    wait_for_inputs();
    allow_next_kernel();
    const int kv_heads = p.pages.kv_heads, per_kv = p.heads / kv_heads, width = p.heads * HD;
    const Division token_of(per_kv);
    Turns turns{p.block_count * kv_heads, 0};

    if (group == GROUPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        if (warp % 4 == 0) {
            // Keys and values: of each tile the keys a tile ahead of the values. Lanes 0 to 15 copy half a chunk each.
            const int c = lane % 16 / 2, half = lane % 2;
            int work = turns.take(), tile = 0, tiles, end, kv_head;
            const uint32_t *table;
            PrefillBlock block = load_block(p.blocks + work / kv_heads), ahead;
            int next = turns.take();
            if (next >= 0) ahead = load_block(p.blocks + next / kv_heads);
            const auto open = [&]() {
                end = block.position + token_of(block.last_row) + 1, tiles = ceil_div(end, TOKENS), kv_head = work % kv_heads;
                table = p.pages.tables + static_cast<size_t>(block.run) * p.pages.table_stride;
            };
            const auto page_of = [&](int at) { return at < end ? table[at / p.pages.page_tokens] : 0; };
            open();
            uint32_t slot = 0, parity = 1, page = page_of(c * TILE_TOKENS);
            const auto copy = [&](const uint8_t *from, size_t offset, int chunks) {
                barrier_wait(&shared.empty[slot], parity);
                if (lane == 0) barrier_expect(&shared.full[slot], chunks * 2 * PIECE);
                __syncwarp();
                if (lane < 16 && c < chunks) bulk_copy(shared.ring[slot][half][c * TILE_TOKENS], from + offset, PIECE, &shared.full[slot]);
                if (++slot == SLOTS) slot = 0, parity ^= 1;
            };
            size_t values = 0;
            int value_chunks = 0;
            while (work >= 0) {
                const size_t offset = tile_offset<256>(p.pages, page, kv_head, tile * TOKENS + c * TILE_TOKENS) + half * PIECE;
                const int chunks = min(CHUNKS, ceil_div(end - tile * TOKENS, TILE_TOKENS));
                if (++tile == tiles) {
                    work = next, block = ahead, tile = 0;
                    if (work >= 0) open();
                    next = turns.take();
                    if (next >= 0) ahead = load_block(p.blocks + next / kv_heads);
                }
                // Asked for a tile ahead.
                page = page_of(tile * TOKENS + c * TILE_TOKENS);
                copy(p.pages.k, offset, chunks);
                if (value_chunks) copy(p.pages.v, values, value_chunks);
                values = offset, value_chunks = chunks;
            }
            copy(p.pages.v, values, value_chunks);
        } else if (warp % 4 >= 2) {
            // Queries: sixteen bytes of a row at a time, by 64 threads.
            const int thread = threadIdx.x % 64, unit = thread % 16;
            uint32_t parity = 1;
            for (int work, turn = 0; (work = turns.take()) >= 0;) {
                const PrefillBlock block = load_block(p.blocks + work / kv_heads);
                const int kv_head = work % kv_heads;
                barrier_wait(&shared.query_empty[turn], parity);
#pragma unroll 1
                for (int first = thread / 16; first < ROWS; first += 16) {
                    uint4 v[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int row = min(block.first_row + first + 4 * i, block.last_row), token = token_of(row);
                        const size_t at = static_cast<size_t>(block.first_token + token) * width + (kv_head * per_kv + row - token * per_kv) * HD + unit * 8;
                        if (p.q16) {
                            v[i] = *reinterpret_cast<const uint4 *>(p.q16 + at);
                        } else {
                            const float4 a = *reinterpret_cast<const float4 *>(p.q + at), b = *reinterpret_cast<const float4 *>(p.q + at + 4);
                            v[i] = make_uint4(pack_bf16(a.x * p.scale, a.y * p.scale), pack_bf16(a.z * p.scale, a.w * p.scale),
                                              pack_bf16(b.x * p.scale, b.y * p.scale), pack_bf16(b.z * p.scale, b.w * p.scale));
                        }
                    }
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int r = first + 4 * i;
                        *reinterpret_cast<uint4 *>(&shared.query[turn][unit / 8][r][(unit % 8 * 16) ^ ((r & 7) * 16)]) = v[i];
                    }
                }
                if (thread == 0) shared.block[turn] = block;
                fence_async_proxy();
                __syncwarp();
                if (lane == 0) barrier_arrive(&shared.query_full[turn]);
                if (++turn == QUERIES) turn = 0, parity ^= 1;
            }
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    const int g = lane >> 2, t = lane & 3, own_row = group * 64 + warp % 4 * 16 + g;
    const uint32_t query_word = ((shared_address(shared.query) & 0x3ffff) >> 4) + group * (64 * 128 / 16) + (1u << 16);
    const uint32_t key_word = ((shared_address(shared.ring) & 0x3ffff) >> 4) + (1u << 16);
    const uint32_t value_word = ((shared_address(shared.ring) & 0x3ffff) >> 4) + ((TOKENS * 128 / 16) << 16);

    float s[64], o[64];
    uint32_t probability[8][4];
    float maximum[2], sum[2], keep[2];
    // The block whose scores are next, as far as this lane needs it.
    int reach[2], tiles, whole, end;
    uint32_t turn = 0, turn_parity = 0, slot = 0, parity = 0;
    const auto advance = [&]() {
        if (++slot == SLOTS) slot = 0, parity ^= 1;
    };
    const auto open = [&](const PrefillBlock &block) {
        end = block.position + token_of(block.last_row) + 1, tiles = ceil_div(end, TOKENS);
        // Tiles that every row of the warpgroup sees whole need no mask.
        whole = (block.position + token_of(min(block.first_row + group * 64, block.last_row)) + 1) / TOKENS;
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
            for (int j = 0; j < 4; j++) probability[i][j] = pack_bf16(s[8 * i + 2 * j], s[8 * i + 2 * j + 1]);
    };
    // The keys of the next tile; its place in the ring.
    const auto multiply_next = [&]() {
        const uint32_t key_slot = slot;
        barrier_wait(&shared.full[slot], parity);
        advance();
        group_sync(2 + group);
        products_begin();
        multiply_queries(s, query_word + turn * (2 * ROWS * 128 / 16), key_word + key_slot * (TILE / 16));
        products_end();
        return key_slot;
    };
    const auto release = [&](uint32_t which) {
        if (lane == 0) barrier_arrive(&shared.empty[which]);
    };
    const auto next_turn = [&]() {
        if (++turn == QUERIES) turn = 0, turn_parity ^= 1;
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
            const uint32_t key_slot = multiply_next(), value_slot = slot;
            barrier_wait(&shared.full[slot], parity);
            multiply_probabilities(o, probability, value_word + slot * (TILE / 16));
            products_end();
            group_arrive(3 - group);
            advance();
            products_wait<1>();
            hold(s);
            release(key_slot);
            exponentials(tile);
            // Never so; it keeps the exponentials in front of the wait.
            if (sum[0] + sum[1] < 0.f) asm volatile("nanosleep.u32 0;");
            products_wait<0>();
            hold(o);
            release(value_slot);
            if (__any_sync(ALL_LANES, keep[0] * keep[1] != 1.f))
            {
#pragma unroll
                for (int i = 0; i < 64; i++) o[i] *= keep[i % 4 / 2];
            }
            pack();
        }
        // All of this block's keys have been multiplied.
        if (lane == 0) barrier_arrive(&shared.query_empty[turn]);
        next_turn();
        const int done = work, done_end = end, done_tiles = tiles;
        const float done_sum[2] = {sum[0], sum[1]};
        const PrefillBlock done_block = block;
        work = turns.take();
        const bool more = work >= 0;
        uint32_t key_slot = 0;
        if (more) {
            barrier_wait(&shared.query_full[turn], turn_parity);
            block = shared.block[turn];
            open(block);
            key_slot = slot;
            barrier_wait(&shared.full[slot], parity);
            advance();
        }
        barrier_wait(&shared.full[slot], parity);
        if (done_tiles * TOKENS > done_end) {  // rows past the context hold anything; 0 * NaN must not reach the sum
            const int valid = done_end - (done_tiles - 1) * TOKENS;
            for (int i = valid * 8 + threadIdx.x % 128; i < TOKENS * 8; i += 128)
#pragma unroll
                for (int half = 0; half < 2; half++) reinterpret_cast<uint4 *>(shared.ring[slot][half])[i] = make_uint4(0, 0, 0, 0);
            fence_async_proxy();
            asm volatile("bar.sync %0, 128;" ::"r"(4 + group) : "memory");
        }
        const uint32_t value_slot = slot;
        group_sync(2 + group);
        products_begin();
        if (more) {
            multiply_queries(s, query_word + turn * (2 * ROWS * 128 / 16), key_word + key_slot * (TILE / 16));
            products_end();
            multiply_probabilities(o, probability, value_word + value_slot * (TILE / 16));
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
            multiply_probabilities(o, probability, value_word + value_slot * (TILE / 16));
            products_end();
            if (group == 0) group_arrive(3);
            products_wait<0>();
            hold(o);
        }
        release(value_slot);
        advance();
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

// The same as prefill.cu for BF16 keys and values and 128 dims a head, on the warpgroup tensor cores.
//
// A block is 128 rows (token, query head), 64 a warpgroup; queries lie in shared memory, tiles of 128 positions of keys
// and values come through a ring of three. One warpgroup multiplies (the values of its last tile, then the keys of its
// next) while the other does its exponentials: they hand the tensor cores to each other through two named barriers.
#include "../../cuda/plane.cuh"
#include "../../cuda/wgmma.cuh"
#include "prefill.cuh"

constexpr int HD = 128, ROWS = 128, TOKENS = 128, CHUNKS = TOKENS / TILE_TOKENS, DEPTH = 3, GROUPS = 2;
constexpr int THREADS = (GROUPS + 1) * 128;
// Half a head's dims of 16 tokens: what one bulk copy brings.
constexpr int PIECE = TILE_TOKENS * 128;

struct Shared {
    uint8_t query[2][ROWS][128];        // [half of the dims][row]
    uint8_t key[DEPTH][2][TOKENS][128];  // [half][token]
    uint8_t value[DEPTH][2][TOKENS][128];
    uint64_t key_full[DEPTH], value_full[DEPTH], key_empty[DEPTH], value_empty[DEPTH];
};

DEVICE void group_sync(int id) { asm volatile("bar.sync %0, 256;" ::"r"(id) : "memory"); }
DEVICE void group_arrive(int id) { asm volatile("bar.arrive %0, 256;" ::"r"(id) : "memory"); }

// Queries times keys: S[64, 128] = Q[64, 128] K^T, both K-major.
DEVICE void multiply_queries(float (&s)[64], uint32_t query, uint32_t key) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint64_t a = plane_descriptor(query + (i / 4) * (ROWS * 128) + (i % 4) * 32);
        const uint64_t b = plane_descriptor(key + (i / 4) * (TOKENS * 128) + (i % 4) * 32);
        product_shared(s, a, b, i > 0);
    }
}

// Probabilities times values: O[64, 128] += P[64, 128] V; V's dims are contiguous, its 64-dim halves TOKENS rows apart.
DEVICE void multiply_probabilities(float (&o)[64], const uint32_t (&p)[8][4], uint32_t value) {
#pragma unroll
    for (int i = 0; i < 8; i++) product_transposed(o, p[i], row_descriptor(value + i * PIECE, TOKENS * 128));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_prefill_wide(const __grid_constant__ PrefillParams p) {
    extern __shared__ uint8_t raw[];
    Shared &shared = *reinterpret_cast<Shared *>(raw + (-shared_address(raw) & 1023));
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, group = warp / 4;
    if (threadIdx.x == 0) {
        for (int i = 0; i < DEPTH; i++) {
            barrier_init(&shared.key_full[i], 1), barrier_init(&shared.value_full[i], 1);
            barrier_init(&shared.key_empty[i], GROUPS * 4), barrier_init(&shared.value_empty[i], GROUPS * 4);
        }
        barrier_init_fence();
    }
    __syncthreads();
    wait_for_inputs();
    allow_next_kernel();
    const PrefillBlock block = p.blocks[blockIdx.x];
    const int kv_head = blockIdx.y, per_kv = p.heads / p.pages.kv_heads;
    const int first_token = p.run_first[block.run], position = p.run_position[block.run];
    const int rows = p.run_length[block.run] * per_kv, last_row = min(block.first_row + ROWS, rows) - 1;
    const int end = position + last_row / per_kv + 1, tiles = ceil_div(end, TOKENS);

    if (group == GROUPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        // A warp for the keys, one for the values: neither waits for the other's ring.
        if (warp % 4 > 1) return;
        const bool is_key = warp % 4 == 0;
        const uint32_t *table = p.pages.tables + static_cast<size_t>(block.run) * p.pages.table_stride;
        uint64_t *const full = is_key ? shared.key_full : shared.value_full, *const empty = is_key ? shared.key_empty : shared.value_empty;
        const uint8_t *const from = is_key ? p.pages.k : p.pages.v;
        const int c = lane % 16 / 2, half = lane % 2;
        // The page of this lane's 16 tokens, asked for a tile ahead.
        const auto page_of = [&](int tile) {
            const int at = tile * TOKENS + c * TILE_TOKENS;
            return at < end ? table[at / p.pages.page_tokens] : 0;
        };
        uint32_t slot = 0, parity = 1, page = page_of(0);
        for (int tile = 0; tile < tiles; tile++) {
            const int chunks = min(CHUNKS, ceil_div(end - tile * TOKENS, TILE_TOKENS));
            const size_t offset = tile_offset<256>(p.pages, page, kv_head, tile * TOKENS + c * TILE_TOKENS) + half * PIECE;
            page = page_of(tile + 1);
            barrier_wait(&empty[slot], parity);
            if (lane == 0) barrier_expect(&full[slot], chunks * 2 * PIECE);
            __syncwarp();
            uint8_t *const to = is_key ? shared.key[slot][half][c * TILE_TOKENS] : shared.value[slot][half][c * TILE_TOKENS];
            if (lane < 16 && c < chunks) bulk_copy(to, from + offset, PIECE, &full[slot]);
            if (++slot == DEPTH) slot = 0, parity ^= 1;
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int width = p.heads * HD, g = lane >> 2, t = lane & 3;
    // This warpgroup's queries: 64 rows, scaled, in pairs.
    for (int i = threadIdx.x % 128; i < 64 * HD / 2; i += 128) {
        const int r = group * 64 + i / (HD / 2), d = i % (HD / 2) * 2;
        const int row = min(block.first_row + r, last_row);
        const float2 v = *reinterpret_cast<const float2 *>(
            p.q + static_cast<size_t>(first_token + row / per_kv) * width + (kv_head * per_kv + row % per_kv) * HD + d);
        *reinterpret_cast<uint32_t *>(&shared.query[d / 64][r][((d % 64) * 2) ^ ((r & 7) * 16)]) = pack_bf16(v.x * p.scale, v.y * p.scale);
    }
    fence_async_proxy();
    asm volatile("bar.sync %0, 128;" ::"r"(4 + group) : "memory");
    const uint32_t query = shared_address(shared.query[0][group * 64]);

    int reach[2];
#pragma unroll
    for (int i = 0; i < 2; i++) reach[i] = position + min(block.first_row + group * 64 + warp % 4 * 16 + g + 8 * i, last_row) / per_kv;
    float s[64], o[64];
    uint32_t probability[8][4];
    float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < 64; i++) o[i] = 0.f;

    uint32_t slot = 0, parity = 0, next_slot = 0, next_parity = 0;
    const auto advance = [](uint32_t &a, uint32_t &b) {
        if (++a == DEPTH) a = 0, b ^= 1;
    };
    if (group == 1) group_arrive(2);
    // The first keys.
    barrier_wait(&shared.key_full[0], 0);
    group_sync(2 + group);
    products_begin();
    multiply_queries(s, query, shared_address(shared.key[0]));
    products_end();
    group_arrive(3 - group);
    products_wait<0>();
    hold(s);
    if (lane == 0) barrier_arrive(&shared.key_empty[0]);
    advance(next_slot, next_parity);

    // Scores of the tile from position `first` on become probabilities; `keep`: what earlier sums are to be multiplied by.
    float keep[2];
    const auto exponentials = [&](int first, bool masked) {
        if (masked) {
#pragma unroll
            for (int i = 0; i < 64; i++)
                if (first + i / 4 * 8 + 2 * t + i % 2 > reach[i % 4 / 2]) s[i] = -INFINITY;
        }
        float top[2] = {maximum[0], maximum[1]};
#pragma unroll
        for (int i = 0; i < 64; i++) top[i % 4 / 2] = fmaxf(top[i % 4 / 2], s[i]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            top[i] = fmaxf(top[i], __shfl_xor_sync(ALL_LANES, top[i], 1));
            top[i] = fmaxf(top[i], __shfl_xor_sync(ALL_LANES, top[i], 2));
            keep[i] = exp2_fast(maximum[i] - top[i]);
            maximum[i] = top[i];
            sum[i] *= keep[i];
        }
#pragma unroll
        for (int i = 0; i < 64; i++) {
            s[i] = exp2_fast(s[i] - top[i % 4 / 2]);
            sum[i % 4 / 2] += s[i];
        }
    };
    const auto pack = [&]() {
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) probability[i][j] = pack_bf16(s[8 * i + 2 * j], s[8 * i + 2 * j + 1]);
    };
    // The keys of tile + 1, then the values of `tile`; the exponentials of tile + 1 run beside the latter.
    const auto step = [&](int tile, bool masked) {
        barrier_wait(&shared.value_full[slot], parity);
        barrier_wait(&shared.key_full[next_slot], next_parity);
        group_sync(2 + group);
        products_begin();
        multiply_queries(s, query, shared_address(shared.key[next_slot]));
        products_end();
        multiply_probabilities(o, probability, shared_address(shared.value[slot]));
        products_end();
        group_arrive(3 - group);
        products_wait<1>();
        hold(s);
        if (lane == 0) barrier_arrive(&shared.key_empty[next_slot]);
        exponentials((tile + 1) * TOKENS, masked);
        // Never so; it keeps the exponentials in front of the wait.
        if (sum[0] + sum[1] < 0.f) asm volatile("nanosleep.u32 0;");
        products_wait<0>();
        hold(o);
        if (lane == 0) barrier_arrive(&shared.value_empty[slot]);
#pragma unroll
        for (int i = 0; i < 64; i++) o[i] *= keep[i % 4 / 2];
        pack();
        advance(slot, parity), advance(next_slot, next_parity);
    };
    // Tiles that every row of the block sees whole need no mask.
    const int whole = min((position + block.first_row / per_kv + 1) / TOKENS, tiles);
    exponentials(0, true);
    pack();
    int tile = 0;
#pragma unroll 1
    for (; tile + 1 < whole; tile++) step(tile, false);
#pragma unroll 1
    for (; tile + 1 < tiles; tile++) step(tile, true);

    // The last values.
    const int first = tile * TOKENS;
    barrier_wait(&shared.value_full[slot], parity);
    if (first + TOKENS > end) {  // rows past the context hold anything; 0 * NaN must not reach the sum
        uint32_t *values = reinterpret_cast<uint32_t *>(shared.value[slot]);
        for (int i = threadIdx.x; i < 2 * TOKENS * 32; i += 256)
            if (first + i / 32 % TOKENS >= end) values[i] = 0;
        fence_async_proxy();
        group_sync(1);
    }
    group_sync(2 + group);
    products_begin();
    multiply_probabilities(o, probability, shared_address(shared.value[slot]));
    products_end();
    if (group == 0) group_arrive(3);
    products_wait<0>();
    hold(o);
    if (lane == 0) barrier_arrive(&shared.value_empty[slot]);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 1);
        sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 2);
        const int row = block.first_row + group * 64 + warp % 4 * 16 + g + 8 * i;
        if (row > last_row) continue;
        const int token = first_token + row / per_kv, head = kv_head * per_kv + row % per_kv;
        const float inverse = 1.f / sum[i];
#pragma unroll
        for (int n = 0; n < HD / 8; n++) {
            const int k = head * HD + 8 * n + 2 * t;
            const float v0 = o[4 * n + 2 * i] * inverse, v1 = o[4 * n + 2 * i + 1] * inverse;
            if (p.out) *reinterpret_cast<float2 *>(p.out + static_cast<size_t>(token) * width + k) = make_float2(v0, v1);
            if (p.plane) *reinterpret_cast<uint32_t *>(p.plane + plane_offset(token, k, p.plane_blocks)) = pack_bf16(v0, v1);
        }
    }
}

// What the kernel of prompts on warpgroup products is made of (prefill_wide.cu): sizes, shared memory, products, the order of work.
//
// A block has 128 rows (64 a warpgroup) and takes tiles of 128 positions, keys and values in turn, out of one ring. Tiles lie in
// shared memory as pages do: 16 tokens of a head after the other. BF16: two blocks, a cluster, have 256 rows; each brings half of
// every tile for both. FP8: one block; tiles are staged as they are and become F16, and so are queries and probabilities.
#pragma once
#include "../../cuda/cluster.cuh"
#include "../../cuda/plane.cuh"
#include "prefill.cuh"
#include "wide_products.cuh"

constexpr int HD = 128, ROWS = 128, TOKENS = 128, CHUNKS = TOKENS / TILE_TOKENS, GROUPS = 2, QUERIES = 2;
// One chunk: 16 tokens of a head, two bytes a value; one tile.
constexpr int CHUNK = TILE_TOKENS * HD * 2, TILE = CHUNKS * CHUNK;

template <int KV> struct Wide {
    static constexpr bool CONVERTS = KV != KV_BF16;
    static constexpr int BLOCKS = CONVERTS ? 1 : 2, SLOTS = CONVERTS ? 4 : 5, STAGES = CONVERTS ? 2 : 0;
    // Two warpgroups multiply, one copies, one converts. Registers of a thread: 64 K in all.
    static constexpr int THREADS = (GROUPS + (CONVERTS ? 2 : 1)) * 128;
    static constexpr int CHUNK_BYTES = TILE_TOKENS * HD * KV_BYTES<KV>;
};

// Tiles that are FP8 yet.
template <int STAGES, int BYTES> struct Staged {
    uint8_t tile[STAGES][BYTES];
    uint64_t full[STAGES], empty[STAGES];
};
template <int BYTES> struct Staged<0, BYTES> {};

template <int KV> struct WideShared {
    using W = Wide<KV>;
    uint8_t query[QUERIES][2][ROWS][128];  // [half of the dims][row]
    uint8_t ring[W::SLOTS][CHUNKS][CHUNK];  // keys or values
    Staged<W::STAGES, CHUNKS * W::CHUNK_BYTES> staged;
    PrefillBlock block[QUERIES];
    uint64_t full[W::SLOTS], empty[W::SLOTS], query_full[QUERIES], query_empty[QUERIES];

    __device__ __forceinline__ void start() {
        if (threadIdx.x == 0) {
            // A tile is there when its copy is, or when the four converting warps have written it.
            for (int i = 0; i < W::SLOTS; i++) barrier_init(&full[i], W::CONVERTS ? 4 : 1), barrier_init(&empty[i], W::BLOCKS * GROUPS * 4);
            for (int i = 0; i < QUERIES; i++) barrier_init(&query_full[i], 2), barrier_init(&query_empty[i], GROUPS * 4);
            if constexpr (W::CONVERTS)
                for (int i = 0; i < W::STAGES; i++) barrier_init(&staged.full[i], 1), barrier_init(&staged.empty[i], 4);
            barrier_init_fence();
        }
        __syncthreads();
        if constexpr (W::BLOCKS > 1) cluster_sync();
    }
};

template <int BLOCKS> DEVICE uint32_t block_rank() {
    if constexpr (BLOCKS == 1) return 0;
    return cluster_rank();
}

// A place of a ring, and in which round.
template <int DEPTH> struct Place {
    uint32_t slot = 0, parity = 0;
    __device__ __forceinline__ void advance() {
        if (++slot == DEPTH) slot = 0, parity ^= 1;
    }
};

DEVICE void group_sync(int id) { asm volatile("bar.sync %0, 256;" ::"r"(id) : "memory"); }
DEVICE void group_arrive(int id) { asm volatile("bar.arrive %0, 256;" ::"r"(id) : "memory"); }

DEVICE uint64_t from_words(uint32_t low, uint32_t high) { return static_cast<uint64_t>(high) << 32 | low; }

// Upper words of descriptors: 128-byte swizzle, and the bytes from eight rows to the next eight.
constexpr uint32_t QUERY_HIGH = 1024 / 16 | 1u << 30, TILE_HIGH = 2 * 1024 / 16 | 1u << 30;

// Queries times keys: S[64, 128] = Q[64, 128] K^T, both K-major. Lower words of descriptors (`plane_descriptor`).
template <bool F16> DEVICE void multiply_queries(float (&s)[64], uint32_t query, uint32_t key) {
#pragma unroll
    for (int i = 0; i < 8; i++)
        WideProducts<F16>::from_shared(s, from_words(query + ((i / 4) * (ROWS * 128) + (i % 4) * 32) / 16, QUERY_HIGH),
                       from_words(key + ((i / 4) * 1024 + (i % 4) * 32) / 16, TILE_HIGH), i > 0);
}

// Probabilities times values: O[64, 128] += P[64, 128] V; V's dims are contiguous, its 64-dim halves eight rows apart.
template <bool F16> DEVICE void multiply_probabilities(float (&o)[64], const uint32_t (&p)[8][4], uint32_t value) {
#pragma unroll
    for (int i = 0; i < 8; i++) WideProducts<F16>::from_registers(o, p[i], from_words(value + i * CHUNK / 16, TILE_HIGH));
}

// Work of the multiprocessors (clusters): in turn, every other round backwards, so that all get as much.
template <int BLOCKS> struct Turns {
    int count, round = 0;
    __device__ __forceinline__ int take() {
        const int width = gridDim.x / BLOCKS, mine = blockIdx.x / BLOCKS, at = round * width + (round & 1 ? width - 1 - mine : mine);
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

// The list of work, one ahead.
template <int BLOCKS> struct Works {
    const PrefillBlock *blocks;
    int kv_heads;
    Turns<BLOCKS> turns;
    int work, next;
    PrefillBlock block, ahead;

    __device__ __forceinline__ Works(const PrefillParams &p)
        : blocks(p.blocks), kv_heads(p.pages.kv_heads), turns{p.block_count * p.pages.kv_heads}, work(turns.take()), block{}, ahead{} {
        if (work >= 0) block = load_block(blocks + work / kv_heads);
        look();
    }
    __device__ __forceinline__ void look() {
        next = turns.take();
        if (next >= 0) ahead = load_block(blocks + next / kv_heads);
    }
    __device__ __forceinline__ void advance() {
        work = next, block = ahead;
        look();
    }
};

// How a warp of the decode kernel gets its tiles of keys and values: the work that its block has listed, page lookups, bulk copies.
#pragma once
#include "decode.cuh"

// Warps of a block, bytes of each one's ring, and whether the kernel makes its queries itself: decode_inline.cu and decode_fp8.cu have their own. With 192 KB of
// rings on each multiprocessor all keys and values of 384 positions are on their way before the queries are there.
#ifndef DECODE_RING
#define DECODE_HELD_WARPS 8
#define DECODE_RING 24576
#define DECODE_MAKES_QUERIES false
#endif
constexpr int DECODE_WARPS = DECODE_HELD_WARPS, DECODE_THREADS = DECODE_WARPS * WARP, RING_BYTES = DECODE_RING;
constexpr bool MAKES_QUERIES = DECODE_MAKES_QUERIES;

template <int KV, int HD> constexpr int TILE_BYTES = TILE_TOKENS *HD *KV_BYTES<KV>;
template <int KV, int HD> constexpr int DECODE_DEPTH = RING_BYTES / (2 * TILE_BYTES<KV, HD>);

// One split for one head block.
struct Work {
    int token, position, run, begin;
    int end, splits, index, first_index;  // index: of the item, and of the token's first
    int block, kv_head, head0, held;      // head block; its first query head and their number
};

// The tiles of the listed work that this warp takes, in order: of each piece begin / 16 + warp, then every DECODE_WARPS-th. Each
// lane looks up the place of one of the next 32 tiles of a piece, and asks for the page of one of the 32 behind those.
template <int KV, int HD> struct DecodeTiles {
    const AttentionParams *p;
    const Work *work;
    int count, warp, lane;
    int at, tile, left;       // piece, next tile, tiles whose places are known
    int later_at, later_tile;  // the tiles after those
    uint32_t place, later_page;

    // The first tile at or behind `tile` of piece `at`, or of the pieces after it.
    __device__ __forceinline__ void find(int &at, int &tile) const {
        while (at < count && tile * TILE_TOKENS >= work[at].end)
            if (++at < count) tile = work[at].begin / TILE_TOKENS + warp;
    }

    __device__ __forceinline__ void ask() {
        find(later_at, later_tile);
        const int position = (later_tile + DECODE_WARPS * lane) * TILE_TOKENS;
        later_page = 0;
        if (later_at < count && position < work[later_at].end)
            later_page = __ldcg(p->pages.tables + static_cast<size_t>(work[later_at].run) * p->pages.table_stride + position / p->pages.page_tokens);
    }

    // The tiles that were asked for are next.
    __device__ __forceinline__ void take() {
        at = later_at, tile = later_tile;
        if (at == count) return;
        const int page_tokens = p->pages.page_tokens, position = (tile + DECODE_WARPS * lane) * TILE_TOKENS;
        place = (later_page * p->pages.kv_heads + work[at].kv_head) * (page_tokens / TILE_TOKENS) + position % page_tokens / TILE_TOKENS;
        left = min(WARP, ceil_div(ceil_div(work[at].end, TILE_TOKENS) - tile, DECODE_WARPS));
        later_tile += WARP * DECODE_WARPS;
        ask();
    }

    __device__ __forceinline__ void start(int listed) {
        count = listed;
        later_at = 0, later_tile = listed > 0 ? work[0].begin / TILE_TOKENS + warp : 0;
        ask();
        take();
    }

    // Whether the next tile was there before this step.
    __device__ __forceinline__ bool settled() const {
        return at < count && (tile + 1) * TILE_TOKENS <= work[at].position - work[at].token;
    }

    // Requests the next tile into a slot.
    __device__ __forceinline__ void request(uint8_t (&slot)[2][TILE_BYTES<KV, HD>], uint64_t *full) {
        if (at == count) return;
        // The first lane's is next.
        if (lane == 0) {
            const size_t from = static_cast<size_t>(place) * TILE_BYTES<KV, HD>;
            barrier_expect(full, 2 * TILE_BYTES<KV, HD>);
            bulk_copy(slot[0], p->pages.k + from, TILE_BYTES<KV, HD>, full);
            bulk_copy(slot[1], p->pages.v + from, TILE_BYTES<KV, HD>, full);
        }
        place = __shfl_down_sync(ALL_LANES, place, 1);
        tile += DECODE_WARPS;
        if (--left == 0) take();
    }
};

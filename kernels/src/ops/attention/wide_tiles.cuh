// The warps that bring keys, values and queries to `attention_prefill_wide_*`.
#pragma once
#include "wide_parts.cuh"

// One warp: keys and values, of each tile the keys a tile ahead of the values. A lane copies one chunk; of two blocks each has
// half the chunks, for both.
template <int KV> DEVICE void copy_tiles(const PrefillParams &p, WideShared<KV> &shared, const Division &token_of, int lane) {
    using W = Wide<KV>;
    constexpr int COPIES = CHUNKS / W::BLOCKS;
    const int c = lane % COPIES + block_rank<W::BLOCKS>() * COPIES;
    Works<W::BLOCKS> works(p);
    int tile = 0, tiles, end, kv_head;
    const uint32_t *table;
    const auto open = [&]() {
        end = works.block.position + token_of(works.block.last_row) + 1, tiles = ceil_div(end, TOKENS), kv_head = works.work % works.kv_heads;
        table = p.pages.tables + static_cast<size_t>(works.block.run) * p.pages.table_stride;
    };
    const auto page_of = [&](int at) { return at < end ? table[at / p.pages.page_tokens] : 0; };
    open();
    Place<W::CONVERTS ? W::STAGES : W::SLOTS> place;
    uint32_t page = page_of(c * TILE_TOKENS);
    const auto copy = [&](const uint8_t *from, size_t offset, int chunks) {
        uint64_t *full, *empty;
        uint8_t *to;
        if constexpr (W::CONVERTS)
            full = &shared.staged.full[place.slot], empty = &shared.staged.empty[place.slot], to = shared.staged.tile[place.slot];
        else
            full = &shared.full[place.slot], empty = &shared.empty[place.slot], to = shared.ring[place.slot][0];
        barrier_wait(empty, place.parity ^ 1);
        if (lane == 0) barrier_expect(full, chunks * W::CHUNK_BYTES);
        __syncwarp();
        if (lane < COPIES && c < chunks) {
            if constexpr (W::BLOCKS == 1)
                bulk_copy(to + c * W::CHUNK_BYTES, from + offset, W::CHUNK_BYTES, full);
            else
                bulk_copy_to(3, to + c * W::CHUNK_BYTES, from + offset, W::CHUNK_BYTES, full);
        }
        place.advance();
    };
    size_t values = 0;
    int value_chunks = 0;
#pragma unroll 1
    while (works.work >= 0) {
        const size_t offset = tile_offset<HD * KV_BYTES<KV>>(p.pages, page, kv_head, tile * TOKENS + c * TILE_TOKENS);
        const int chunks = min(CHUNKS, ceil_div(end - tile * TOKENS, TILE_TOKENS));
        if (++tile == tiles) {
            tile = 0;
            works.advance();
            if (works.work >= 0) open();
        }
        // Asked for a tile ahead.
        page = page_of(tile * TOKENS + c * TILE_TOKENS);
        copy(p.pages.k, offset, chunks);
        if (value_chunks) copy(p.pages.v, values, value_chunks);
        values = offset, value_chunks = chunks;
    }
    copy(p.pages.v, values, value_chunks);
}

// Two warps: queries, sixteen bytes of a row at a time.
template <int KV> DEVICE void load_queries(const PrefillParams &p, WideShared<KV> &shared, const Division &token_of, int lane) {
    constexpr int BLOCKS = Wide<KV>::BLOCKS;
    const int thread = threadIdx.x % 64, unit = thread % 16, kv_heads = p.pages.kv_heads, per_kv = p.heads / kv_heads, width = p.heads * HD;
    Turns<BLOCKS> turns{p.block_count * kv_heads};
    Place<QUERIES> turn;
    for (int work; (work = turns.take()) >= 0;) {
        const PrefillBlock block = load_block(p.blocks + work / kv_heads);
        const int kv_head = work % kv_heads, first_row = block.first_row + block_rank<BLOCKS>() * ROWS;
        barrier_wait(&shared.query_empty[turn.slot], turn.parity ^ 1);
#pragma unroll 1
        for (int first = thread / 16; first < ROWS; first += 16) {
            uint4 v[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = min(first_row + first + 4 * i, block.last_row), token = token_of(row);
                const size_t at = static_cast<size_t>(block.first_token + token) * width + (kv_head * per_kv + row - token * per_kv) * HD + unit * 8;
                if (p.q16) {
                    v[i] = *reinterpret_cast<const uint4 *>(p.q16 + at);
                } else {
                    const float4 a = *reinterpret_cast<const float4 *>(p.q + at), b = *reinterpret_cast<const float4 *>(p.q + at + 4);
                    v[i] = make_uint4(pack_kv<KV>(a.x * p.scale, a.y * p.scale), pack_kv<KV>(a.z * p.scale, a.w * p.scale),
                                      pack_kv<KV>(b.x * p.scale, b.y * p.scale), pack_kv<KV>(b.z * p.scale, b.w * p.scale));
                }
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int r = first + 4 * i;
                *reinterpret_cast<uint4 *>(&shared.query[turn.slot][unit / 8][r][(unit % 8 * 16) ^ ((r & 7) * 16)]) = v[i];
            }
        }
        if (thread == 0) shared.block[turn.slot] = block;
        fence_async_proxy();
        __syncwarp();
        if (lane == 0) barrier_arrive(&shared.query_full[turn.slot]);
        turn.advance();
    }
}

// Four FP8 values as F16, exactly.
template <int KV> DEVICE uint2 fp8_quad_to_f16(uint32_t v) {
    if constexpr (KV == KV_E5M2) return make_uint2(__byte_perm(v, 0, 0x1404), __byte_perm(v, 0, 0x3424));  // F16's upper byte
    return make_uint2(fp8_pair_to_f16<KV>(static_cast<uint16_t>(v)), fp8_pair_to_f16<KV>(static_cast<uint16_t>(v >> 16)));
}

// One warpgroup: FP8 tiles become F16 tiles in the ring. A thread takes sixteen values of a token at a time.
template <int KV> DEVICE void convert_tiles(const PrefillParams &p, WideShared<KV> &shared, const Division &token_of, int lane) {
    using W = Wide<KV>;
    constexpr int ROWS_AT_ONCE = 16;  // 128 threads, eight a row: a chunk
    const int thread = threadIdx.x % 128, unit = thread % 8, row = thread / 8, half = unit / 4;
    const uint32_t from = swizzled<HD>(row, unit * 16);
    // Of their pairs of units, the two halves of a row write different ones at a time: no bank twice.
    const uint32_t to0 = swizzled<2 * HD>(row, (2 * unit + half) * 16), to1 = swizzled<2 * HD>(row, (2 * unit + 1 - half) * 16);
    Place<W::STAGES> stage;
    Place<W::SLOTS> place;
    Works<W::BLOCKS> works(p);
#pragma unroll 1
    for (; works.work >= 0; works.advance()) {
        const int tiles = 2 * ceil_div(works.block.position + token_of(works.block.last_row) + 1, TOKENS);
#pragma unroll 1
        for (int tile = 0; tile < tiles; tile++) {
            barrier_wait(&shared.staged.full[stage.slot], stage.parity);
            barrier_wait(&shared.empty[place.slot], place.parity ^ 1);
            const uint32_t source = shared_address(shared.staged.tile[stage.slot]) + from;
            uint8_t *target = shared.ring[place.slot][0];
#pragma unroll
            for (int c0 = 0; c0 < CHUNKS; c0 += 4) {
                uint4 v[4];
#pragma unroll
                for (int c = 0; c < 4; c++) v[c] = load_shared16(source + (c0 + c) * ROWS_AT_ONCE * HD);
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    const uint2 a = fp8_quad_to_f16<KV>(v[c].x), b = fp8_quad_to_f16<KV>(v[c].y);
                    const uint2 e = fp8_quad_to_f16<KV>(v[c].z), f = fp8_quad_to_f16<KV>(v[c].w);
                    const uint4 low = make_uint4(a.x, a.y, b.x, b.y), high = make_uint4(e.x, e.y, f.x, f.y);
                    *reinterpret_cast<uint4 *>(target + (c0 + c) * CHUNK + to0) = half ? high : low;
                    *reinterpret_cast<uint4 *>(target + (c0 + c) * CHUNK + to1) = half ? low : high;
                }
            }
            fence_async_proxy();
            __syncwarp();
            if (lane == 0) barrier_arrive(&shared.full[place.slot]), barrier_arrive(&shared.staged.empty[stage.slot]);
            place.advance(), stage.advance();
        }
    }
}

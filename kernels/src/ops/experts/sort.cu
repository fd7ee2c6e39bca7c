// Before the products of many rows: the rows sorted by expert, each expert's from a multiple of eight on, in the order
// of the tokens; the list of tiles; and the plane of the sorted rows.
#include <cuda_fp8.h>

#include "many.cuh"

constexpr int SORT_TOKENS = 128, SORT_THREADS = 256;

struct SortParams {
    const uint32_t *ids;   // [tokens, k]
    const int *local;      // expert -> its place on this rank, or -1; null: the same
    int *counts;           // [blocks][MAX_EXPERTS]: of 128 tokens' rows; then the rows before them
    int *starts;           // [MAX_EXPERTS]
    ExpertTile *tiles;
    int *tile_count;
    uint32_t *row_of_slot; // [tokens, k]: sorted row of each (token, slot)
    const uint8_t *plane;  // of the tokens
    uint8_t *sorted;       // plane of the sorted rows
    int tokens, k, experts, steps, plane_blocks, sorted_blocks;
    // Tokens that came from several ranks: `region` places a rank (a multiple of 128), of which the first counts[rank] are
    // used; ids are local or -1. Their rows stand one after the other in the order of planes: BF16, or E4M3 with the
    // scales of each 128 behind them; or they are a plane of as many blocks as they take (`planes`). Each rank's rows begin
    // `region_bytes` after the one's before.
    const int *region_counts;  // null: all tokens, from the plane
    const uint8_t *rows;
    size_t region_bytes;
    int region, row_bytes, fp8;
    int *sorted_rows;  // or null: how many there are, padding included
    int quantised;     // both planes are quantised ones
    int tile_rows;     // most rows of a tile
    int planes;
};

constexpr uint32_t NO_ROW = 0xffffffffu;

// How many tokens there are from `first` on, `most` at most.
DEVICE int tokens_from(const SortParams &p, int first, int most) {
    const int end = p.region_counts ? p.region_counts[first / p.region] + first / p.region * p.region : p.tokens;
    return max(0, min(most, end - first));
}

// Which of the block's tokens chose each expert.
DEVICE void mark_tokens(const SortParams &p, uint32_t (&tokens_of)[MAX_EXPERTS][SORT_TOKENS / 32]) {
    for (int i = threadIdx.x; i < MAX_EXPERTS * SORT_TOKENS / 32; i += SORT_THREADS)
        tokens_of[i / (SORT_TOKENS / 32)][i % (SORT_TOKENS / 32)] = 0;
    __syncthreads();
    const int first = blockIdx.x * SORT_TOKENS, count = tokens_from(p, first, SORT_TOKENS);
    for (int i = threadIdx.x; i < count * p.k; i += SORT_THREADS) {
        const int token = i / p.k, id = p.ids[first * p.k + i], local = p.local ? p.local[id] : id;
        if (static_cast<unsigned>(local) < static_cast<unsigned>(p.experts)) atomicOr(&tokens_of[local][token / 32], 1u << (token % 32));
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(SORT_THREADS) sort_count(const __grid_constant__ SortParams p) {
    __shared__ uint32_t tokens_of[MAX_EXPERTS][SORT_TOKENS / 32];
    wait_for_inputs();
    allow_next_kernel();
    mark_tokens(p, tokens_of);
    int count = 0;
    for (int w = 0; w < SORT_TOKENS / 32; w++) count += __popc(tokens_of[threadIdx.x][w]);
    p.counts[blockIdx.x * MAX_EXPERTS + threadIdx.x] = count;
}

// One block, a thread an expert.
extern "C" __global__ void __launch_bounds__(MAX_EXPERTS) sort_scan(const __grid_constant__ SortParams p) {
    __shared__ int rows_of[MAX_EXPERTS], tiles_of[MAX_EXPERTS];
    wait_for_inputs();
    allow_next_kernel();
    const int expert = threadIdx.x, blocks = ceil_div(p.tokens, SORT_TOKENS);
    int rows = 0;
    for (int b = 0; b < blocks; b++) {
        const int count = p.counts[b * MAX_EXPERTS + expert];
        p.counts[b * MAX_EXPERTS + expert] = rows;
        rows += count;
    }
    const int padded = ceil_div(rows, PLANE_ROWS) * PLANE_ROWS;
    // Equal tiles of a multiple of 32 rows, so that the last one is not a sliver.
    const int tiles = ceil_div(padded, p.tile_rows);
    const int each = tiles ? min(p.tile_rows, ceil_div(ceil_div(padded, tiles), 32) * 32) : 0;
    rows_of[expert] = padded, tiles_of[expert] = tiles;
    __syncthreads();
    int start = 0, tile = 0, total = 0, total_rows = 0;
    for (int e = 0; e < MAX_EXPERTS; e++) {
        if (e < expert) start += rows_of[e], tile += tiles_of[e];
        total += tiles_of[e], total_rows += rows_of[e];
    }
    p.starts[expert] = start;
    for (int i = 0; i < tiles; i++) p.tiles[tile + i] = {expert, start + i * each, min(each, rows - i * each), 0};
    if (expert == 0) *p.tile_count = total;
    if (expert == 0 && p.sorted_rows) *p.sorted_rows = total_rows;
}

extern "C" __global__ void __launch_bounds__(SORT_THREADS) sort_place(const __grid_constant__ SortParams p) {
    __shared__ uint32_t tokens_of[MAX_EXPERTS][SORT_TOKENS / 32];
    wait_for_inputs();
    allow_next_kernel();
    mark_tokens(p, tokens_of);
    const int first = blockIdx.x * SORT_TOKENS, count = tokens_from(p, first, SORT_TOKENS);
    for (int i = threadIdx.x; i < count * p.k; i += SORT_THREADS) {
        const int token = i / p.k, id = p.ids[first * p.k + i], local = p.local ? p.local[id] : id;
        uint32_t row = NO_ROW;
        if (static_cast<unsigned>(local) < static_cast<unsigned>(p.experts)) {
            row = p.starts[local] + p.counts[blockIdx.x * MAX_EXPERTS + local];
            for (int w = 0; w < token / 32; w++) row += __popc(tokens_of[local][w]);
            row += __popc(tokens_of[local][token / 32] & ((1u << (token % 32)) - 1));
        }
        p.row_of_slot[first * p.k + i] = row;
    }
}

// The plane that has a token's row, if one has, and which it is there.
struct PlaneRow {
    const uint8_t *plane;
    int blocks, row;
};
DEVICE PlaneRow plane_row(const SortParams &p, int token) {
    if (!p.planes) return {p.rows ? nullptr : p.plane, p.plane_blocks, token};
    const int rank = token / p.region;
    return {p.rows + rank * p.region_bytes, ceil_div(p.region_counts[rank], PLANE_ROWS), token % p.region};
}

// Sixteen bytes of a row: eight values.
DEVICE uint4 row_unit(const SortParams &p, const PlaneRow &at, int token, int i) {
    if (at.plane) {
        const int chunk = i / 8, unit = i % 8, r = at.row % PLANE_ROWS;
        return *reinterpret_cast<const uint4 *>(
            at.plane + (static_cast<size_t>(chunk) * at.blocks + at.row / PLANE_ROWS) * PLANE_BLOCK + r * 128 + ((unit ^ r) * 16));
    }
    const uint8_t *row = p.rows + token / p.region * p.region_bytes + static_cast<size_t>(token % p.region) * p.row_bytes;
    if (!p.fp8) return __ldcg(reinterpret_cast<const uint4 *>(row) + i);
    const uint2 packed = __ldcg(reinterpret_cast<const uint2 *>(row) + i);
    const float scale = __ldcg(reinterpret_cast<const float *>(row + p.steps * 128) + i / 16);
    uint32_t out[4];
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {
        const uint32_t word = pair < 2 ? packed.x : packed.y;
        const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(word >> (pair % 2 * 16)), __NV_E4M3);
        const float2 v = __half22float2(__half2(raw));
        out[pair] = pack_bf16(v.x * scale, v.y * scale);
    }
    return make_uint4(out[0], out[1], out[2], out[3]);
}

// Copies each token's row to the places of its slots: 16-byte units, permuted for the row they come to.
extern "C" __global__ void __launch_bounds__(SORT_THREADS) sort_rows(const __grid_constant__ SortParams p) {
    wait_for_inputs();
    allow_next_kernel();
    const int token = blockIdx.x, units = p.steps * (p.quantised ? 1 : 2) * 8;
    if (p.region_counts) {
        // Of received tokens some are not there, some have no expert here.
        const bool there = tokens_from(p, token, 1) > 0;
        const bool wanted = there && threadIdx.x < p.k && p.row_of_slot[token * p.k + threadIdx.x] != NO_ROW;
        if (!__syncthreads_or(wanted)) return;
    }
    if (p.quantised)
        for (int i = threadIdx.x; i < p.steps * p.k; i += SORT_THREADS) {
            const int chunk = i / p.k;
            const uint32_t row = p.row_of_slot[token * p.k + i % p.k];
            if (row == NO_ROW) continue;
            *reinterpret_cast<float *>(p.sorted + quantised_scale(row, chunk, p.steps, p.sorted_blocks)) =
                *reinterpret_cast<const float *>(p.plane + quantised_scale(token, chunk, p.steps, p.plane_blocks));
        }
    const PlaneRow at = plane_row(p, token);
    for (int i = threadIdx.x; i < units; i += SORT_THREADS) {
        const int chunk = i / 8, unit = i % 8;
        const uint4 v = row_unit(p, at, token, i);
        for (int j = 0; j < p.k; j++) {
            const uint32_t row = p.row_of_slot[token * p.k + j];
            if (row == NO_ROW) continue;
            const int to = row % PLANE_ROWS;
            *reinterpret_cast<uint4 *>(p.sorted + (static_cast<size_t>(chunk) * p.sorted_blocks + row / PLANE_ROWS) * PLANE_BLOCK +
                                       to * 128 + ((unit ^ to) * 16)) = v;
        }
    }
}

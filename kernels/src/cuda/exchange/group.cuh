// Rows that came from all ranks, grouped by local expert for the few-row kernels: the same `Groups` as route.cu makes.
// One block of at least MAX_EXPERTS threads.
#pragma once
#include "exchange.cuh"

struct GroupRows {
    Groups groups;
    int *rows;            // all expert rows of the exchange
    int experts, words;   // local experts; words of 32 rows: ranks * few_tokens / 32, rounded up
};

// tokens_of: [experts][words] in shared memory: which rows want each expert.
DEVICE void mark_row(uint32_t *tokens_of, int words, uint32_t expert, int row) {
    atomicOr(&tokens_of[expert * words + row / 32], 1u << (row % 32));
}

// Exclusive sums over the threads of `a` and `b` (below 65536 together), and their totals.
DEVICE int2 scan_pairs(int a, int b, int2 *scratch, int2 &total) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / WARP;
    int2 sum = make_int2(a, b);
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
        const int x = __shfl_up_sync(ALL_LANES, sum.x, offset), y = __shfl_up_sync(ALL_LANES, sum.y, offset);
        if (lane >= offset) sum.x += x, sum.y += y;
    }
    if (lane == 31 && warp < MAX_EXPERTS / WARP) scratch[warp] = sum;
    __syncthreads();
    int2 before = make_int2(0, 0);
    total = make_int2(0, 0);
#pragma unroll
    for (int w = 0; w < MAX_EXPERTS / WARP; w++) {
        const int2 v = scratch[w];
        if (w < warp) before.x += v.x, before.y += v.y;
        total.x += v.x, total.y += v.y;
    }
    return make_int2(before.x + sum.x - a, before.y + sum.y - b);
}

// From the marks to groups, after a barrier. Returns where the rows of the thread's expert begin. Ends without a barrier.
DEVICE int make_groups(const GroupRows &p, const uint32_t *tokens_of) {
    __shared__ int2 scratch[MAX_EXPERTS / WARP];
    const int expert = threadIdx.x;
    int rows = 0;
    if (expert < p.experts)
#pragma unroll 1
        for (int w = 0; w < p.words; w++) rows += __popc(tokens_of[expert * p.words + w]);
    const int pieces = ceil_div(rows, GROUP_ROWS);
    int2 total;
    const int2 at = scan_pairs(rows, pieces, scratch, total);
    if (threadIdx.x == 0) *p.groups.count = total.y, *p.rows = total.x;
#pragma unroll 1
    for (int piece = 0; piece < pieces; piece++)
        p.groups.group[at.y + piece] = {expert, at.x + piece * GROUP_ROWS, min(GROUP_ROWS, rows - piece * GROUP_ROWS), 0};
    return at.x;
}

// The same, and where each row is in its group. `id_of(slot)`: the local expert of slot row * k + j, or ABSENT, for the rows
// r * region + i, i < counts[r].
template <class Id>
DEVICE void finish_groups(const GroupRows &p, const int *counts, int ranks, int region, int k, const Id &id_of,
                          const uint32_t *tokens_of) {
    __shared__ int first[MAX_EXPERTS];
    const int begin = make_groups(p, tokens_of);
    if (threadIdx.x < MAX_EXPERTS) first[threadIdx.x] = begin;
    __syncthreads();
    int tokens = 0;
#pragma unroll 1
    for (int r = 0; r < ranks; r++) tokens += counts[r];
#pragma unroll 1
    for (int i = threadIdx.x; i < tokens * k; i += blockDim.x) {
        int row = i / k, r = 0;
        while (row >= counts[r]) row -= counts[r++];
        row += r * region;
        const uint32_t slot = row * k + i % k, id = id_of(slot);
        if (id == ABSENT) continue;
        const uint32_t *marks = tokens_of + id * p.words;
        int place = first[id];
#pragma unroll 1
        for (int w = 0; w < row / 32; w++) place += __popc(marks[w]);
        place += __popc(marks[row / 32] & ((1u << (row % 32)) - 1));
        p.groups.row_token[place] = row;
        p.groups.row_slot[place] = slot;
    }
}

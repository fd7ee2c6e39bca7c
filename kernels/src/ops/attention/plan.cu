// Cuts the contexts of a step's tokens into splits, once a step; every layer's attention walks the same list.
//
// A token's splits are equally long, none shorter than 128 positions (but a context's end). How long: of a few lengths
// that fill the device one to four times, and none at all, the one whose busiest block has least to do, where a split costs as much
// again as SPLIT_COST positions, and adding splits up as MERGE_COST. `fixed` sets the length instead: then the order of summation does not depend on the batch.
#include <climits>

#include "decode.cuh"

struct PlanParams {
    const int *positions;  // [tokens]
    const int *token_run;  // [tokens]: row of the page tables
    AttentionItem *items;
    int *item_count;
    int2 *splits_of;  // [tokens]: first item and their number
    int tokens, head_blocks, blocks, fixed;
};

constexpr int PLAN_THREADS = 1024, PLAN_ITEMS = 1024;

constexpr int CANDIDATES = 9, SPLIT_COST = 192, MERGE_COST = 160;

// Positions of a split when splits are to hold about `chunk` of them.
DEVICE int split_length(int length, int chunk) {
    return max(1, ceil_div(ceil_div(length, max(1, ceil_div(length, chunk))), SPLIT_GRAIN)) * SPLIT_GRAIN;
}

// Inclusive sum over the block.
DEVICE int scan_block(int v, int *scratch) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / WARP;
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
        const int other = __shfl_up_sync(ALL_LANES, v, offset);
        if (lane >= offset) v += other;
    }
    __syncthreads();
    if (lane == 31) scratch[warp] = v;
    __syncthreads();
    int before = 0;
    for (int w = 0; w < warp; w++) before += scratch[w];
    return before + v;
}

// Sum and maximum over the block, for every thread.
DEVICE int block_total(int v, int *scratch) {
    v = __reduce_add_sync(ALL_LANES, v);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x / WARP] = v;
    __syncthreads();
    return __reduce_add_sync(ALL_LANES, scratch[threadIdx.x & 31]);
}

DEVICE int block_most(int v, int *scratch) {
    v = __reduce_max_sync(ALL_LANES, v);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x / WARP] = v;
    __syncthreads();
    return __reduce_max_sync(ALL_LANES, scratch[threadIdx.x & 31]);
}

extern "C" __global__ void __launch_bounds__(PLAN_THREADS) attention_plan(const __grid_constant__ PlanParams p) {
    __shared__ int scratch[WARP], total;
    wait_for_inputs();
    allow_next_kernel();
    const int token = threadIdx.x;
    const int length = token < p.tokens ? p.positions[token] + 1 : 0, run = token < p.tokens ? p.token_run[token] : 0;
    const int sum = scan_block(length, scratch);
    if (token == PLAN_THREADS - 1) total = sum;
    __syncthreads();
    int each = p.fixed;
    if (p.fixed <= 0) {
        const int least = max(SPLIT_MIN, ceil_div(total, PLAN_ITEMS));
        const long long work = static_cast<long long>(total) * p.head_blocks;
        long long best = LLONG_MAX;
        const int most = block_most(length, scratch);
        for (int i = 0; i < CANDIDATES; i++) {
            // Every other one an eighth longer, so that contexts just above the length are not cut in two; the last: none is cut.
            const int fills = i / 2 + 1;
            const long long fair = (work + fills * p.blocks - 1) / (fills * p.blocks);
            const int chunk = i == CANDIDATES - 1 ? most : max(least, static_cast<int>(fair + (i & 1) * fair / 8));
            const int mine = split_length(length, chunk), splits = block_total(ceil_div(length, mine), scratch);
            const int longest = block_most(length > 0 ? min(mine, length) : 0, scratch);
            const long long rounds = ceil_div(static_cast<long long>(splits) * p.head_blocks, static_cast<long long>(p.blocks));
            const long long cost = rounds * (longest + SPLIT_COST) + (splits > p.tokens ? MERGE_COST : 0);
            if (cost < best) best = cost, each = mine;
        }
    }
    // None is empty: an empty one would take the last tile once more.
    const int splits = ceil_div(length, each);
    const int last = scan_block(splits, scratch), first = last - splits;
    if (token < p.tokens) p.splits_of[token] = make_int2(first, splits);
    for (int i = 0; i < splits; i++)
        p.items[first + i] = {token, length - 1, run, min(length, i * each), min(length, (i + 1) * each), i, splits, first};
    if (token == PLAN_THREADS - 1) *p.item_count = last;
}

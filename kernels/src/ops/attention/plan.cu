// Cuts the contexts of a step's tokens into splits, once a step; every layer's attention walks the same list.
//
// A token's splits are equally long: for one token as many as fill the device once, for more tokens up to four times
// (so that unequal contexts still balance), none shorter than 128 positions. `fixed` sets the length instead: then the
// order of summation does not depend on the batch.
#include "decode.cuh"

struct PlanParams {
    const int *positions;  // [tokens]
    AttentionItem *items;
    int *item_count;
    int2 *splits_of;  // [tokens]: first item and their number
    int tokens, head_blocks, blocks, fixed;
};

constexpr int PLAN_THREADS = 1024, PLAN_ITEMS = 1024;

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

extern "C" __global__ void __launch_bounds__(PLAN_THREADS) attention_plan(const __grid_constant__ PlanParams p) {
    __shared__ int scratch[WARP], chunk;
    wait_for_inputs();
    allow_next_kernel();
    const int token = threadIdx.x;
    const int length = token < p.tokens ? p.positions[token] + 1 : 0;
    const int sum = scan_block(length, scratch);
    if (token == PLAN_THREADS - 1) {
        const long long waves = min(4, p.tokens);
        const long long filling = (static_cast<long long>(sum) * p.head_blocks + waves * p.blocks - 1) / (waves * p.blocks);
        const int length_of_split = max(static_cast<int>(filling), max(SPLIT_MIN, ceil_div(sum, PLAN_ITEMS)));
        chunk = p.fixed > 0 ? p.fixed : length_of_split;
    }
    __syncthreads();
    const int splits = ceil_div(length, chunk);
    const int last = scan_block(splits, scratch), first = last - splits;
    const int each = p.fixed > 0 ? chunk : splits > 0 ? ceil_div(ceil_div(length, splits), SPLIT_GRAIN) * SPLIT_GRAIN : 1;
    if (token < p.tokens) p.splits_of[token] = make_int2(first, splits);
    // Rounding up may leave the last ones empty: the list counts what is there.
    for (int i = 0; i < splits; i++)
        p.items[first + i] = {token, min(length, i * each), min(length, (i + 1) * each), i, splits, first};
    if (token == PLAN_THREADS - 1) *p.item_count = last;
}

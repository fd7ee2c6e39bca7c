// Cuts the contexts of a step's tokens into splits, once a step; every layer's attention walks the same list.
//
// Enough splits to fill the device four times over, none shorter than 64 positions nor, unless the list would not fit,
// longer than 1024. `fixed` sets the length instead: then the order of summation does not depend on the batch.
#include "decode.cuh"

struct PlanParams {
    const int *positions;  // [tokens]
    AttentionItem *items;
    int *item_count;
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
        const long long filling = static_cast<long long>(sum) * p.head_blocks / (4LL * p.blocks);
        int length_of_split = static_cast<int>(min(static_cast<long long>(SPLIT_MAX), filling));
        length_of_split = max(length_of_split, ceil_div(sum, PLAN_ITEMS));
        if (p.fixed > 0) length_of_split = p.fixed;
        chunk = max(ceil_div(length_of_split, SPLIT_GRAIN), 1) * SPLIT_GRAIN;
    }
    __syncthreads();
    const int splits = ceil_div(length, chunk);
    const int last = scan_block(splits, scratch), first = last - splits;
    for (int i = 0; i < splits; i++)
        p.items[first + i] = {token, i * chunk, min(length, (i + 1) * chunk), i, splits, first};
    if (token == PLAN_THREADS - 1) *p.item_count = last;
}

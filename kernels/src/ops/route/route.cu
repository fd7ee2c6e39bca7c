// ids, weights = the top k of score(z) + bias; see route.cuh. Then the rows sorted by expert.
#include "route.cuh"

struct RouteTokens {
    RouteParams route;
    uint32_t *ids;         // [tokens, k]
    float *weights;        // [tokens, k]
    float *router_logits;  // [tokens, experts] or null
    const int *local;      // expert -> its place on this rank, or -1; null: the same
    Groups groups;
};

constexpr int ROUTE_THREADS = 1024, ROUTE_WARPS = ROUTE_THREADS / WARP, GROUPED_TOKENS = 128;

// Any number of tokens; no groups.
extern "C" __global__ void __launch_bounds__(256) route(const __grid_constant__ RouteTokens p) {
    wait_for_inputs();
    allow_next_kernel();
    const int token = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x & 31;
    if (token >= p.route.tokens) return;
    int id;
    float weight;
    choose_experts(p.route, token, lane, id, weight, p.router_logits);
    if (lane < p.route.k) {
        p.ids[token * p.route.k + lane] = id;
        p.weights[token * p.route.k + lane] = weight;
    }
}

// Sum of `v` over the threads before this one, over the first MAX_EXPERTS threads; `total` of all of them.
DEVICE int scan_experts(int v, int *scratch, int &total) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / WARP;
    int sum = v;
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
        const int other = __shfl_up_sync(ALL_LANES, sum, offset);
        if (lane >= offset) sum += other;
    }
    __syncthreads();
    if (lane == 31 && warp < MAX_EXPERTS / WARP) scratch[warp] = sum;
    __syncthreads();
    int before = 0;
    total = 0;
    for (int w = 0; w < MAX_EXPERTS / WARP; w++) {
        if (w < warp) before += scratch[w];
        total += scratch[w];
    }
    return before + sum - v;
}

// Up to 128 tokens, one block: choice and groups together. Rows of one expert are in the order of the tokens.
extern "C" __global__ void __launch_bounds__(ROUTE_THREADS) route_groups(const __grid_constant__ RouteTokens p) {
    __shared__ uint32_t tokens_of[MAX_EXPERTS][GROUPED_TOKENS / 32];
    __shared__ uint16_t chosen[GROUPED_TOKENS][MAX_TOP_K];
    __shared__ int scratch[MAX_EXPERTS / WARP];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, k = p.route.k;
    for (int i = threadIdx.x; i < MAX_EXPERTS * GROUPED_TOKENS / 32; i += ROUTE_THREADS)
        tokens_of[i / (GROUPED_TOKENS / 32)][i % (GROUPED_TOKENS / 32)] = 0;
    __syncthreads();
    wait_for_inputs();
    allow_next_kernel();
    for (int token = warp; token < p.route.tokens; token += ROUTE_WARPS) {
        int id;
        float weight;
        choose_experts(p.route, token, lane, id, weight, p.router_logits);
        if (lane < k) {
            p.ids[token * k + lane] = id;
            p.weights[token * k + lane] = weight;
            const int local = p.local ? p.local[id] : id;
            chosen[token][lane] = static_cast<uint16_t>(local);
            if (local >= 0) atomicOr(&tokens_of[local][token / 32], 1u << (token % 32));
        }
    }
    __syncthreads();
    const int expert = threadIdx.x;
    int rows = 0;
    if (expert < MAX_EXPERTS)
        for (int w = 0; w < GROUPED_TOKENS / 32; w++) rows += __popc(tokens_of[expert][w]);
    int total_rows, total_groups;
    const int pieces = ceil_div(rows, GROUP_ROWS);
    int position = scan_experts(rows, scratch, total_rows);
    const int group = scan_experts(pieces, scratch, total_groups);
    if (threadIdx.x == 0) *p.groups.count = total_groups;
    if (rows == 0) return;
    for (int piece = 0; piece < pieces; piece++)
        p.groups.group[group + piece] = {expert, position + piece * GROUP_ROWS,
                                         min(GROUP_ROWS, rows - piece * GROUP_ROWS), 0};
    for (int w = 0; w < GROUPED_TOKENS / 32; w++)
        for (uint32_t bits = tokens_of[expert][w]; bits; bits &= bits - 1) {
            const int token = w * 32 + __ffs(bits) - 1;
            int slot = 0;
            while (slot < k - 1 && chosen[token][slot] != expert) slot++;
            p.groups.row_token[position] = token;
            p.groups.row_slot[position] = token * k + slot;
            position++;
        }
}

// ids, weights = the top k of score(z) + bias; see route.cuh. Then the rows sorted by expert.
#include "../../cuda/exchange/nccl/values.cuh"
#include "choosing.cuh"

struct RouteTokens {
    RouteParams route;
    uint32_t *ids;         // [tokens, k]
    float *weights;        // [tokens, k]
    float *router_logits;  // [tokens, experts] or null
    const int *local;      // expert -> its place on this rank, or -1; null: the same
    Groups groups;
    unsigned *arrived;     // zero between kernels
    PackBeside pack;       // only by `route`
};

constexpr int ROUTE_THREADS = 256, ROUTE_WARPS = ROUTE_THREADS / WARP, GROUPED_TOKENS = 128;

// A slot for the message to other ranks.
DEVICE void pack_slot(const PackBeside &p, int slot, uint32_t id, float weight) {
    p.ids[slot] = id, p.weights[slot] = weight;
    for (uint64_t rest = p.straight; rest; rest &= rest - 1) {
        const int rank = __ffsll(rest) - 1;
        p.at_peer(rank, p.ids)[slot] = id, p.at_peer(rank, p.weights)[slot] = weight;
    }
}

// What the block has written into other ranks' memory is there before anyone says so. By all threads.
DEVICE void finish_pack(const PackBeside &p) {
    if (!p.straight) return;
    __syncthreads();
    if (threadIdx.x == 0) __threadfence_system();
}

// One warp's token: choice and weights to memory. Returns the lane's expert.
DEVICE int route_token(const RouteTokens &p, int token, float *score, float *choice) {
    const int lane = threadIdx.x & 31;
    float z[EXPERTS_PER_LANE];
    load_logits(p.route, token, lane, z);
    if (p.router_logits) {
#pragma unroll
        for (int i = 0; i < EXPERTS_PER_LANE; i++)
            if (lane + i * WARP < p.route.experts) p.router_logits[static_cast<size_t>(token) * p.route.experts + lane + i * WARP] = z[i];
    }
    score_experts(p.route, lane, z, score, choice);
    int id;
    float weight;
    choose_experts(p.route, score, choice, lane, id, weight);
    if (lane < p.route.k) {
        p.ids[token * p.route.k + lane] = id;
        p.weights[token * p.route.k + lane] = weight;
        if (p.pack.rows) pack_slot(p.pack, token * p.route.k + lane, id, weight);
    }
    return id;
}

// A token's row for the message to other ranks.
template <bool EXACT> DEVICE void pack_row(const PackBeside &p, int token) {
    const float *from = p.normed + static_cast<size_t>(token) * p.hidden;
    PackedRow<EXACT> row;
    row.read(from, p.hidden);
    wait_for_inputs();
    allow_next_kernel();
    uint8_t *to = p.rows + static_cast<size_t>(token) * p.row_bytes;
    row.write(to, from, p.hidden);
    for (uint64_t rest = p.straight; rest; rest &= rest - 1) row.write(p.at_peer(__ffsll(rest) - 1, to), from, p.hidden);
    finish_pack(p);
}

// Any number of tokens; no groups. With a message to write a block more for each token.
extern "C" __global__ void __launch_bounds__(ROUTE_THREADS) route(const __grid_constant__ RouteTokens p) {
    static_assert(ROUTE_THREADS == PACK_THREADS);
    __shared__ float score[ROUTE_WARPS][MAX_EXPERTS], choice[ROUTE_WARPS][MAX_EXPERTS];
    const int choosing = ceil_div(p.route.tokens, ROUTE_WARPS), row = blockIdx.x - choosing;
    if (row >= 0) return p.pack.exact ? pack_row<true>(p.pack, row) : pack_row<false>(p.pack, row);
    wait_for_inputs();
    allow_next_kernel();
    const int warp = threadIdx.x / WARP, token = blockIdx.x * ROUTE_WARPS + warp;
    if (token < p.route.tokens) route_token(p, token, score[warp], choice[warp]);
    if (p.pack.rows && blockIdx.x == 0 && threadIdx.x == 0) {
        const uint64_t exchange = *p.pack.begun + 1;
        *p.pack.head = make_uint4(p.route.tokens, *p.pack.load, static_cast<uint32_t>(exchange), static_cast<uint32_t>(exchange >> 32));
    }
    finish_pack(p.pack);
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

// The rows sorted by expert, by the last block to have chosen; rows of one expert are in the order of the tokens.
struct Grouping {
    uint32_t tokens_of[MAX_EXPERTS][GROUPED_TOKENS / 32];
    int first[MAX_EXPERTS], scratch[MAX_EXPERTS / WARP], last;
};

DEVICE void group_rows(const RouteTokens &p, Grouping &shared) {
    const int k = p.route.k;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        shared.last = atomicAdd(p.arrived, 1u) == gridDim.x - 1;
        if (shared.last) *p.arrived = 0;
    }
#pragma unroll
    for (int w = 0; w < GROUPED_TOKENS / 32; w++) shared.tokens_of[threadIdx.x][w] = 0;
    __syncthreads();
    if (!shared.last) return;
    __threadfence();
#pragma unroll 1
    for (int i = threadIdx.x; i < p.route.tokens * k; i += ROUTE_THREADS) {
        const int id = __ldcg(p.ids + i), t = i / k, local = p.local ? p.local[id] : id;
        if (local >= 0) atomicOr(&shared.tokens_of[local][t / 32], 1u << (t % 32));
    }
    __syncthreads();
    const int expert = threadIdx.x;
    int rows = 0;
#pragma unroll
    for (int w = 0; w < GROUPED_TOKENS / 32; w++) rows += __popc(shared.tokens_of[expert][w]);
    int total_rows, total_groups;
    const int pieces = ceil_div(rows, GROUP_ROWS);
    const int position = scan_experts(rows, shared.scratch, total_rows);
    const int group = scan_experts(pieces, shared.scratch, total_groups);
    if (threadIdx.x == 0) *p.groups.count = total_groups;
#pragma unroll 1
    for (int piece = 0; piece < pieces; piece++)
        p.groups.group[group + piece] = {expert, position + piece * GROUP_ROWS,
                                         min(GROUP_ROWS, rows - piece * GROUP_ROWS), 0};
    // First positions of the experts, for the rows' places.
    shared.first[expert] = position;
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < p.route.tokens * k; i += ROUTE_THREADS) {
        const int id = __ldcg(p.ids + i), t = i / k, local = p.local ? p.local[id] : id;
        if (local < 0) continue;
        int at = shared.first[local];
#pragma unroll
        for (int w = 0; w < GROUPED_TOKENS / 32; w++)
            at += __popc(w < t / 32 ? shared.tokens_of[local][w] : w == t / 32 ? shared.tokens_of[local][w] & ((1u << (t % 32)) - 1) : 0u);
        p.groups.row_token[at] = t;
        p.groups.row_slot[at] = i;
    }
}

// Up to 128 tokens, eight a block.
extern "C" __global__ void __launch_bounds__(ROUTE_THREADS) route_groups(const __grid_constant__ RouteTokens p) {
    __shared__ float score[ROUTE_WARPS][MAX_EXPERTS], choice[ROUTE_WARPS][MAX_EXPERTS];
    __shared__ Grouping grouping;
    const int warp = threadIdx.x / WARP, token = blockIdx.x * ROUTE_WARPS + warp;
    wait_for_inputs();
    allow_next_kernel();
    if (token < p.route.tokens) route_token(p, token, score[warp], choice[warp]);
    group_rows(p, grouping);
}

// The same of sigmoids, a block a token.
extern "C" __global__ void __launch_bounds__(ROUTE_THREADS) route_groups_sigmoid(const __grid_constant__ RouteTokens p) {
    static_assert(ROUTE_THREADS == MAX_EXPERTS);
    __shared__ Choosing choosing;
    __shared__ Grouping grouping;
    const int token = blockIdx.x;
    if (threadIdx.x == 0) choosing.candidates = 0;
    wait_for_inputs();
    allow_next_kernel();
    const uint32_t key = score_token(p.route, token, choosing);
    __syncthreads();
    list_candidates(p.route, key, choosing);
    __syncthreads();
    rank_candidates(choosing, p.route.k, threadIdx.x, ROUTE_THREADS);
    __syncthreads();
    if (threadIdx.x < WARP) finish_choice(p.route, token, choosing, p.ids, p.weights);
    group_rows(p, grouping);
}

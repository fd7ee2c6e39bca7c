// The choice of a token's experts by one block: a thread scores an expert, those that can be among the best are listed, and of the list each
// counts how many are better. Sigmoid only.
#pragma once
#include "route.cuh"

// What a token's experts are chosen from, and the choice.
struct Choosing {
    float score[MAX_EXPERTS];
    uint32_t most[MAX_EXPERTS / WARP];  // of each warp's experts, as `ordered`
    uint2 candidate[MAX_EXPERTS];       // choice as `ordered`, expert
    int candidates;                     // 0 before they are listed
    uint32_t id[WARP];
    float weight[WARP];
};

// Scores of a token's experts, one a thread of the first MAX_EXPERTS: what the choice goes by, 0 for those that there are not.
DEVICE uint32_t score_token(const RouteParams &p, int token, Choosing &choosing) {
    const int e = threadIdx.x;
    uint32_t key = 0;
    if (e < p.experts) {
        const float *from = p.logits + static_cast<size_t>(token) * p.experts + e;
        const size_t stride = static_cast<size_t>(p.tokens) * p.experts;
        float z = 0.f;
#pragma unroll 8
        for (int part = 0; part < p.parts; part++) z += __ldcg(from + part * stride);
        const float s = 1.f / (1.f + expf(-z));
        choosing.score[e] = s;
        key = ordered(s + (p.bias ? p.bias[e] : 0.f));
    }
    const uint32_t most = __reduce_max_sync(ALL_LANES, key);
    if (e % WARP == 0) choosing.most[e / WARP] = most;
    return key;
}

// The experts that can be among the k best, of at least k groups those that are no worse than the worst group's best; by the
// threads that scored.
DEVICE void list_candidates(const RouteParams &p, uint32_t key, Choosing &choosing) {
    const int e = threadIdx.x, groups = ceil_div(p.experts, WARP);
    uint32_t least = 0;
    if (groups >= p.k) {
        least = choosing.most[0];
        for (int g = 1; g < groups; g++) least = min(least, choosing.most[g]);
    }
    const bool can = e < p.experts && key >= least;
    const unsigned all = __ballot_sync(ALL_LANES, can);
    int first = 0;
    if (e % WARP == 0 && all) first = atomicAdd(&choosing.candidates, __popc(all));
    first = __shfl_sync(ALL_LANES, first, 0);
    if (can) choosing.candidate[first + __popc(all & ((1u << e % WARP) - 1))] = make_uint2(key, e);
}

// The k best of the list, best first, the lower expert first among equals, as `choose_experts` does it, by `threads` threads; what they
// leave in `id` and `weight` is there after a barrier of theirs.
DEVICE void rank_candidates(Choosing &choosing, int k, int thread, int threads) {
    const int count = choosing.candidates;
#pragma unroll 1
    for (int c = thread; c < count; c += threads) {
        const uint2 mine = choosing.candidate[c];
        int better = 0;
#pragma unroll 4
        for (int i = 0; i < count; i++) {
            const uint2 other = choosing.candidate[i];
            better += other.x > mine.x || other.x == mine.x && other.y < mine.y;
        }
        if (better < k) choosing.id[better] = mine.y, choosing.weight[better] = choosing.score[mine.y];
    }
}

// The weights of the choice, and where it goes: one warp.
DEVICE void finish_choice(const RouteParams &p, int token, Choosing &choosing, uint32_t *ids, float *weights) {
    const int lane = threadIdx.x & 31, k = p.k;
    float weight = lane < k ? choosing.weight[lane] : 0.f, total = 0.f;
    for (int j = 0; j < k; j++) total += choosing.weight[j];
    if (p.renormalize) weight = weight / total;
    __syncwarp();
    if (lane < k) {
        choosing.weight[lane] = weight;
        ids[token * k + lane] = choosing.id[lane], weights[token * k + lane] = weight;
    }
}

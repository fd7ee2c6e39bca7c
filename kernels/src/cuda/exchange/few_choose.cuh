// The choice of a token's experts by the block that sends its row: all threads score, the scout chooses.
#pragma once
#include "few_parts.cuh"

// What a token's experts are chosen from, the choice, and sums of squares for its norm.
struct Choosing {
    float score[MAX_EXPERTS];
    uint32_t most[MAX_EXPERTS / WARP];  // of each warp's experts, as `ordered`
    uint2 candidate[MAX_EXPERTS];       // choice as `ordered`, expert
    int candidates;
    uint32_t id[WARP];
    float weight[WARP], squares[FEW_THREADS / WARP];
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

// The k best, best first, the lower expert first among equals, by the scout; as `choose_experts` does it.
DEVICE void choose_candidates(const DispatchFew &d, int token, Choosing &choosing) {
    const int lane = threadIdx.x & 31, k = d.route.k, count = choosing.candidates;
#pragma unroll 1
    for (int c = lane; c < count; c += WARP) {
        const uint2 mine = choosing.candidate[c];
        int better = 0;
#pragma unroll 4
        for (int i = 0; i < count; i++) {
            const uint2 other = choosing.candidate[i];
            better += other.x > mine.x || other.x == mine.x && other.y < mine.y;
        }
        if (better < k) choosing.id[better] = mine.y, choosing.weight[better] = choosing.score[mine.y];
    }
    __syncwarp();
    float weight = lane < k ? choosing.weight[lane] : 0.f, total = 0.f;
    for (int j = 0; j < k; j++) total += choosing.weight[j];
    if (d.route.renormalize) weight = weight / total;
    __syncwarp();
    if (lane < k) {
        choosing.weight[lane] = weight;
        d.ids[token * k + lane] = choosing.id[lane], d.weights[token * k + lane] = weight;
    }
}

// Choice of experts from the gate's logits, one warp a token, and the groups that the expert kernels work on.
#pragma once
#include "../../cuda/ptx.cuh"

constexpr int MAX_EXPERTS = 256, MAX_TOP_K = 16;
constexpr int EXPERTS_PER_LANE = MAX_EXPERTS / WARP;

struct RouteParams {
    const float *logits;  // [parts][tokens, experts]: the reader adds the parts
    const float *bias;    // [experts] or null: added for the choice only
    int parts, tokens, experts, k;
    int softmax;      // scores are softmax(z), else sigmoid(z)
    int renormalize;  // weights are divided by their sum
};

// Some rows of one expert: at most GROUP_ROWS, so that their activations fit in shared memory.
struct Group {
    int expert, first, rows;
    int token;  // of the only row, where the choice is made in the expert kernel itself
};

constexpr int GROUP_ROWS = 8;

// The rows of a step, sorted by expert; position p of the sorted order is one (token, slot).
struct Groups {
    int *count;           // of groups
    Group *group;         // [count]
    uint32_t *row_token;  // [position]
    uint32_t *row_slot;   // [position]: token * k + slot
};

DEVICE float sum_parts(const RouteParams &p, int token, int expert) {
    float z = 0.f;
    for (int part = 0; part < p.parts; part++)
        z += __ldcg(p.logits + (static_cast<size_t>(part) * p.tokens + token) * p.experts + expert);
    return z;
}

// The k best of score + bias, best first, the lower expert first among equals; lane j < k gets the j-th and its weight.
// Always k different valid experts, even of NaN.
DEVICE void choose_experts(const RouteParams &p, int token, int lane, int &id, float &weight, float *router_logits) {
    float score[EXPERTS_PER_LANE], choice[EXPERTS_PER_LANE];
    float top = -INFINITY;
#pragma unroll
    for (int i = 0; i < EXPERTS_PER_LANE; i++) {
        const int e = lane + i * WARP;
        score[i] = e < p.experts ? sum_parts(p, token, e) : 0.f;
        if (e < p.experts) {
            top = fmaxf(top, score[i]);
            if (router_logits) router_logits[static_cast<size_t>(token) * p.experts + e] = score[i];
        }
    }
    float scale = 1.f;
    if (p.softmax) {
        top = warp_max(top);
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < EXPERTS_PER_LANE; i++) {
            score[i] = lane + i * WARP < p.experts ? expf(score[i] - top) : 0.f;
            sum += score[i];
        }
        scale = 1.f / warp_sum(sum);
    }
    unsigned open = 0;
#pragma unroll
    for (int i = 0; i < EXPERTS_PER_LANE; i++) {
        const int e = lane + i * WARP;
        score[i] = p.softmax ? score[i] * scale : 1.f / (1.f + expf(-score[i]));
        choice[i] = -INFINITY;
        if (e < p.experts) {
            open |= 1u << i;
            choice[i] = score[i] + (p.bias ? p.bias[e] : 0.f);
            if (!(choice[i] > -INFINITY)) choice[i] = -INFINITY;
        }
    }
    id = 0, weight = 0.f;
    float total = 0.f;
    for (int j = 0; j < p.k; j++) {
        float best = -INFINITY, best_score = 0.f;
        int best_expert = INT32_MAX;
#pragma unroll
        for (int i = 0; i < EXPERTS_PER_LANE; i++)
            if ((open >> i & 1) && (choice[i] > best || best_expert == INT32_MAX))
                best = choice[i], best_expert = lane + i * WARP, best_score = score[i];
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
            const float v = __shfl_xor_sync(ALL_LANES, best, offset);
            const float s = __shfl_xor_sync(ALL_LANES, best_score, offset);
            const int e = __shfl_xor_sync(ALL_LANES, best_expert, offset);
            if (v > best || (v == best && e < best_expert)) best = v, best_expert = e, best_score = s;
        }
        if (best_expert % WARP == lane) open &= ~(1u << (best_expert / WARP));
        if (lane == j) id = best_expert, weight = best_score;
        total += best_score;
    }
    if (p.renormalize) weight = weight / total;
}

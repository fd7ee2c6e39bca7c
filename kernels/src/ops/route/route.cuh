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

// A float as an integer of the same order; NaN below everything.
DEVICE uint32_t ordered(float v) {
    const uint32_t bits = __float_as_uint(v);
    return v == v ? bits ^ (bits & 0x80000000u ? 0xffffffffu : 0x80000000u) : 0;
}

// The k best of `choice` (shared memory, [experts]), best first, the lower expert first among equals, by one warp; lane
// j < k gets the j-th and its weight, made from `score`. Always k different valid experts, even of NaN.
DEVICE void choose_experts(const RouteParams &p, const float *score, const float *choice, int lane, int &id, float &weight) {
    uint32_t key[EXPERTS_PER_LANE];
    unsigned open = 0;
#pragma unroll
    for (int i = 0; i < EXPERTS_PER_LANE; i++) {
        const int e = lane + i * WARP;
        key[i] = 0;
        if (e < p.experts) key[i] = ordered(choice[e]), open |= 1u << i;
    }
    id = 0, weight = 0.f;
    float total = 0.f;
#pragma unroll 1
    for (int j = 0; j < p.k; j++) {
        uint32_t best = 0, expert = UINT32_MAX;
#pragma unroll
        for (int i = 0; i < EXPERTS_PER_LANE; i++)
            if ((open >> i & 1) && (key[i] > best || expert == UINT32_MAX)) best = key[i], expert = lane + i * WARP;
        const uint32_t top = __reduce_max_sync(ALL_LANES, best);
        const uint32_t chosen = __reduce_min_sync(ALL_LANES, best == top ? expert : UINT32_MAX);
        if (chosen % WARP == lane) open &= ~(1u << (chosen / WARP));
        const float s = score[chosen];
        if (lane == j) id = chosen, weight = s;
        total += s;
    }
    if (p.renormalize) weight = weight / total;
}

// z of experts lane, lane + 32, .. of one token: the sum of the parts.
DEVICE void load_logits(const RouteParams &p, int token, int lane, float (&z)[EXPERTS_PER_LANE]) {
    const float *from = p.logits + static_cast<size_t>(token) * p.experts + lane;
    const size_t stride = static_cast<size_t>(p.tokens) * p.experts;
#pragma unroll
    for (int i = 0; i < EXPERTS_PER_LANE; i++) z[i] = 0.f;
#pragma unroll 4
    for (int part = 0; part < p.parts; part++) {
#pragma unroll
        for (int i = 0; i < EXPERTS_PER_LANE; i++)
            if (lane + i * WARP < p.experts) z[i] += __ldcg(from + i * WARP);
        from += stride;
    }
}

// Softmax of the experts lane, lane + 32, .. of one token, in place.
DEVICE void softmax_experts(int experts, int lane, float (&z)[EXPERTS_PER_LANE]) {
    float top = -INFINITY, sum = 0.f;
#pragma unroll
    for (int i = 0; i < EXPERTS_PER_LANE; i++)
        if (lane + i * WARP < experts) top = fmaxf(top, z[i]);
    top = warp_max(top);
#pragma unroll
    for (int i = 0; i < EXPERTS_PER_LANE; i++) {
        z[i] = lane + i * WARP < experts ? expf(z[i] - top) : 0.f;
        sum += z[i];
    }
    const float scale = 1.f / warp_sum(sum);
#pragma unroll
    for (int i = 0; i < EXPERTS_PER_LANE; i++) z[i] *= scale;
}

// Scores of one token by one warp, into shared memory; `choice` has the bias added.
DEVICE void score_experts(const RouteParams &p, int lane, float (&z)[EXPERTS_PER_LANE], float *score, float *choice) {
    if (p.softmax) {
        softmax_experts(p.experts, lane, z);
    } else {
#pragma unroll
        for (int i = 0; i < EXPERTS_PER_LANE; i++) z[i] = 1.f / (1.f + expf(-z[i]));
    }
#pragma unroll
    for (int i = 0; i < EXPERTS_PER_LANE; i++) {
        const int e = lane + i * WARP;
        if (e >= p.experts) continue;
        score[e] = z[i];
        choice[e] = z[i] + (p.bias ? p.bias[e] : 0.f);
    }
    __syncwarp();
}

// The same for up to four tokens by a whole block of 512 threads, one expert of one token each; sigmoid only, and the
// gate's inputs in GATE_PARTS parts.
constexpr int GATE_PARTS = 8;

struct BlockRoute {
    float score[4][MAX_EXPERTS], choice[4][MAX_EXPERTS];
};

DEVICE void score_experts_by_block(const RouteParams &p, BlockRoute &route) {
    const size_t stride = static_cast<size_t>(p.tokens) * p.experts;
#pragma unroll 1
    for (int i = threadIdx.x; i < p.tokens * MAX_EXPERTS; i += 512) {
        const int token = i / MAX_EXPERTS, e = i % MAX_EXPERTS;
        if (e >= p.experts) continue;
        const float *from = p.logits + static_cast<size_t>(token) * p.experts + e;
        float z = 0.f;
#pragma unroll
        for (int part = 0; part < GATE_PARTS; part++) z += __ldcg(from + part * stride);
        const float s = 1.f / (1.f + expf(-z));
        route.score[token][e] = s;
        route.choice[token][e] = s + (p.bias ? p.bias[e] : 0.f);
    }
    __syncthreads();
}

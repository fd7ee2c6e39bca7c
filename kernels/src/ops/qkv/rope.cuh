// What the kernels after the q, k and v projections share: parameters, pairs of values that turn together, the way of keys and values to
// their pages.
#pragma once
#include "../attention/pages.cuh"

struct RopeParams {
    const float *qkv;  // [parts][tokens, width]; `bf16`: as BF16, rope_kv.cu: of one part
    int parts, tokens, heads, rotary;
    int norm;  // 0: none, 1: per head, 2: over the whole projection
    float eps;
    const float *q_norm, *k_norm;
    const double *turns;
    const int *positions, *token_run;
    Pages pages;
    float *q;  // [tokens, heads * head_dim], of the tokens before `first16`
    uint16_t *q16;  // the same, times scale, of the tokens from there on: BF16, with FP8 keys F16
    int first16;
    float scale;
    int bf16;
};

constexpr int MAX_ROTARY_PAIRS = 64;

// Two values of a head that one thread takes: a pair that turns together, or two neighbours past the rotated ones.
struct RopePair {
    int head, a, b, angle;  // angle: past the rotated pairs, none
};

template <int HD> DEVICE RopePair rope_pair(int i, int half) {
    const int j = i % (HD / 2), a = j < half ? j : 2 * j;
    return {i / (HD / 2), a, j < half ? j + half : a + 1, j};
}

// The weights of the norm of a pair of values of head `head` (q, then k): one per value of the projection, or one per value of a head.
template <int HD> DEVICE float2 rope_weight(const RopeParams &p, int head, const RopePair &pair) {
    if (!p.norm) return make_float2(1.f, 1.f);
    const bool is_q = head < p.heads;
    const float *weight = (is_q ? p.q_norm : p.k_norm) + (p.norm == 2 ? (is_q ? head : head - p.heads) * HD : 0);
    return make_float2(__ldg(weight + pair.a), __ldg(weight + pair.b));
}

// Cosine and sine of a pair's angle at a position.
DEVICE float2 rope_turn(const RopeParams &p, int pair, int position) {
    const double turns = position * p.turns[pair];
    float sine, cosine;
    sincospif(2.f * static_cast<float>(turns - rint(turns)), &sine, &cosine);
    return make_float2(cosine, sine);
}

// The head's pair, normalised by `inverse` and the weights, and turned in place.
DEVICE void turn_pair(float *head, const RopePair &pair, float inverse, const float2 &weight, int half, const float2 *turn) {
    const float x = head[pair.a] * inverse * weight.x, y = head[pair.b] * inverse * weight.y;
    if (pair.angle < half) {
        const float2 by = turn[pair.angle];
        head[pair.a] = x * by.x - y * by.y, head[pair.b] = y * by.x + x * by.y;
    } else {
        head[pair.a] = x, head[pair.b] = y;
    }
}

// The page of a token's position.
DEVICE uint32_t page_of(const RopeParams &p, int token, int position) {
    const size_t run = __ldcg(p.token_run + token);
    return __ldcg(p.pages.tables + run * p.pages.table_stride + position / p.pages.page_tokens);
}

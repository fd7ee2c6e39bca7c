// Steps 1 to 3: logits into shared memory, with biases, penalties, forbidden tokens and the mask. Every operation is rounded
// as the CPU's, by itself.
#pragma once
#include "row.cuh"

constexpr uint32_t SEEN = 1u << 31;  // in the mark of a token: it is in the prompt; below it how often in the output

// Marks of this part's tokens, in the place of their logits.
DEVICE void count_tokens(const SampleExtra &extra, const uint32_t *lists, const Part &part) {
    uint32_t *marks = reinterpret_cast<uint32_t *>(part.values);
    for (int i = threadIdx.x; i < part.count; i += ROW_THREADS) marks[i] = 0;
    __syncthreads();
    const auto mark = [&](uint32_t token, uint32_t at) {
        const uint32_t i = token - part.begin;
        if (i >= static_cast<uint32_t>(part.count)) return;
        if (at >= extra.output_start)
            atomicAdd(&marks[i], 1u);
        else
            atomicOr(&marks[i], SEEN);
    };
    const uint4 *tokens = reinterpret_cast<const uint4 *>(lists + extra.tokens);
#pragma unroll 4
    for (uint32_t i = 4 * threadIdx.x; i + 3 < extra.token_count; i += 4 * ROW_THREADS) {
        const uint4 v = tokens[i / 4];
        mark(v.x, i), mark(v.y, i + 1), mark(v.z, i + 2), mark(v.w, i + 3);
    }
    const uint32_t rest = extra.token_count / 4 * 4 + threadIdx.x;
    if (rest < extra.token_count) mark(lists[extra.tokens + rest], rest);
    __syncthreads();
}

DEVICE float penalised(float x, uint32_t mark, const SampleExtra &extra) {
    if (mark == 0) return x;
    if (extra.repetition != 1.f) x = x > 0.f ? __fdiv_rn(x, extra.repetition) : __fmul_rn(x, extra.repetition);
    const uint32_t count = mark & ~SEEN;
    if (count) x = __fsub_rn(x, __fadd_rn(__fmul_rn(extra.frequency, __uint2float_rn(count)), extra.presence));
    return x;
}

// The first index of a NaN or +infinity among the part's logits before all this, as this thread saw them.
DEVICE int load_adjusted(const float *logits, const SampleExtra &extra, uint32_t *lists, const Part &part) {
    const uint32_t *marks = reinterpret_cast<const uint32_t *>(part.values);
    const uint32_t *mask = extra.mask ? lists + extra.mask : nullptr;
    const bool counted = extra.token_count > 0;
    const auto allowed = [&](uint32_t token) { return !mask || (mask[token / 32] >> (token % 32) & 1); };
    SampleBias *bias = reinterpret_cast<SampleBias *>(lists + extra.bias);
    // The first entry of a token gets the token's logit, which goes to its place when the marks are not needed any more.
    const auto each_bias = [&](const auto &work) {
        for (uint32_t e = threadIdx.x; e < extra.biases; e += ROW_THREADS) {
            const uint32_t token = bias[e].token, i = token - part.begin;
            if (i < static_cast<uint32_t>(part.count) && (e == 0 || bias[e - 1].token != token)) work(e, token, i);
        }
    };
    if (counted) count_tokens(extra, lists, part);
    each_bias([&](uint32_t e, uint32_t token, uint32_t i) {
        float x = logits[token];
        for (uint32_t at = e; at < extra.biases && bias[at].token == token; at++) x = __fadd_rn(x, bias[at].bias);
        if (counted) x = penalised(x, marks[i], extra);
        bias[e].bias = allowed(token) ? x : -INFINITY;
    });
    if (extra.biases) __syncthreads();
    int bad = INT32_MAX;
    const auto take = [&](int i, float x) {
        const int token = part.begin + i;
        if (!(x < INFINITY)) bad = min(bad, token);
        if (counted) x = penalised(x, marks[i], extra);
        part.values[i] = allowed(token) ? x : -INFINITY;
    };
    const float *from = logits + part.begin;
    if ((reinterpret_cast<size_t>(from) & 15) == 0) {
#pragma unroll 4
        for (int i = 4 * threadIdx.x; i + 3 < part.count; i += 4 * ROW_THREADS) {
            const float4 x = *reinterpret_cast<const float4 *>(from + i);
            take(i, x.x), take(i + 1, x.y), take(i + 2, x.z), take(i + 3, x.w);
        }
        const int rest = part.count / 4 * 4 + threadIdx.x;
        if (rest < part.count) take(rest, from[rest]);
    } else {
        for (int i = threadIdx.x; i < part.count; i += ROW_THREADS) take(i, from[i]);
    }
    __syncthreads();
    if (extra.biases) {
        each_bias([&](uint32_t e, uint32_t, uint32_t i) { part.values[i] = bias[e].bias; });
        __syncthreads();
    }
    if (extra.forbids) {
        for (uint32_t e = threadIdx.x; e < extra.forbids; e += ROW_THREADS) {
            const uint32_t i = lists[extra.forbidden + e] - part.begin;
            if (i < static_cast<uint32_t>(part.count)) part.values[i] = -INFINITY;
        }
        __syncthreads();
    }
    return bad;
}

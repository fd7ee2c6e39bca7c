// Steps 1 to 3: logits into shared memory, with biases, penalties, forbidden tokens and the mask. Every operation is rounded
// as the CPU's, by itself.
#pragma once
#include "row.cuh"

constexpr uint32_t SEEN = 1u << 31;  // in the mark of a token: it is in the prompt; below it how often in the output

// Marks of this part's tokens, in the place of their logits; the first block keeps what came, for the next step.
DEVICE void count_tokens(const SampleExtra &extra, const uint32_t *lists, uint32_t *histories, const Part &part) {
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
    const bool keeps = part.rank == 0 && extra.kept_to != NOT_KEPT;
    // `first` of all tokens: the list's first one.
    const auto read = [&](const uint32_t *list, uint32_t count, uint32_t first, bool copies) {
        uint32_t *copy = histories + extra.kept_to + first;
        const uint4 *quads = reinterpret_cast<const uint4 *>(list);
#pragma unroll 4
        for (uint32_t i = 4 * threadIdx.x; i + 3 < count; i += 4 * ROW_THREADS) {
            const uint4 v = quads[i / 4];
            const uint32_t at = first + i;
            mark(v.x, at), mark(v.y, at + 1), mark(v.z, at + 2), mark(v.w, at + 3);
            if (copies) copy[i] = v.x, copy[i + 1] = v.y, copy[i + 2] = v.z, copy[i + 3] = v.w;
        }
        const uint32_t rest = count / 4 * 4 + threadIdx.x;
        if (rest < count) {
            const uint32_t token = list[rest];
            mark(token, first + rest);
            if (copies) copy[rest] = token;
        }
    };
    read(histories + extra.kept_from, extra.kept_count, 0, keeps && extra.kept_from != extra.kept_to);
    read(lists + extra.tokens, extra.token_count, extra.kept_count, keeps);
    __syncthreads();
}

DEVICE void keep_drawn(const SampleExtra &extra, uint32_t *histories, uint32_t token) {
    if (extra.kept_to != NOT_KEPT) histories[extra.kept_to + extra.kept_count + extra.token_count] = token;
}

DEVICE float penalised(float x, uint32_t mark, const SampleExtra &extra) {
    if (mark == 0) return x;
    if (extra.repetition != 1.f) x = x > 0.f ? __fdiv_rn(x, extra.repetition) : __fmul_rn(x, extra.repetition);
    const uint32_t count = mark & ~SEEN;
    if (count) x = __fsub_rn(x, __fadd_rn(__fmul_rn(extra.frequency, __uint2float_rn(count)), extra.presence));
    return x;
}

// The first index of a NaN or +infinity among the part's logits before all this, as this thread saw them.
DEVICE int load_adjusted(const float *logits, const SampleExtra &extra, uint32_t *lists, uint32_t *histories, const Part &part) {
    const uint32_t *marks = reinterpret_cast<const uint32_t *>(part.values);
    const uint32_t *mask = extra.mask ? lists + extra.mask : nullptr;
    const bool counted = extra.kept_count + extra.token_count > 0;
    const auto allowed = [&](uint32_t token) { return !mask || (mask[token / 32] >> (token % 32) & 1); };
    SampleBias *bias = reinterpret_cast<SampleBias *>(lists + extra.bias);
    // The first entry of a token gets the token's logit, which goes to its place when the marks are not needed any more.
    const auto each_bias = [&](const auto &work) {
        for (uint32_t e = threadIdx.x; e < extra.biases; e += ROW_THREADS) {
            const uint32_t token = bias[e].token, i = token - part.begin;
            if (i < static_cast<uint32_t>(part.count) && (e == 0 || bias[e - 1].token != token)) work(e, token, i);
        }
    };
    if (counted) count_tokens(extra, lists, histories, part);
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

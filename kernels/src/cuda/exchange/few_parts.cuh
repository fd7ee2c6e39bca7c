// What the parts of the dispatch of few tokens share: its parameters and its threads.
#pragma once
#include "../gemv.cuh"
#include "few.cuh"
#include "group.cuh"

struct DispatchFew {
    ExchangeParams exchange;
    ExchangeTokens tokens;
    const float *normed;  // [count, hidden]; the kernels of NORM, which also choose: from `norm`, at most INLINE_WIDTH values
    float *x;             // [ranks * few_tokens, hidden]
    GroupRows group;
    RouteParams route;    // the gate's logits, for sigmoid; none: the choice of experts has been made
    uint32_t *ids;        // where the choice goes: those of `tokens`
    float *weights;
    NormInput norm;
};

DEVICE int meta_units(int k) { return (k + 1) / 2; }

// One warp more than move rows: the scout, who learns what is to come.
constexpr int DISPATCH_THREADS = FEW_THREADS + WARP, MOST_METAS = MAX_TOP_K / 2;

// All of sampling for one row, by a cluster of blocks that hold it in shared memory: for rows that are drawn, adjusted, masked
// or told with log-probabilities. The logits themselves stay as they are. The result is a function of the row alone.
#include "adjust.cuh"
#include "draw.cuh"
#include "logprobs.cuh"

extern "C" __global__ void __cluster_dims__(ROW_BLOCKS, 1, 1) __launch_bounds__(ROW_THREADS, 2)
    sample_row(const __grid_constant__ SampleTokens p) {
    extern __shared__ __align__(16) float values[];
    __shared__ RowShared shared;
    wait_for_inputs();
    allow_next_kernel();
    const SampleSpec spec = p.specs[blockIdx.y];
    if (is_plain(spec)) return;
    const SampleExtra extra = spec.extra == NO_EXTRA ? SampleExtra{} : p.extras[spec.extra];
    const float *logits = p.logits + static_cast<size_t>(blockIdx.y) * p.vocab;
    const int begin = min(static_cast<int>(blockIdx.x) * p.each, p.vocab);
    const Part part{values, begin, min(p.each, p.vocab - begin), blockIdx.x, shared};

    Best best = nothing();
    best.bad = load_adjusted(logits, extra, reinterpret_cast<uint32_t *>(p.extras), p.histories, part);
    bool spoilt = false;
    for (int i = threadIdx.x; i < part.count; i += ROW_THREADS) {
        const float x = values[i];
        best = better(best, {x, begin + i, INT32_MAX});
        spoilt |= !(x < INFINITY);
    }
    spoilt = __syncthreads_or(spoilt);
    best = block_best<ROW_WARPS>(best, shared.scratch);
    if (threadIdx.x == 0) shared.best = best, shared.bin = spoilt;
    cluster_sync();
    best = nothing();
    for (uint32_t rank = 0; rank < ROW_BLOCKS; rank++) {
        best = better(best, {in_peer(shared.best.value, rank), in_peer(shared.best.index, rank), in_peer(shared.best.bad, rank)});
        spoilt |= in_peer(shared.bin, rank) != 0;
    }
    uint32_t token = best.index;
    if (best.bad != INT32_MAX)
        token = bad_logit(logits, best.bad);
    else if (spoilt)
        token = ADJUSTED_IS_BAD;
    else if (best.value == -INFINITY)
        token = NONE_ALLOWED;
    else if (spec.temperature != 0.f && spec.min_p > 1.f)
        token = NONE_LIKELY;
    else if (spec.temperature != 0.f) {
        cluster_sync();
        draw(part, spec, p.positions ? p.positions[p.token_of[blockIdx.y]] + 1 : spec.position, best.value, p.vocab);
        cluster_sync();
        token = shared.token;
    }
    if (spec.logprobs && token < LOGIT_IS_NAN) log_probabilities(logits, token, spec.logprobs - 1, part, p.logprobs + spec.token);
    if (threadIdx.x == 0 && blockIdx.x == 0) {
        p.tokens[spec.token] = token;
        if (spec.extra != NO_EXTRA) keep_drawn(p.extras[spec.extra], p.histories, token);
    }
    // No block leaves while another one reads from it.
    cluster_sync();
}

// Rows that take the largest logit as it is: many blocks a row, the last one to arrive adds up.
#include "sample.cuh"

constexpr int GREEDY_THREADS = 256;

DEVICE Best survey(float x, int index) { return {x, index, x < INFINITY ? INT32_MAX : index}; }

extern "C" __global__ void __launch_bounds__(GREEDY_THREADS) sample_greedy(const __grid_constant__ SampleTokens p) {
    __shared__ Best scratch[GREEDY_THREADS / WARP];
    __shared__ int last;
    wait_for_inputs();
    allow_next_kernel();
    const int row = blockIdx.y, each = ceil_div(ceil_div(p.vocab, 4), p.slice_count) * 4;
    if (!is_plain(p.specs[row])) return;
    const float *logits = p.logits + static_cast<size_t>(row) * p.vocab;
    const int begin = blockIdx.x * each, end = min(begin + each, p.vocab);
    Best best = nothing();
    for (int i = begin + threadIdx.x; i < end; i += GREEDY_THREADS) best = better(best, survey(logits[i], i));
    best = block_best<GREEDY_THREADS / WARP>(best, scratch);
    if (threadIdx.x == 0) {
        p.slices[row * p.slice_count + blockIdx.x] = make_float4(best.value, __int_as_float(best.index), __int_as_float(best.bad), 0.f);
        __threadfence();
        last = atomicAdd(&p.arrived[row], 1u) == static_cast<unsigned>(p.slice_count - 1);
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    best = nothing();
    for (int i = threadIdx.x; i < p.slice_count; i += GREEDY_THREADS) {
        const float4 v = __ldcg(&p.slices[row * p.slice_count + i]);
        best = better(best, {v.x, __float_as_int(v.y), __float_as_int(v.z)});
    }
    best = block_best<GREEDY_THREADS / WARP>(best, scratch);
    if (threadIdx.x == 0) {
        p.arrived[row] = 0;
        uint32_t token = best.index;
        if (best.bad != INT32_MAX)
            token = bad_logit(logits, best.bad);
        else if (best.value == -INFINITY)
            token = NONE_ALLOWED;
        p.tokens[p.specs[row].token] = token;
    }
}

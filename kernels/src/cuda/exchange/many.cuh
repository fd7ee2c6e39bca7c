// What both halves of the exchange of many tokens share: rows in bulk, four warps a row, and stamps behind system-wide fences.
#pragma once
#include "../plane.cuh"
#include "exchange.cuh"

constexpr int MANY_THREADS = 256, MANY_WARPS = MANY_THREADS / WARP, ROW_WARPS = MANY_WARPS / CHUNK;

// All blocks have written: the last one to say so tells every rank. `tell(rank)` runs on a thread of its own.
template <class Tell> DEVICE void tell_all(const ExchangeParams &p, const Tell &tell) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        fence_system();  // this block's rows, before the count
        last = atomicAdd(&p.state->arrived, 1u) == gridDim.x - 1;
        if (last) p.state->arrived = 0;
    }
    __syncthreads();
    if (last && threadIdx.x < p.ranks) {
        fence_system();  // what the other blocks counted, before the stamp
        tell(threadIdx.x);
    }
}

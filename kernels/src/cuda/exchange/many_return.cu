// Many tokens, back, where ranks share a device or copy engines carry the results: `return` sends, `settle` (one block) waits,
// `add` adds. Only the one-block kernel waits, so peers that share the device always get on. Bytes: each result once, 2 bytes a
// value.
#include "many_rows.cuh"

// The weighted sum of each row's slots here, to the row's owner.
extern "C" __global__ void __launch_bounds__(MANY_THREADS) exchange_return(const __grid_constant__ CombineMany c) {
    const ExchangeParams &p = c.exchange;
    __shared__ int counts[MAX_RANKS];
    wait_for_inputs();
    allow_next_kernel();
    if (__syncthreads_or(failed(p))) return;
    const uint64_t exchange = p.state->open;
    int most = 0;
    if (threadIdx.x < p.ranks) counts[threadIdx.x] = p.counts[threadIdx.x];
    __syncthreads();
    for (int r = 0; r < p.ranks; r++) most = max(most, counts[r]);
    // Neighbouring warps serve different owners: all links are busy at once.
    for (int n = blockIdx.x * CHUNK + chunk_row(); n < most * p.ranks; n += gridDim.x * CHUNK) {
        const int owner = n % p.ranks, token = n / p.ranks;
        if (token < counts[owner]) return_row(c, owner, token);
    }
    tell_all(p, [&](int rank) { store_release(reinterpret_cast<uint64_t *>(p.area[rank] + p.at.many_done) + place_for(p, rank), exchange); });
}

// One block of MAX_RANKS threads.
extern "C" __global__ void __launch_bounds__(MAX_RANKS) exchange_settle(const __grid_constant__ CombineMany c) {
    const ExchangeParams &p = c.exchange;
    wait_for_inputs();
    const uint64_t exchange = p.state->open;
    if (!failed(p)) await_returns(p, exchange);
    if (threadIdx.x == 0) p.state->begun = exchange;
    allow_next_kernel();
}

extern "C" __global__ void __launch_bounds__(MANY_THREADS) exchange_add(const __grid_constant__ CombineMany c) {
    const ExchangeParams &p = c.exchange;
    wait_for_inputs();
    allow_next_kernel();
    if (__syncthreads_or(failed(p))) return;
    for (int token = blockIdx.x * CHUNK + chunk_row(); token < c.tokens.count; token += gridDim.x * CHUNK)
        add_row(c, token, owners_of(p, token), nullptr);
}

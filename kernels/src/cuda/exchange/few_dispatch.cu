// Few tokens, there, one kernel: block 0 waits for what comes and groups it by expert; the others choose the experts of this
// rank's tokens, send their rows, then unpack what comes into F32 rows.
#include "few_receive.cuh"
#include "few_send.cuh"

template <bool EXACT, bool NORM, bool TRACED> DEVICE void dispatch_few(const DispatchFew &d) {
    extern __shared__ uint32_t tokens_of[];  // [local experts][words], then the slots' experts, 16 bits each
    __shared__ Scouted known;
    const ExchangeParams &p = d.exchange;
    if (blockIdx.x == 0)
        for (int i = threadIdx.x; i < d.group.experts * d.group.words; i += DISPATCH_THREADS) tokens_of[i] = 0;
    if (threadIdx.x < MAX_RANKS) known.counts[threadIdx.x] = -1;
    if (threadIdx.x == 0) known.verdict = UNKNOWN;
    const uint64_t came = entered<TRACED>();
    wait_for_inputs();
    if (p.alone) allow_next_kernel();
    const uint64_t exchange = p.state->begun + 1;
    mark<TRACED>(p, TRACED_DISPATCH, exchange, 0, came);
    mark<TRACED>(p, TRACED_DISPATCH, exchange, 1);
    // Rows that this rank's experts had before: the load that the others see.
    const uint32_t load = *d.group.rows;
    const int senders = gridDim.x - 1;
    int token = blockIdx.x - 1;
    __shared__ Sending sending;
    __shared__ Sent choosing;
    RowPart<EXACT> part;
    if (blockIdx.x > 0 && token < d.tokens.count) prepare_token<EXACT, NORM>(d, exchange, token, sending, part, choosing);
    if (__syncthreads_or(failed(p))) {
        if (blockIdx.x == 0 && threadIdx.x == 0) *d.group.groups.count = 0, p.state->open = exchange;
        if (blockIdx.x == 0 && threadIdx.x < p.ranks) p.counts[threadIdx.x] = 0;
        return;
    }
    if (blockIdx.x == 0) {
        if (threadIdx.x == 0) p.state->open = exchange;
        mark<TRACED>(p, TRACED_DISPATCH, exchange, 2);
        group_arrivals<TRACED>(d, exchange, known, tokens_of, reinterpret_cast<uint16_t *>(tokens_of + d.group.experts * d.group.words));
        mark<TRACED>(p, TRACED_DISPATCH, exchange, 5);
        return;
    }
    if (blockIdx.x == 1 && threadIdx.x < p.ranks)
        store_unit(p.area[threadIdx.x] + p.at.few_header + p.rank * sizeof(Unit), header(d.tokens.count, load, exchange));
    mark<TRACED>(p, TRACED_DISPATCH, exchange, 2);
    while (token < d.tokens.count) {
        send_token<EXACT>(d, exchange, token, sending, part);
        token += senders;
        if (token >= d.tokens.count) break;
        __syncthreads();
        prepare_token<EXACT, NORM>(d, exchange, token, sending, part, choosing);
        __syncthreads();
    }
    mark<TRACED>(p, TRACED_DISPATCH, exchange, 3);
    receive_rows<EXACT, TRACED>(d, exchange, blockIdx.x - 1, senders, known);
    mark<TRACED>(p, TRACED_DISPATCH, exchange, 5);
    if (!p.alone) allow_next_kernel();
}

#define DISPATCH(NAME, EXACT, NORM, TRACED)                                                                            \
    extern "C" __global__ void __maxnreg__(56) NAME(const __grid_constant__ DispatchFew p) { dispatch_few<EXACT, NORM, TRACED>(p); }
DISPATCH(exchange_dispatch_exact, true, false, false)
DISPATCH(exchange_dispatch_bf16, false, false, false)
DISPATCH(exchange_dispatch_exact_norm, true, true, false)
DISPATCH(exchange_dispatch_bf16_norm, false, true, false)
DISPATCH(exchange_dispatch_exact_traced, true, false, true)
DISPATCH(exchange_dispatch_bf16_traced, false, false, true)

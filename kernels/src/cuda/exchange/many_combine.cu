// Many tokens, back, on a device of its own: one kernel, some blocks of which send results, a chunk of tokens at a time with a
// stamp behind each, and the others add what comes. While nothing has come they sum this rank's own share of the next
// chunks into shared memory: else they would do so at the end, when there is nothing left to wait for. Bytes: each result once,
// 2 bytes a value.
#include "many_rows.cuh"

// Where `from` says in the area of `in` that its results for a chunk have come.
DEVICE uint64_t *chunk_stamp(const ExchangeParams &p, int in, int from, int chunk) {
    return reinterpret_cast<uint64_t *>(p.area[in] + p.at.many_chunks) + static_cast<size_t>(from) * (p.many_tokens / CHUNK) + chunk;
}

// Results of the rows that came from other ranks, and word of each chunk. By block `sender` of `senders`, all of which are on the
// device at once, and which wait for nobody.
DEVICE void send_chunks(const CombineMany &c, uint64_t exchange, const int *counts, int sender, int senders) {
    const ExchangeParams &p = c.exchange;
    const int others = p.ranks - 1;
    int most = 0;
    for (int r = 0; r < p.ranks; r++)
        if (r != p.rank) most = max(most, counts[r]);
    for (int n = sender; n / max(others, 1) * CHUNK < most; n += senders) {
        const int owner = (p.rank + 1 + n % others) % p.ranks, chunk = n / others, token = chunk * CHUNK + chunk_row();
        if (chunk * CHUNK >= counts[owner]) continue;
        if (token < counts[owner]) return_row(c, owner, token);
        __syncthreads();
        if (threadIdx.x == 0) store_release(chunk_stamp(p, owner, p.rank, chunk), exchange);
    }
}

// Adds chunks of this rank's tokens as they come; by block `adder` of `adders`. `own`: [c.ahead][CHUNK] rows of BF16, of which a thread
// reads what it wrote. False: gave up.
template <bool TRACED> DEVICE bool add_chunks(const CombineMany &c, uint64_t exchange, int adder, int adders, uint4 *own) {
    const ExchangeParams &p = c.exchange;
    const int units = p.hidden / 8, from = threadIdx.x;
    int next = adder, into = 0, at = 0;  // the next chunk to sum; where it goes, and where the one to add is
    for (int chunk = adder; chunk * CHUNK < c.tokens.count; chunk += adders) {
        for (; next * CHUNK < c.tokens.count && next < chunk + c.ahead * adders; next += adders) {
            const int token = next * CHUNK + chunk_row();
            if (token < c.tokens.count) sum_row(c, slots_of(c, p.rank, token), own + (into * CHUNK + chunk_row()) * units);
            if (++into == c.ahead) into = 0;
        }
        if (chunk == adder) mark<TRACED>(p, TRACED_COMBINE, exchange, 2);
        const int token = chunk * CHUNK + chunk_row();
        const uint64_t owners = token < c.tokens.count ? owners_of(p, token) : 0;
        bool good = true;
        if (from < p.ranks && from != p.rank) good = await_done<true>(p, chunk_stamp(p, p.rank, from, chunk), from, exchange);
        if (!__syncthreads_and(good)) return false;
        if (token < c.tokens.count) add_row(c, token, owners, own + (at * CHUNK + chunk_row()) * units);
        if (++at == c.ahead) at = 0;
    }
    return true;
}

// The first `senders` blocks send. All blocks fit on the device, and those that send wait for nobody.
template <bool TRACED> DEVICE void combine_many(const CombineMany &c) {
    extern __shared__ uint4 own[];
    const ExchangeParams &p = c.exchange;
    const int adder = static_cast<int>(blockIdx.x) - c.senders;
    __shared__ int counts[MAX_RANKS];
    const uint64_t came = entered<TRACED>();
    wait_for_inputs();
    allow_next_kernel();
    const uint64_t exchange = p.state->open;
    mark<TRACED>(p, TRACED_COMBINE, exchange, 0, came);
    mark<TRACED>(p, TRACED_COMBINE, exchange, 1);
    if (threadIdx.x < p.ranks) counts[threadIdx.x] = p.counts[threadIdx.x];
    bool good = !__syncthreads_or(failed(p));
    if (adder < 0) {
        // This rank's experts have read what came; they were kernels that have ended.
        if (good && blockIdx.x == 0 && threadIdx.x < p.ranks)
            store_relaxed(reinterpret_cast<uint64_t *>(p.area[threadIdx.x] + p.at.many_done) + p.rank, exchange);
        if (good) send_chunks(c, exchange, counts, blockIdx.x, c.senders);
        mark<TRACED>(p, TRACED_COMBINE, exchange, 3);
        return;
    }
    if (good) good = add_chunks<TRACED>(c, exchange, adder, gridDim.x - c.senders, own);
    if (adder == 0) {
        if (good) await_returns(p, exchange);
        __syncthreads();
        if (threadIdx.x == 0) p.state->begun = exchange;
    }
    mark<TRACED>(p, TRACED_COMBINE, exchange, 5);
}

#define COMBINE_MANY(NAME, TRACED)                                                                                     \
    extern "C" __global__ void __launch_bounds__(MANY_THREADS, 4) NAME(const __grid_constant__ CombineMany c) { combine_many<TRACED>(c); }
COMBINE_MANY(exchange_combine_many, false)
COMBINE_MANY(exchange_combine_many_traced, true)

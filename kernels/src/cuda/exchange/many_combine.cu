// Many tokens, back. On a device of its own a rank sends and adds in one kernel; where ranks share a device, or NCCL
// carries the results, `return` sends, `settle` (one block) waits, `add` adds: only the one-block kernel waits, so peers that
// share the device always get on. Bytes: each result once, 2 bytes a value.
#include "many.cuh"
#include "sum_slots.cuh"

struct CombineMany {
    ExchangeParams exchange;
    ExchangeTokens tokens;
    const __nv_bfloat16 *sorted;   // [sorted rows, hidden]
    const uint32_t *row_of_slot;   // [ranks][many_tokens, k]
    float *hidden;                 // [count, hidden]
    int senders;                   // blocks that send, where others add
};

DEVICE RowSlots slots_of(const CombineMany &c, size_t row, int lane) {
    const ExchangeParams &p = c.exchange;
    const float *weights = reinterpret_cast<const float *>(p.area[p.rank] + p.at.many_weights);
    return slots_of(c.row_of_slot + row * p.k, weights + row * p.k, p.k, lane);
}

// The sum of one row to its owner, by ROW_WARPS warps; `part`: the lane among theirs.
DEVICE void return_row(const CombineMany &c, int owner, int token, int part, const RowSlots &slots) {
    const ExchangeParams &p = c.exchange;
    const int units = p.hidden / 8;
    if (!slots.present) return;
    uint8_t *to = p.area[owner] + p.at.many_back + (static_cast<size_t>(place_for(p, owner)) * p.many_tokens + token) * p.hidden * 2;
#pragma unroll 1
    for (int first = 0; first < units; first += ROW_WARPS * WARP) {
        const int u = first + part;
        const uint4 sum = sum_slots(slots, c.sorted, p.hidden, u);
        if (u < units) *reinterpret_cast<uint4 *>(to + u * 16) = sum;
    }
}

// The weighted sum of each row's slots here, to the row's owner.
extern "C" __global__ void __launch_bounds__(MANY_THREADS) exchange_return(const __grid_constant__ CombineMany c) {
    const ExchangeParams &p = c.exchange;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31;
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
    for (int n = blockIdx.x * CHUNK + warp / ROW_WARPS; n < most * p.ranks; n += gridDim.x * CHUNK) {
        const int owner = n % p.ranks, token = n / p.ranks;
        if (token < counts[owner])
            return_row(c, owner, token, warp % ROW_WARPS * WARP + lane, slots_of(c, static_cast<size_t>(owner) * p.many_tokens + token, lane));
    }
    tell_all(p, [&](int rank) { store_release(reinterpret_cast<uint64_t *>(p.area[rank] + p.at.many_done) + place_for(p, rank), exchange); });
}

// Waits until every rank has returned all; threads beyond the ranks pass. False: gave up.
DEVICE bool await_returns(const ExchangeParams &p, uint64_t exchange) {
    return threadIdx.x >= p.ranks ||
           await_done<true>(p, reinterpret_cast<const uint64_t *>(p.area[p.rank] + p.at.many_done) + threadIdx.x, threadIdx.x, exchange);
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

// Ranks that have a share in a token's sum.
DEVICE uint64_t owners_of(const ExchangeParams &p, int token, int lane) {
    return or_lanes(lane < p.k ? 1ull << p.owner[token * p.k + lane] : 0);
}

// hidden += what came back for one token, in the order of ranks, by ROW_WARPS warps. `OWN`: this rank's share is still to be
// summed; as rounded as if it had come back.
template <bool OWN> DEVICE void add_row(const CombineMany &c, int token, int part, const RowSlots &slots, uint64_t all) {
    constexpr int AHEAD = 2;
    const ExchangeParams &p = c.exchange;
    const int units = p.hidden / 8;
    const uint64_t here = 1ull << p.rank;
    float *to = c.hidden + static_cast<size_t>(token) * p.hidden;
    const uint8_t *back = p.area[p.rank] + p.at.many_back;
#pragma unroll 1
    for (int first = 0; first < units; first += ROW_WARPS * WARP) {
        const int u = first + part;
        float4 low{}, high{};
        if (u < units) low = *reinterpret_cast<const float4 *>(to + u * 8), high = *reinterpret_cast<const float4 *>(to + u * 8 + 4);
        float sum[8] = {};
        const auto add_ranks = [&](uint64_t rest) {
            while (rest) {
                uint4 v[AHEAD];
#pragma unroll
                for (int a = 0; a < AHEAD; a++) {
                    v[a] = make_uint4(0, 0, 0, 0);
                    if (rest && u < units) {
                        const size_t row = static_cast<size_t>(__ffsll(rest) - 1) * p.many_tokens + token;
                        v[a] = __ldcg(reinterpret_cast<const uint4 *>(back + row * p.hidden * 2 + u * 16));
                    }
                    rest &= rest - 1;
                }
#pragma unroll
                for (int a = 0; a < AHEAD; a++) add_eight(sum, v[a]);
            }
        };
        if (OWN) {
            add_ranks(all & (here - 1));
            if (all & here) add_eight(sum, sum_slots(slots, c.sorted, p.hidden, u));
            add_ranks(all & ~(here - 1) & ~here);
        } else {
            add_ranks(all);
        }
        if (u >= units) continue;
        low.x += sum[0], low.y += sum[1], low.z += sum[2], low.w += sum[3];
        high.x += sum[4], high.y += sum[5], high.z += sum[6], high.w += sum[7];
        *reinterpret_cast<float4 *>(to + u * 8) = low;
        *reinterpret_cast<float4 *>(to + u * 8 + 4) = high;
    }
}

extern "C" __global__ void __launch_bounds__(MANY_THREADS) exchange_add(const __grid_constant__ CombineMany c) {
    const ExchangeParams &p = c.exchange;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31;
    wait_for_inputs();
    allow_next_kernel();
    if (__syncthreads_or(failed(p))) return;
    for (int token = blockIdx.x * CHUNK + warp / ROW_WARPS; token < c.tokens.count; token += gridDim.x * CHUNK)
        add_row<false>(c, token, warp % ROW_WARPS * WARP + lane, RowSlots{ABSENT, 0.f, 0}, owners_of(p, token, lane));
}

// ---- sending and adding at once --------------------------------------------------------------------------------------

// Results of the rows that came from other ranks, a chunk of tokens at a time, and word of each. By block `sender` of
// `senders`, all of which are on the device at once, and which wait for nobody.
DEVICE void send_chunks(const CombineMany &c, uint64_t exchange, const int *counts, int sender, int senders) {
    const ExchangeParams &p = c.exchange;
    const int warp = threadIdx.x / WARP, part = warp % ROW_WARPS * WARP + (threadIdx.x & 31), others = p.ranks - 1;
    int most = 0;
    for (int r = 0; r < p.ranks; r++)
        if (r != p.rank) most = max(most, counts[r]);
    for (int n = sender; n / max(others, 1) * CHUNK < most; n += senders) {
        const int owner = (p.rank + 1 + n % others) % p.ranks, chunk = n / others, token = chunk * CHUNK + warp / ROW_WARPS;
        if (chunk * CHUNK >= counts[owner]) continue;
        if (token < counts[owner])
            return_row(c, owner, token, part, slots_of(c, static_cast<size_t>(owner) * p.many_tokens + token, threadIdx.x & 31));
        __syncthreads();
        if (threadIdx.x == 0)
            store_release(reinterpret_cast<uint64_t *>(p.area[owner] + p.at.many_chunks) + static_cast<size_t>(p.rank) * (p.many_tokens / CHUNK) + chunk,
                          exchange);
    }
}

// Adds chunks of this rank's tokens as they come; by block `adder` of `adders`. False: gave up.
DEVICE bool add_chunks(const CombineMany &c, uint64_t exchange, int adder, int adders) {
    const ExchangeParams &p = c.exchange;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, part = warp % ROW_WARPS * WARP + lane, from = threadIdx.x;
    const uint64_t *come = reinterpret_cast<const uint64_t *>(p.area[p.rank] + p.at.many_chunks);
    for (int chunk = adder; chunk * CHUNK < c.tokens.count; chunk += adders) {
        bool good = true;
        if (from < p.ranks && from != p.rank)
            good = await_done<true>(p, come + static_cast<size_t>(from) * (p.many_tokens / CHUNK) + chunk, from, exchange);
        if (!__syncthreads_and(good)) return false;
        const int token = chunk * CHUNK + warp / ROW_WARPS;
        if (token < c.tokens.count)
            add_row<true>(c, token, part, slots_of(c, static_cast<size_t>(p.rank) * p.many_tokens + token, lane), owners_of(p, token, lane));
    }
    return true;
}

// The first `senders` blocks send, the others add what comes. For a rank that is alone on its device: all blocks fit, and those
// that send wait for nobody.
template <bool TRACED> DEVICE void combine_many(const CombineMany &c) {
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
    if (good) good = add_chunks(c, exchange, adder, gridDim.x - c.senders);
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

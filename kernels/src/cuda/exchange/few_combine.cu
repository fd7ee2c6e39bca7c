// Few tokens, back, one kernel: every block sends results, then adds what comes back and does the next norm; the last one
// settles that all have read what was sent.
#include "few.cuh"
#include "../../ops/rmsnorm/rows.cuh"

struct CombineFew {
    ExchangeParams exchange;
    ExchangeTokens tokens;
    const float *y;  // [ranks * few_tokens * k, hidden]
    NormRows norm;
    int part_bits;  // 2^part_bits blocks share the results of a row: with few rows there are more blocks than rows
};

// Results of the rows that came, to their owners, by block `worker` of `workers`. `ids` and `weights` hold those of the
// worker's first place.
template <bool EXACT>
DEVICE void send_results(const CombineFew &c, uint64_t exchange, const int *counts, uint32_t *ids, float *weights, int worker, int workers) {
    constexpr int VALUES = Packing<EXACT>::VALUES;
    const ExchangeParams &p = c.exchange;
    const uint32_t stamp = small_stamp(exchange);
    const int units = ceil_div(p.hidden, VALUES), share = (units + (1 << c.part_bits) - 1) >> c.part_bits;
    int most = 0;
    for (int r = 0; r < p.ranks; r++) most = max(most, counts[r]);
    uint32_t next_id = ABSENT;
    float next_weight = 0.f;
    const int end = most * p.ranks << c.part_bits;
    for (int n = worker; n < end; n += workers) {
        const int place = n >> c.part_bits, owner = place % p.ranks, token = place / p.ranks, row = owner * p.few_tokens + token;
        if (n != worker) {
            __syncthreads();
            if (threadIdx.x < p.k) ids[threadIdx.x] = next_id, weights[threadIdx.x] = next_weight;
            __syncthreads();
        }
        // On their way while this row is sent.
        if (threadIdx.x < p.k && n + workers < end) {
            const int then = (n + workers) >> c.part_bits, at = (then % p.ranks * p.few_tokens + then / p.ranks) * p.k + threadIdx.x;
            next_id = p.ids[at], next_weight = p.weights[at];
        }
        if (token >= counts[owner]) continue;
        const int lane = threadIdx.x & 31;
        const unsigned present = __ballot_sync(ALL_LANES, lane < p.k && ids[lane] != ABSENT);
        if (!present) continue;
        uint8_t *back = p.area[owner] + p.at.few_back;
        const float *y = c.y + static_cast<size_t>(row) * p.k * p.hidden;
        const int first = (n & ((1 << c.part_bits) - 1)) * share, last = min(units, first + share);
        for (int u = first + threadIdx.x; u < last; u += FEW_THREADS) {
            constexpr int AHEAD = 4;
            float sum[VALUES];
#pragma unroll
            for (int i = 0; i < VALUES; i++) sum[i] = 0.f;
            for (unsigned rest = present; rest;) {
                float v[AHEAD][VALUES];
                int slot[AHEAD];
#pragma unroll
                for (int a = 0; a < AHEAD; a++) {
                    slot[a] = rest ? __ffs(rest) - 1 : -1;
                    rest &= rest - 1;
                    if (slot[a] < 0) continue;
                    Packing<EXACT>::load(y + static_cast<size_t>(slot[a]) * p.hidden, u, units, p.hidden, v[a]);
                }
#pragma unroll
                for (int a = 0; a < AHEAD; a++) {
                    if (slot[a] < 0) continue;
                    if (EXACT && p.deterministic) {
                        const int at = token * p.k + slot[a];
                        store_unit(back + (static_cast<size_t>(at) * units + u) * sizeof(Unit), Packing<EXACT>::pack(v[a], stamp));
                    } else {
                        const float w = weights[slot[a]];
#pragma unroll
                        for (int i = 0; i < VALUES; i++) sum[i] = fmaf(w, v[a][i], sum[i]);
                    }
                }
            }
            if (!(EXACT && p.deterministic))
                store_unit(back + (static_cast<size_t>(p.rank * p.few_tokens + token) * units + u) * sizeof(Unit), Packing<EXACT>::pack(sum, stamp));
        }
    }
}

// Sum of what came back for one token into shared memory. Four units are on their way at a time; they are added in the
// order of ranks, or of slots. False: this thread gave up.
template <bool EXACT>
DEVICE bool sum_results(const CombineFew &c, int token, uint64_t exchange, const int *owner, const float *weight, float *row) {
    constexpr int VALUES = Packing<EXACT>::VALUES, AHEAD = 4;
    const ExchangeParams &p = c.exchange;
    const uint32_t stamp = small_stamp(exchange);
    const int units = ceil_div(p.hidden, VALUES);
    const bool slots = EXACT && p.deterministic;
    const int lane = threadIdx.x & 31;
    const uint64_t from_ranks = or_lanes(lane < p.k ? 1ull << owner[lane] : 0);
    const uint8_t *back = p.area[p.rank] + p.at.few_back;
    bool good = true;
    for (int u = threadIdx.x; u < units && good; u += FEW_THREADS) {
        float sum[VALUES];
#pragma unroll
        for (int i = 0; i < VALUES; i++) sum[i] = 0.f;
        uint64_t rest = slots ? (1ull << p.k) - 1 : from_ranks;
        while (rest) {
            Unit unit[AHEAD];
            int index[AHEAD];
            const auto at = [&](int one) {
                const int place = slots ? token * p.k + one : one * p.few_tokens + token;
                return back + (static_cast<size_t>(place) * units + u) * sizeof(Unit);
            };
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                index[i] = rest ? __ffsll(rest) - 1 : -1;
                rest &= rest - 1;
                if (index[i] >= 0) unit[i] = load_unit(at(index[i]));
            }
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                if (index[i] < 0) continue;
                if (unit[i].stamp != stamp) {
                    Unit late;
                    if (!spin_unit(p, at(index[i]), stamp, COMBINE_DEADLINE, slots ? owner[index[i]] : index[i], exchange, late)) {
                        good = false;
                        break;
                    }
                    unit[i] = late;
                }
                float v[VALUES];
                Packing<EXACT>::unpack(unit[i], v);
#pragma unroll
                for (int e = 0; e < VALUES; e++) sum[e] = slots ? fmaf(weight[index[i]], v[e], sum[e]) : sum[e] + v[e];
            }
            if (!good) break;
        }
        Packing<EXACT>::store(row, u, units, p.hidden, sum);
    }
    return good;
}

DEVICE void copy_async16(float *to, const float *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
DEVICE void copies_async_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The last block says that this rank's experts have read what came, and waits until all ranks have said so: the
// others need not. No fence: the readers were kernels that have ended, and no data follows the stamp.
DEVICE void settle(const ExchangeParams &p, uint64_t exchange, bool passing) {
    if (!passing && threadIdx.x < p.ranks) {
        store_relaxed(reinterpret_cast<uint64_t *>(p.area[threadIdx.x] + p.at.few_done) + p.rank, exchange);
        await_done<false>(p, reinterpret_cast<const uint64_t *>(p.area[p.rank] + p.at.few_done) + threadIdx.x, threadIdx.x, exchange);
    }
    if (threadIdx.x == 0) p.state->begun = exchange;
}

template <bool EXACT, int PAIRS, bool TRACED> DEVICE void combine_few(const CombineFew &c) {
    extern __shared__ __align__(16) float row_sum[];  // [hidden]: what came back; then the state it is added to
    __shared__ float scratch[NORM_THREADS / WARP], weight[MAX_TOP_K], weights[MAX_TOP_K];
    __shared__ int owner[MAX_TOP_K], counts[MAX_RANKS];
    __shared__ uint32_t ids[MAX_TOP_K];
    const ExchangeParams &p = c.exchange;
    // The last blocks add first: where there are more blocks than rows they have nothing to send.
    const int workers = gridDim.x - 1, worker = blockIdx.x, own = workers - 1 - worker;
    const uint64_t came = entered<TRACED>();
    wait_for_inputs();
    if (p.alone) allow_next_kernel();
    const uint64_t exchange = p.state->open;
    mark<TRACED>(p, TRACED_COMBINE, exchange, 0, came);
    mark<TRACED>(p, TRACED_COMBINE, exchange, 1);
    // All that the first place and the first token need, at once.
    const int lane = threadIdx.x & 31, row = worker >> c.part_bits, place = row % p.ranks * p.few_tokens + row / p.ranks;
    if (threadIdx.x < p.ranks) counts[threadIdx.x] = p.counts[threadIdx.x];
    if (threadIdx.x / WARP == 2 && lane < p.k && row / p.ranks < p.few_tokens)
        ids[lane] = p.ids[place * p.k + lane], weights[lane] = p.weights[place * p.k + lane];
    if (threadIdx.x / WARP == 3 && lane < p.k && own >= 0 && own < c.tokens.count)
        owner[lane] = p.owner[own * p.k + lane], weight[lane] = c.tokens.weights[own * p.k + lane];
    const bool passing = __syncthreads_or(failed(p));
    if (worker == workers) {
        mark<TRACED>(p, TRACED_COMBINE, exchange, 2);
        settle(p, exchange, passing);
        mark<TRACED>(p, TRACED_COMBINE, exchange, 6);
        if (!p.alone) allow_next_kernel();
        return;
    }
    mark<TRACED>(p, TRACED_COMBINE, exchange, 2);
    if (!passing) send_results<EXACT>(c, exchange, counts, ids, weights, worker, workers);
    mark<TRACED>(p, TRACED_COMBINE, exchange, 3);
    for (int token = own; token < c.tokens.count; token += workers) {
        if (token != own) {
            __syncthreads();
            if (threadIdx.x < p.k) {
                owner[threadIdx.x] = p.owner[token * p.k + threadIdx.x];
                weight[threadIdx.x] = c.tokens.weights[token * p.k + threadIdx.x];
            }
            __syncthreads();
        }
        // On its way while the results are.
        float *state = row_sum + p.hidden;
        for (int k = 4 * threadIdx.x; k < p.hidden; k += 4 * FEW_THREADS)
            copy_async16(state + k, c.norm.input.x0 + static_cast<size_t>(token) * p.hidden + k);
        const bool good = !passing && sum_results<EXACT>(c, token, exchange, owner, weight, row_sum);
        copies_async_done();
        const bool whole = __syncthreads_and(good);
        mark<TRACED>(p, TRACED_COMBINE, exchange, 4);
        float2 v[PAIRS];
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const int k = 2 * (threadIdx.x + i * NORM_THREADS);
            v[i] = make_float2(0.f, 0.f);
            if (k >= p.hidden) continue;
            v[i] = *reinterpret_cast<const float2 *>(state + k);
            if (whole) v[i].x += row_sum[k], v[i].y += row_sum[k + 1];
            *reinterpret_cast<float2 *>(c.norm.input.sum_out + static_cast<size_t>(token) * p.hidden + k) = v[i];
        }
        if (c.norm.wanted()) finish_row(c.norm, token, v, scratch);
        __syncthreads();
    }
    mark<TRACED>(p, TRACED_COMBINE, exchange, 5);
    if (!p.alone) allow_next_kernel();
}

#define COMBINE(NAME, EXACT, PAIRS, TRACED)                                                                            \
    extern "C" __global__ void __launch_bounds__(FEW_THREADS, 1) NAME(const __grid_constant__ CombineFew p) { combine_few<EXACT, PAIRS, TRACED>(p); }
COMBINE(exchange_combine_exact_3, true, 3, false)
COMBINE(exchange_combine_bf16_3, false, 3, false)
COMBINE(exchange_combine_exact_3_traced, true, 3, true)
COMBINE(exchange_combine_bf16_3_traced, false, 3, true)
COMBINE(exchange_combine_exact_6, true, 6, false)
COMBINE(exchange_combine_bf16_6, false, 6, false)
COMBINE(exchange_combine_exact_16, true, 16, false)
COMBINE(exchange_combine_bf16_16, false, 16, false)

// The exchange of up to 128 tokens a rank: everything in stamped 16-byte units, so nobody waits for a fence.
//
// Dispatch, one kernel: block 0 waits for what comes and groups it by expert; the others send this rank's rows, then
// unpack what comes into F32 rows. Combine, one kernel: every block sends results back, then adds what comes back and
// does the next norm. Bytes: 4/3 of the rows.
#include "exchange.cuh"
#include "../../ops/rmsnorm/rows.cuh"
#include "group.cuh"

constexpr int FEW_THREADS = 512;

struct DispatchFew {
    ExchangeParams exchange;
    ExchangeTokens tokens;
    const float *normed;  // [count, hidden]
    float *x;             // [ranks * few_tokens, hidden]
    GroupRows group;
    int phase;
};

struct CombineFew {
    ExchangeParams exchange;
    ExchangeTokens tokens;
    const float *y;  // [ranks * few_tokens * k, hidden]
    NormRows norm;
    int phase;
};

// How values travel in a unit: three F32 or six BF16.
template <bool EXACT> struct Packing {
    static constexpr int VALUES = EXACT ? 3 : 6;
    static DEVICE Unit pack(const float (&v)[VALUES], uint32_t stamp) {
        if constexpr (EXACT)
            return {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), stamp};
        else
            return {pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), stamp};
    }
    static DEVICE void unpack(const Unit &u, float (&v)[VALUES]) {
        if constexpr (EXACT) {
            v[0] = __uint_as_float(u.a), v[1] = __uint_as_float(u.b), v[2] = __uint_as_float(u.c);
        } else {
            v[0] = bf16_low(u.a), v[1] = bf16_high(u.a), v[2] = bf16_low(u.b), v[3] = bf16_high(u.b);
            v[4] = bf16_low(u.c), v[5] = bf16_high(u.c);
        }
    }
};

DEVICE int meta_units(int k) { return (k + 1) / 2; }

// Finds the n-th of all tokens that came. Returns rank * few_tokens + token, or -1.
DEVICE int item_of(const int *counts, int ranks, int few_tokens, int n) {
    for (int r = 0; r < ranks; r++) {
        if (n < counts[r]) return r * few_tokens + n;
        n -= counts[r];
    }
    return -1;
}

// Waits for all headers; every thread of the block calls it. False: gave up.
DEVICE bool receive_headers(const ExchangeParams &p, uint64_t exchange, int *counts) {
    bool good = true;
    for (int r = threadIdx.x; r < p.ranks; r += blockDim.x) {
        Unit u;
        good = await_header(p, p.area[p.rank] + p.at.few_header + r * sizeof(Unit), r, exchange, u);
        counts[r] = 0;
        if (!good) break;
        if (u.a > static_cast<uint32_t>(p.few_tokens)) {
            fail(p, COUNT, r, exchange);
            good = false;
            break;
        }
        counts[r] = u.a;
        if (blockIdx.x == 0) p.counts[r] = u.a, p.loads[(exchange & 1) * MAX_RANKS + r] = u.b;
    }
    return __syncthreads_and(good);
}

template <bool EXACT> DEVICE void send_rows(const DispatchFew &d, uint64_t exchange, uint32_t load) {
    constexpr int VALUES = Packing<EXACT>::VALUES;
    __shared__ uint32_t local_of[MAX_TOP_K];
    __shared__ int rank_of[MAX_TOP_K];
    __shared__ float weight_of[MAX_TOP_K];
    __shared__ uint64_t ranks_of_row;
    const ExchangeParams &p = d.exchange;
    const uint32_t stamp = small_stamp(exchange);
    const int units = ceil_div(p.hidden, VALUES), metas = meta_units(p.k), senders = gridDim.x - 1;
    if (blockIdx.x == 1 && threadIdx.x < p.ranks)
        store_unit(p.area[threadIdx.x] + p.at.few_header + place_for(p, threadIdx.x) * sizeof(Unit), header(d.tokens.count, load, exchange));
    for (int token = blockIdx.x - 1; token < d.tokens.count; token += senders) {
        __syncthreads();
        if (threadIdx.x < WARP) {
            const Destinations to = choose_ranks(p, d.tokens, token, exchange, threadIdx.x);
            if (threadIdx.x < p.k)
                rank_of[threadIdx.x] = to.rank, local_of[threadIdx.x] = to.local, weight_of[threadIdx.x] = to.weight;
            if (threadIdx.x == 0) ranks_of_row = to.mask;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < p.ranks * metas; i += FEW_THREADS) {
            const int to = i / metas, slot = i % metas * 2, row = place_for(p, to) * p.few_tokens + token;
            uint32_t ids = 0xffffffffu;
            if (rank_of[slot] == to) ids = (ids & 0xffff0000u) | local_of[slot];
            if (slot + 1 < p.k && rank_of[slot + 1] == to) ids = (ids & 0xffffu) | local_of[slot + 1] << 16;
            const uint32_t second = slot + 1 < p.k ? __float_as_uint(weight_of[slot + 1]) : 0;
            store_unit(p.area[to] + p.at.few_meta + (static_cast<size_t>(row) * metas + slot / 2) * sizeof(Unit),
                       {ids, __float_as_uint(weight_of[slot]), second, stamp});
        }
        const float *from = d.normed + static_cast<size_t>(token) * p.hidden;
        for (int u = threadIdx.x; u < units; u += FEW_THREADS) {
            float v[VALUES];
#pragma unroll
            for (int i = 0; i < VALUES; i++) v[i] = u * VALUES + i < p.hidden ? from[u * VALUES + i] : 0.f;
            const Unit unit = Packing<EXACT>::pack(v, stamp);
            for (uint64_t rest = ranks_of_row; rest; rest &= rest - 1) {
                const int to = __ffsll(rest) - 1, row = place_for(p, to) * p.few_tokens + token;
                store_unit(p.area[to] + p.at.few_rows + (static_cast<size_t>(row) * units + u) * sizeof(Unit), unit);
            }
        }
    }
}

// Rows that came for experts here, as F32.
template <bool EXACT> DEVICE void unpack_rows(const DispatchFew &d, uint64_t exchange, const int *counts) {
    constexpr int VALUES = Packing<EXACT>::VALUES;
    const ExchangeParams &p = d.exchange;
    const uint32_t stamp = small_stamp(exchange);
    const int units = ceil_div(p.hidden, VALUES), metas = meta_units(p.k);
    const uint8_t *area = p.area[p.rank];
    for (int n = blockIdx.x - 1;; n += gridDim.x - 1) {
        const int row = item_of(counts, p.ranks, p.few_tokens, n);
        if (row < 0) return;
        bool wanted = false, good = true;
        if (threadIdx.x < metas) {
            Unit u;
            good = await_unit(p, area + p.at.few_meta + (static_cast<size_t>(row) * metas + threadIdx.x) * sizeof(Unit), stamp,
                              DISPATCH_DEADLINE, row / p.few_tokens, exchange, u);
            wanted = good && u.a != 0xffffffffu;
        }
        if (__syncthreads_or(!good)) return;
        if (!__syncthreads_or(wanted)) continue;
        float *to = d.x + static_cast<size_t>(row) * p.hidden;
        for (int u = threadIdx.x; u < units; u += FEW_THREADS) {
            Unit unit;
            if (!await_unit(p, area + p.at.few_rows + (static_cast<size_t>(row) * units + u) * sizeof(Unit), stamp,
                            DISPATCH_DEADLINE, row / p.few_tokens, exchange, unit))
                break;
            float v[VALUES];
            Packing<EXACT>::unpack(unit, v);
#pragma unroll
            for (int i = 0; i < VALUES; i++)
                if (u * VALUES + i < p.hidden) to[u * VALUES + i] = v[i];
        }
    }
}

// Waits for the slots of all tokens and groups them. Block 0.
DEVICE void group_arrivals(const DispatchFew &d, uint64_t exchange, const int *counts, uint32_t *tokens_of) {
    const ExchangeParams &p = d.exchange;
    const uint32_t stamp = small_stamp(exchange);
    const int metas = meta_units(p.k);
    int total = 0;
    for (int r = 0; r < p.ranks; r++) total += counts[r];
    bool good = true;
    for (int i = threadIdx.x; i < total * metas && good; i += FEW_THREADS) {
        const int row = item_of(counts, p.ranks, p.few_tokens, i / metas), slot = i % metas * 2;
        Unit u;
        good = await_unit(p, p.area[p.rank] + p.at.few_meta + (static_cast<size_t>(row) * metas + slot / 2) * sizeof(Unit), stamp,
                          DISPATCH_DEADLINE, row / p.few_tokens, exchange, u);
        if (!good) break;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            if (slot + j >= p.k) break;
            uint32_t id = j ? u.a >> 16 : u.a & 0xffffu;
            if (id >= static_cast<uint32_t>(d.group.experts)) id = ABSENT;
            const size_t at = static_cast<size_t>(row) * p.k + slot + j;
            p.ids[at] = id, p.weights[at] = __uint_as_float(j ? u.c : u.b);
            if (id != ABSENT) mark_row(tokens_of, d.group.words, id, row);
        }
    }
    if (!__syncthreads_and(good)) {
        if (threadIdx.x == 0) *d.group.groups.count = 0;
        return;
    }
    if (!p.alone) allow_next_kernel();
    finish_groups(d.group, counts, p.ranks, p.few_tokens, p.k, p.ids, tokens_of);
}

template <bool EXACT> DEVICE void dispatch_few(const DispatchFew &d) {
    extern __shared__ uint32_t tokens_of[];  // [local experts][words]
    __shared__ int counts[MAX_RANKS];
    const ExchangeParams &p = d.exchange;
    if (blockIdx.x == 0)
        for (int i = threadIdx.x; i < d.group.experts * d.group.words; i += FEW_THREADS) tokens_of[i] = 0;
    wait_for_inputs();
    if (p.alone) allow_next_kernel();
    const uint64_t exchange = p.state->begun + 1;
    // Rows that this rank's experts had before: the load that the others see.
    const uint32_t load = *d.group.rows;
    if (__syncthreads_or(failed(p))) {
        if (blockIdx.x == 0 && threadIdx.x == 0) *d.group.groups.count = 0, p.state->open = exchange;
        if (blockIdx.x == 0 && threadIdx.x < p.ranks) p.counts[threadIdx.x] = 0;
        return;
    }
    if (blockIdx.x > 0 && d.phase != RECEIVE) send_rows<EXACT>(d, exchange, load);
    if (d.phase == SEND) {
        if (!p.alone) allow_next_kernel();
        return;
    }
    const bool good = receive_headers(p, exchange, counts);
    if (blockIdx.x > 0) {
        if (good) unpack_rows<EXACT>(d, exchange, counts);
        if (!p.alone) allow_next_kernel();
        return;
    }
    if (threadIdx.x == 0) p.state->open = exchange;
    if (good) {
        group_arrivals(d, exchange, counts, tokens_of);
    } else {
        if (threadIdx.x == 0) *d.group.groups.count = 0;
        if (threadIdx.x < p.ranks) p.counts[threadIdx.x] = 0;
    }
}

extern "C" __global__ void __launch_bounds__(FEW_THREADS) exchange_dispatch_exact(const __grid_constant__ DispatchFew p) { dispatch_few<true>(p); }
extern "C" __global__ void __launch_bounds__(FEW_THREADS) exchange_dispatch_bf16(const __grid_constant__ DispatchFew p) { dispatch_few<false>(p); }

// ---- combine ----------------------------------------------------------------------------------------------------------

// Results of the rows that came, to their owners.
template <bool EXACT> DEVICE void send_results(const CombineFew &c, uint64_t exchange) {
    constexpr int VALUES = Packing<EXACT>::VALUES;
    __shared__ uint32_t ids[MAX_TOP_K];
    __shared__ float weights[MAX_TOP_K];
    const ExchangeParams &p = c.exchange;
    const uint32_t stamp = small_stamp(exchange);
    const int units = ceil_div(p.hidden, VALUES);
    for (int n = blockIdx.x;; n += gridDim.x) {
        const int row = item_of(p.counts, p.ranks, p.few_tokens, n);
        if (row < 0) return;
        __syncthreads();
        if (threadIdx.x < p.k) {
            ids[threadIdx.x] = p.ids[row * p.k + threadIdx.x];
            weights[threadIdx.x] = p.weights[row * p.k + threadIdx.x];
        }
        __syncthreads();
        bool any = false;
        for (int j = 0; j < p.k; j++) any |= ids[j] != ABSENT;
        if (!any) continue;
        const int owner = row / p.few_tokens, token = row % p.few_tokens;
        uint8_t *back = p.area[owner] + p.at.few_back;
        const float *y = c.y + static_cast<size_t>(row) * p.k * p.hidden;
        for (int u = threadIdx.x; u < units; u += FEW_THREADS) {
            float sum[VALUES];
#pragma unroll
            for (int i = 0; i < VALUES; i++) sum[i] = 0.f;
#pragma unroll 4
            for (int j = 0; j < p.k; j++) {
                if (ids[j] == ABSENT) continue;
                const float *from = y + static_cast<size_t>(j) * p.hidden + u * VALUES;
                float v[VALUES];
#pragma unroll
                for (int i = 0; i < VALUES; i++) v[i] = u * VALUES + i < p.hidden ? from[i] : 0.f;
                if (EXACT && p.deterministic) {
                    const int at = ((p.staged ? owner * p.few_tokens : 0) + token) * p.k + j;
                    store_unit(back + (static_cast<size_t>(at) * units + u) * sizeof(Unit), Packing<EXACT>::pack(v, stamp));
                } else {
#pragma unroll
                    for (int i = 0; i < VALUES; i++) sum[i] = fmaf(weights[j], v[i], sum[i]);
                }
            }
            if (!(EXACT && p.deterministic))
                store_unit(back + (static_cast<size_t>(place_for(p, owner) * p.few_tokens + token) * units + u) * sizeof(Unit), Packing<EXACT>::pack(sum, stamp));
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
    uint64_t from_ranks = 0;
    for (int j = 0; j < p.k; j++) from_ranks |= 1ull << owner[j];
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
            const uint8_t *at[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                index[i] = rest ? __ffsll(rest) - 1 : -1;
                rest &= rest - 1;
                if (index[i] < 0) continue;
                const int from = p.staged && slots ? owner[index[i]] * p.few_tokens : 0;
                const int place = slots ? (from + token) * p.k + index[i] : index[i] * p.few_tokens + token;
                at[i] = back + (static_cast<size_t>(place) * units + u) * sizeof(Unit);
                unit[i] = load_unit(at[i]);
            }
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                if (index[i] < 0) continue;
                if (unit[i].stamp != stamp && !await_unit(p, at[i], stamp, COMBINE_DEADLINE, slots ? owner[index[i]] : index[i], exchange, unit[i])) {
                    good = false;
                    break;
                }
                float v[VALUES];
                Packing<EXACT>::unpack(unit[i], v);
#pragma unroll
                for (int e = 0; e < VALUES; e++) sum[e] = slots ? fmaf(weight[index[i]], v[e], sum[e]) : sum[e] + v[e];
            }
            if (!good) break;
        }
#pragma unroll
        for (int i = 0; i < VALUES; i++)
            if (u * VALUES + i < p.hidden) row[u * VALUES + i] = good ? sum[i] : 0.f;
    }
    return good;
}

template <bool EXACT, int PAIRS> DEVICE void combine_few(const CombineFew &c) {
    extern __shared__ float row_sum[];  // [hidden]
    __shared__ float scratch[NORM_THREADS / WARP], weight[MAX_TOP_K];
    __shared__ int owner[MAX_TOP_K];
    const ExchangeParams &p = c.exchange;
    wait_for_inputs();
    if (p.alone) allow_next_kernel();
    const uint64_t exchange = p.state->open;
    const bool passing = __syncthreads_or(failed(p));
    if (!passing && c.phase != RECEIVE) {
        if (blockIdx.x == 0 && threadIdx.x < p.ranks)
            store_release(reinterpret_cast<uint64_t *>(p.area[threadIdx.x] + p.at.few_done) + place_for(p, threadIdx.x), exchange);
        send_results<EXACT>(c, exchange);
    }
    if (c.phase == SEND) {
        if (!p.alone) allow_next_kernel();
        return;
    }
    for (int token = blockIdx.x; token < c.tokens.count; token += gridDim.x) {
        __syncthreads();
        if (threadIdx.x < p.k) {
            owner[threadIdx.x] = p.owner[token * p.k + threadIdx.x];
            weight[threadIdx.x] = c.tokens.weights[token * p.k + threadIdx.x];
        }
        __syncthreads();
        const bool good = !passing && sum_results<EXACT>(c, token, exchange, owner, weight, row_sum);
        const bool whole = __syncthreads_and(good);
        float2 v[PAIRS];
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const int k = 2 * (threadIdx.x + i * NORM_THREADS);
            v[i] = make_float2(0.f, 0.f);
            if (k >= p.hidden) continue;
            const size_t at = static_cast<size_t>(token) * p.hidden + k;
            v[i] = *reinterpret_cast<const float2 *>(c.norm.input.x0 + at);
            if (whole) v[i].x += row_sum[k], v[i].y += row_sum[k + 1];
            *reinterpret_cast<float2 *>(c.norm.input.sum_out + at) = v[i];
        }
        if (c.norm.normed || c.norm.plane) finish_row(c.norm, token, v, scratch);
    }
    if (blockIdx.x == 0) {
        if (!passing && threadIdx.x < p.ranks)
            await_done(p, reinterpret_cast<const uint64_t *>(p.area[p.rank] + p.at.few_done) + threadIdx.x, threadIdx.x, exchange);
        if (threadIdx.x == 0) p.state->begun = exchange;
    }
    if (!p.alone) allow_next_kernel();
}

#define COMBINE(PAIRS)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(FEW_THREADS, 1)                                                       \
        exchange_combine_exact_##PAIRS(const __grid_constant__ CombineFew p) { combine_few<true, PAIRS>(p); }          \
    extern "C" __global__ void __launch_bounds__(FEW_THREADS, 1)                                                       \
        exchange_combine_bf16_##PAIRS(const __grid_constant__ CombineFew p) { combine_few<false, PAIRS>(p); }
COMBINE(3)
COMBINE(6)
COMBINE(16)

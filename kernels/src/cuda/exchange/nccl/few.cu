// The exchange of up to 128 tokens a rank over NCCL: what a rank makes of what all say, its results, their sum. Rows travel as
// F32 or BF16; sums are those of ../few_combine.cu, in the same order.
// Bytes: every row is written once, and read once by each rank.
#include "../../../ops/rmsnorm/rows.cuh"
#include "group_slots.cuh"
#include "values.cuh"

// Of a row of results: two rows are on a multiprocessor at once.
constexpr int RETURN_THREADS = 384;

struct ReturnFew {
    ExchangeParams exchange;
    Messages messages;
    const float *y;  // [ranks * few_tokens * k, hidden]
};

struct SumFew {
    ExchangeParams exchange;
    Messages messages;
    ExchangeTokens tokens;
    NormRows norm;
};

// Block 0 groups, the others make F32 rows of what came.
template <bool EXACT> DEVICE void arrive_few(const ArriveFew &d) {
    using V = Values<EXACT>;
    extern __shared__ uint2 shared_words[];
    __shared__ Heads heads;
    __shared__ Grouping grouping;
    const ExchangeParams &p = d.exchange;
    const GroupingArrays arrays(d, shared_words);
    const bool groups = blockIdx.x == 0;
    static_assert(FEW_THREADS >= MAX_EXPERTS);
    uint2 held{};
    if (groups) {
        start_grouping(d, grouping, arrays);
        if (threadIdx.x < MAX_EXPERTS) held = first_owners(p, d.layer, threadIdx.x);
    }
    wait_for_inputs();
    allow_next_kernel();
    // All that does not depend on each other is asked for at once: heads, slots, the block's first row.
    const Ahead ahead = read_ahead(p, d.messages.there, d.messages.there_stride);
    const uint64_t exchange = p.state->begun + 1;
    constexpr int EARLY = 2;
    const int units = p.hidden / V::COUNT, first = blockIdx.x - 1;
    const auto row_of = [&](int n) {
        const Message from = message_of(d.messages, n % p.ranks, 0, p.k);
        return reinterpret_cast<const typename V::Packed *>(from.rows + static_cast<size_t>(n / p.ranks) * d.messages.row_bytes);
    };
    FourSlots slots;
    typename V::Packed early[EARLY]{};
    if (groups) {
        slots = read_slots(d, 0);
        if (threadIdx.x < MAX_EXPERTS) grouping.holders[threadIdx.x] = held;
    } else if (first < p.ranks * d.messages.carried) {
        const auto *row = row_of(first);
#pragma unroll
        for (int a = 0; a < EARLY; a++)
            if (threadIdx.x + a * FEW_THREADS < units) early[a] = row[threadIdx.x + a * FEW_THREADS];
    }
    if (!check_heads(p, ahead, min(d.messages.carried, p.few_tokens), exchange, heads, groups)) {
        if (!groups) return;
        if (threadIdx.x == 0) *d.group.groups.count = 0, p.state->open = exchange;
        if (threadIdx.x < p.ranks) p.counts[threadIdx.x] = 0;
        return;
    }
    if (groups) return group_messages(d, exchange, heads, slots, grouping, arrays);
    for (int n = first; n < p.ranks * d.messages.carried; n += gridDim.x - 1) {
        const int sender = n % p.ranks, token = n / p.ranks;
        if (token >= heads.rows[sender]) continue;
        if (threadIdx.x >= FEW_THREADS - WARP) keep_slots(d, exchange, sender, token);
        const auto *row = row_of(n);
        float4 *to = reinterpret_cast<float4 *>(d.x + static_cast<size_t>(sender * p.few_tokens + token) * p.hidden);
#pragma unroll
        for (int a = 0; a < EARLY; a++) {
            const int u = threadIdx.x + a * FEW_THREADS;
            if (u >= units) continue;
            if (n != first) early[a] = row[u];
            to[u] = V::unpack(early[a]);
        }
        for (int u = threadIdx.x + EARLY * FEW_THREADS; u < units; u += FEW_THREADS) to[u] = V::unpack(row[u]);
    }
}

// The weighted sum of each row's slots here, or in deterministic mode each slot, for the row's owner: a block a row.
template <bool EXACT> DEVICE void return_few(const ReturnFew &c) {
    using V = Values<EXACT>;
    // Fours of a thread and slots of each that are asked for at once.
    constexpr int FOURS = EXACT ? 1 : 2, AHEAD = EXACT ? 8 : 4;
    const ExchangeParams &p = c.exchange;
    __shared__ uint32_t ids[MAX_TOP_K];
    __shared__ float weights[MAX_TOP_K];
    __shared__ int counts[MAX_RANKS];
    const auto read_slots = [&](int n) {
        const int row = n % p.ranks * p.few_tokens + n / p.ranks;
        if (threadIdx.x < p.k)
            ids[threadIdx.x] = __ldcg(p.ids + row * p.k + threadIdx.x), weights[threadIdx.x] = __ldcg(p.weights + row * p.k + threadIdx.x);
    };
    // The slots have been known since the dispatch: the experts' kernels are between that and this one.
    if (threadIdx.x < p.ranks) counts[threadIdx.x] = __ldcg(p.counts + threadIdx.x);
    read_slots(blockIdx.x);  // there are no more blocks than rows
    const bool passes = __syncthreads_or(failed(p));
    wait_for_inputs();
    allow_next_kernel();
    if (passes) return;
    if (blockIdx.x == 0) stamp_results(p, c.messages, p.state->open);
    const int units = p.hidden / V::COUNT;
    for (int n = blockIdx.x; n < p.ranks * c.messages.carried; n += gridDim.x) {
        const int owner = n % p.ranks, token = n / p.ranks, row = owner * p.few_tokens + token;
        if (token >= counts[owner]) continue;
        if (n != blockIdx.x) {
            __syncthreads();
            read_slots(n);
            __syncthreads();
        }
        unsigned present = 0;
        for (int j = 0; j < p.k; j++) present |= (ids[j] != ABSENT) << j;
        if (!present) continue;
        auto *to = reinterpret_cast<typename V::Packed *>(result_to(p, c.messages, owner, token));
        const float *y = c.y + static_cast<size_t>(row) * p.k * p.hidden;
        for (int begin = threadIdx.x; begin < units; begin += FOURS * RETURN_THREADS) {
            float4 sum[FOURS] = {};
            for (unsigned rest = present; rest;) {
                float4 v[AHEAD][FOURS];
                int slot[AHEAD];
#pragma unroll
                for (int a = 0; a < AHEAD; a++) {
                    slot[a] = rest ? __ffs(rest) - 1 : -1;
                    rest &= rest - 1;
#pragma unroll
                    for (int f = 0; f < FOURS; f++) {
                        const int u = begin + f * RETURN_THREADS;
                        if (slot[a] >= 0 && u < units) v[a][f] = V::read(y + static_cast<size_t>(slot[a]) * p.hidden + u * V::COUNT);
                    }
                }
#pragma unroll
                for (int a = 0; a < AHEAD; a++) {
                    if (slot[a] < 0) continue;
                    if (EXACT && p.deterministic) {
                        to[slot[a] * units + begin] = V::pack(v[a][0]);
                        continue;
                    }
                    const float w = weights[slot[a]];
#pragma unroll
                    for (int f = 0; f < FOURS; f++) {
                        sum[f].x = fmaf(w, v[a][f].x, sum[f].x), sum[f].y = fmaf(w, v[a][f].y, sum[f].y);
                        sum[f].z = fmaf(w, v[a][f].z, sum[f].z), sum[f].w = fmaf(w, v[a][f].w, sum[f].w);
                    }
                }
            }
#pragma unroll
            for (int f = 0; f < FOURS; f++)
                if (!(EXACT && p.deterministic) && begin + f * RETURN_THREADS < units) to[begin + f * RETURN_THREADS] = V::pack(sum[f]);
        }
    }
    finish_straight(c.messages);
}

// Two values of a row, as they travel.
template <bool EXACT> DEVICE float2 pair_of(const uint8_t *row, int k) {
    if constexpr (EXACT) return *reinterpret_cast<const float2 *>(row + k * 4);
    const uint32_t two = *reinterpret_cast<const uint32_t *>(row + k * 2);
    return make_float2(bf16_low(two), bf16_high(two));
}

// What came back for this rank's tokens, added in the order of ranks or of slots, and the next norm: a block a token.
template <bool EXACT, int PAIRS> DEVICE void sum_few(const SumFew &c) {
    // Ranks whose results are asked for before it is known that they came, and slots at once.
    constexpr int EARLY = PAIRS <= 6 ? 2 : 0, AHEAD = PAIRS <= 3 ? 4 : 1;
    __shared__ float scratch[NORM_THREADS / WARP];
    const ExchangeParams &p = c.exchange;
    const int token = blockIdx.x, lane = threadIdx.x & 31;
    const bool mine = token < c.tokens.count, slots = EXACT && p.deterministic, normed = c.norm.wanted();
    const auto value_of = [&](int i) { return 2 * static_cast<int>(threadIdx.x + i * NORM_THREADS); };
    float2 share[PAIRS];
    if (PAIRS <= 6 && normed) norm_weights(c.norm, share);
    wait_for_inputs();
    allow_next_kernel();
    const Ahead ahead = read_ahead(p, c.messages.back, c.messages.back_stride);
    const uint64_t exchange = p.state->open;
    int owner = 0;
    float weight = 0.f;
    if (mine && lane < p.k) owner = p.owner[token * p.k + lane], weight = c.tokens.weights[token * p.k + lane];
    float2 v[PAIRS], early[EARLY + 1][PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int k = value_of(i);
        v[i] = make_float2(0.f, 0.f);
        if (!mine || k >= p.hidden) continue;
        v[i] = *reinterpret_cast<const float2 *>(c.norm.input.x0 + static_cast<size_t>(token) * p.hidden + k);
#pragma unroll
        for (int a = 0; a < EARLY; a++)
            if (!slots && a < p.ranks) early[a][i] = pair_of<EXACT>(result_of(c.messages, a, token), k);
    }
    const bool good = check_results(p, ahead, exchange, token == 0);
    if (token == 0 && threadIdx.x == 0) p.state->begun = exchange;
    if (!mine) return;
    const uint64_t from = or_lanes(lane < p.k ? 1ull << owner : 0);
    float2 sum[PAIRS] = {};
    if (good && slots) {
#pragma unroll 1
        for (int j = 0; j < p.k; j += AHEAD) {
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                float2 one[AHEAD];
                float w[AHEAD];
#pragma unroll
                for (int a = 0; a < AHEAD; a++) {
                    const int slot = min(j + a, p.k - 1), rank = __shfl_sync(ALL_LANES, owner, slot);
                    w[a] = __shfl_sync(ALL_LANES, weight, slot);
                    if (value_of(i) < p.hidden) one[a] = pair_of<EXACT>(result_of(c.messages, rank, token), slot * p.hidden + value_of(i));
                }
#pragma unroll
                for (int a = 0; a < AHEAD; a++)
                    if (j + a < p.k) sum[i].x = fmaf(w[a], one[a].x, sum[i].x), sum[i].y = fmaf(w[a], one[a].y, sum[i].y);
            }
        }
    } else if (good) {
#pragma unroll
        for (int a = 0; a < EARLY; a++)
#pragma unroll
            for (int i = 0; i < PAIRS; i++)
                if (from >> a & 1) sum[i].x += early[a][i].x, sum[i].y += early[a][i].y;
#pragma unroll 1
        for (uint64_t rest = from >> EARLY << EARLY; rest; rest &= rest - 1) {
            const uint8_t *row = result_of(c.messages, __ffsll(rest) - 1, token);
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                if (value_of(i) >= p.hidden) continue;
                const float2 one = pair_of<EXACT>(row, value_of(i));
                sum[i].x += one.x, sum[i].y += one.y;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int k = value_of(i);
        if (k >= p.hidden) continue;
        if (good) v[i].x += sum[i].x, v[i].y += sum[i].y;
        *reinterpret_cast<float2 *>(c.norm.input.sum_out + static_cast<size_t>(token) * p.hidden + k) = v[i];
    }
    if (!normed) return;
    if constexpr (PAIRS > 6) return finish_row(c.norm, token, v, scratch);
    finish_row(c.norm, token, v, share, scratch);
}

#define FEW(NAME, EXACT)                                                                                                               \
    extern "C" __global__ void __launch_bounds__(FEW_THREADS, 2) nccl_arrive_##NAME(const __grid_constant__ ArriveFew d) {                 \
        arrive_few<EXACT>(d);                                                                                                          \
    }                                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(RETURN_THREADS, 2) nccl_return_##NAME(const __grid_constant__ ReturnFew c) { return_few<EXACT>(c); }
FEW(exact, true)
FEW(bf16, false)

#define SUM(PAIRS)                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(FEW_THREADS, 1) nccl_sum_exact_##PAIRS(const __grid_constant__ SumFew c) {                \
        sum_few<true, PAIRS>(c);                                                                                                       \
    }                                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(FEW_THREADS, 1) nccl_sum_bf16_##PAIRS(const __grid_constant__ SumFew c) {                 \
        sum_few<false, PAIRS>(c);                                                                                                      \
    }
SUM(3)
SUM(6)
SUM(16)

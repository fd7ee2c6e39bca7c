// The exchange of up to 128 tokens a rank over NCCL: what a rank makes of what all say, its results, their sum. Rows travel as
// F32 or BF16; sums are those of ../few_combine.cu, in the same order.
// Bytes: every row is written once, and read once by each rank.
#include "../../../ops/rmsnorm/rows.cuh"
#include "../group.cuh"
#include "messages.cuh"
#include "values.cuh"

constexpr int FEW_THREADS = 512;
// Of a row of results: two rows are on a multiprocessor at once.
constexpr int RETURN_THREADS = 384;

struct ArriveFew {
    ExchangeParams exchange;
    Messages messages;
    float *x;  // [ranks * few_tokens, hidden]
    GroupRows group;
    int layer;
};

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

// Slots of all messages, used or not: on their way before anyone knows how many there are. A thread has the same slot of
// several rows.
constexpr int SLOTS_AHEAD = 4;
struct SlotsAhead {
    int slot, sender[SLOTS_AHEAD], token[SLOTS_AHEAD];  // sender: -1 beyond the last
    uint32_t id[SLOTS_AHEAD];
    float weight[SLOTS_AHEAD];
};
DEVICE void locate_slots(const ArriveFew &d, int turn, SlotsAhead &s) {
    const ExchangeParams &p = d.exchange;
    const unsigned width = FEW_THREADS / p.k, first = threadIdx.x / p.k, carried = d.messages.carried;
    s.slot = threadIdx.x - first * p.k;
#pragma unroll
    for (int a = 0; a < SLOTS_AHEAD; a++) {
        const unsigned row = (turn * SLOTS_AHEAD + a) * width + first;
        s.sender[a] = -1;
        if (first >= width || row >= p.ranks * carried) continue;
        s.sender[a] = row / carried, s.token[a] = row - s.sender[a] * carried;
    }
}
DEVICE void read_slots(const ArriveFew &d, int turn, SlotsAhead &s) {
    const ExchangeParams &p = d.exchange;
    locate_slots(d, turn, s);
#pragma unroll
    for (int a = 0; a < SLOTS_AHEAD; a++) {
        if (s.sender[a] < 0) continue;
        const Message from = message_of(d.messages, s.sender[a], 0, p.k);
        s.id[a] = from.ids[s.token[a] * p.k + s.slot], s.weight[a] = from.weights[s.token[a] * p.k + s.slot];
    }
}

// What the block that groups has in shared memory.
constexpr int ROW_WORDS = 1024 / 32;
struct Grouping {
    uint2 holders[MAX_EXPERTS];  // of each expert the first two: the second says whether there are several
    uint32_t several[ROW_WORDS];
    int rows;
};
// And of a size that depends on the step: marks [local experts][words], where the rows of each word of marks begin, the slots'
// experts, and the grouped slots.
struct GroupingArrays {
    uint32_t *tokens_of;
    uint16_t *starts, *id_of, *places;
    DEVICE GroupingArrays(const ArriveFew &d, uint32_t *at) {
        const int words = d.group.experts * d.group.words, slots = d.exchange.ranks * d.exchange.few_tokens * d.exchange.k;
        tokens_of = at;
        starts = reinterpret_cast<uint16_t *>(at + words);
        id_of = starts + words, places = id_of + slots;
    }
};
// Before anything has come.
DEVICE void start_grouping(const ArriveFew &d, Grouping &g, const GroupingArrays &arrays) {
    for (int i = threadIdx.x; i < d.group.experts * d.group.words; i += FEW_THREADS) arrays.tokens_of[i] = 0;
    if (threadIdx.x < ROW_WORDS) g.several[threadIdx.x] = 0;
}

// Which rows of all ranks are for experts here, grouped by expert. By one block, a barrier after `start_grouping`; `slots`: the
// first.
DEVICE void group_messages(const ArriveFew &d, uint64_t exchange, const Heads &heads, SlotsAhead &slots, Grouping &g,
                           const GroupingArrays &arrays) {
    const ExchangeParams &p = d.exchange;
    if (threadIdx.x < p.ranks) {
        p.counts[threadIdx.x] = heads.rows[threadIdx.x];
        p.loads[(exchange & 1) * MAX_RANKS + threadIdx.x] = heads.loads[threadIdx.x];
    }
    if (threadIdx.x == 0) p.state->open = exchange;
    const auto keep = [&](int sender, int token, int slot, int rank, uint32_t local, float weight) {
        const int row = sender * p.few_tokens + token, at = row * p.k + slot;
        if (local >= static_cast<uint32_t>(d.group.experts)) local = ABSENT;
        p.ids[at] = local, p.weights[at] = weight, arrays.id_of[at] = local;
        if (sender == p.rank) p.owner[token * p.k + slot] = rank < 0 ? 0 : rank;
        if (local != ABSENT) mark_row(arrays.tokens_of, d.group.words, local, row);
    };
    bool shared = false;
    const int turns = ceil_div(p.ranks * d.messages.carried, FEW_THREADS / p.k * SLOTS_AHEAD);
    for (int turn = 0; turn < turns; turn++) {
        if (turn > 0) read_slots(d, turn, slots);
#pragma unroll
        for (int a = 0; a < SLOTS_AHEAD; a++) {
            const int sender = slots.sender[a], token = slots.token[a];
            if (sender < 0 || token >= heads.rows[sender]) continue;
            const uint2 held = slots.id[a] < MAX_EXPERTS ? g.holders[slots.id[a]] : make_uint2(ABSENT, ABSENT);
            if (held.y != ABSENT) {
                const int row = sender * p.few_tokens + token;
                atomicOr(&g.several[row / 32], 1u << (row % 32));
                shared = true;
                continue;
            }
            const int rank = held.x == ABSENT ? -1 : static_cast<int>(held.x >> 16);
            keep(sender, token, slots.slot, rank, rank == p.rank ? held.x & 0xffffu : ABSENT, slots.weight[a]);
        }
    }
    if (__syncthreads_or(shared)) {
        // Rows with an expert that several ranks hold: a warp each.
        const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31;
        for (int row = warp; row < p.ranks * p.few_tokens; row += FEW_THREADS / WARP) {
            if (!(g.several[row / 32] >> (row % 32) & 1)) continue;
            const int sender = row / p.few_tokens, token = row % p.few_tokens;
            const Message from = message_of(d.messages, sender, 0, p.k);
            int rank;
            uint32_t local;
            choose_for(p, d.layer, from, sender, token, exchange, lane, rank, local);
            if (lane < p.k) keep(sender, token, lane, rank, local, from.weights[token * p.k + lane]);
        }
        __syncthreads();
    }
    int begin = make_groups(d.group, arrays.tokens_of);
    if (threadIdx.x < d.group.experts)
        for (int w = threadIdx.x * d.group.words; w < (threadIdx.x + 1) * d.group.words; w++)
            arrays.starts[w] = begin, begin += __popc(arrays.tokens_of[w]);
    if (threadIdx.x == d.group.experts - 1) g.rows = begin;
    __syncthreads();
    for (int turn = 0; turn < turns; turn++) {
        if (turns > 1) locate_slots(d, turn, slots);
#pragma unroll
        for (int a = 0; a < SLOTS_AHEAD; a++) {
            const int sender = slots.sender[a], token = slots.token[a];
            if (sender < 0 || token >= heads.rows[sender]) continue;
            const uint32_t row = sender * p.few_tokens + token, slot = row * p.k + slots.slot, id = arrays.id_of[slot];
            if (id == 0xffffu) continue;
            const uint32_t word = id * d.group.words + row / 32;
            arrays.places[arrays.starts[word] + __popc(arrays.tokens_of[word] & ((1u << row % 32) - 1))] = slot;
        }
    }
    __syncthreads();
    for (int place = threadIdx.x; place < g.rows; place += FEW_THREADS) {
        const uint32_t slot = arrays.places[place];
        d.group.groups.row_token[place] = slot / p.k;
        d.group.groups.row_slot[place] = slot;
    }
}

// Block 0 groups, the others make F32 rows of what came.
template <bool EXACT> DEVICE void arrive_few(const ArriveFew &d) {
    using V = Values<EXACT>;
    extern __shared__ uint32_t shared_words[];
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
    SlotsAhead slots;
    typename V::Packed early[EARLY]{};
    if (groups) {
        read_slots(d, 0, slots);
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
        auto *to = reinterpret_cast<typename V::Packed *>(result_for(c.messages, owner, p.rank, token));
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
    const bool mine = token < c.tokens.count, slots = EXACT && p.deterministic, normed = c.norm.normed || c.norm.plane;
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

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

// Four slots of one message, used or not, that lie side by side: on their way before anyone knows how many there are.
struct FourSlots {
    int sender, token, slot;  // of the first; sender -1: there are none
    uint4 ids;
};
DEVICE int fours_of_message(const ArriveFew &d) { return ceil_div(d.messages.carried * d.exchange.k, 4); }
DEVICE FourSlots locate_slots(const ArriveFew &d, int turn) {
    const ExchangeParams &p = d.exchange;
    const unsigned each = fours_of_message(d), four = turn * FEW_THREADS + threadIdx.x, sender = four / each;
    FourSlots s{-1, 0, 0, {}};
    if (sender >= static_cast<unsigned>(p.ranks)) return s;
    const unsigned first = (four - sender * each) * 4, token = first / p.k;
    s.sender = sender, s.token = token, s.slot = first - token * p.k;
    return s;
}
DEVICE FourSlots read_slots(const ArriveFew &d, int turn) {
    FourSlots s = locate_slots(d, turn);
    if (s.sender < 0) return s;
    const Message from = message_of(d.messages, s.sender, 0, d.exchange.k);
    s.ids = *reinterpret_cast<const uint4 *>(from.ids + s.token * d.exchange.k + s.slot);  // what is behind the last slot is room to sixteen bytes
    return s;
}

// What the block that groups has in shared memory.
constexpr int ROW_WORDS = 1024 / 32;
struct Grouping {
    uint2 holders[MAX_EXPERTS];  // of each expert the first two: the second says whether there are several
    int first[MAX_EXPERTS];      // where the rows of each local expert begin
    int2 scratch[MAX_EXPERTS / WARP];
    uint32_t several[ROW_WORDS];
};
// And of a size that depends on the step: marks [local experts][words], an expert's rows before each word of marks, the slots'
// experts in the order of `FourSlots`, and the grouped slots: row << 16 | slot.
struct GroupingArrays {
    uint32_t *tokens_of, *places;
    uint16_t *starts, *id_of;
    DEVICE GroupingArrays(const ArriveFew &d, uint2 *at) {
        const int words = d.group.experts * d.group.words, slots = d.exchange.ranks * fours_of_message(d) * 4;
        id_of = reinterpret_cast<uint16_t *>(at);
        places = reinterpret_cast<uint32_t *>(id_of + slots);
        tokens_of = places + slots;
        starts = reinterpret_cast<uint16_t *>(tokens_of + words);
    }
};
// Before anything has come.
DEVICE void start_grouping(const ArriveFew &d, Grouping &g, const GroupingArrays &arrays) {
    for (int i = threadIdx.x; i < d.group.experts * d.group.words; i += FEW_THREADS) arrays.tokens_of[i] = 0;
    if (threadIdx.x < ROW_WORDS) g.several[threadIdx.x] = 0;
}

// Which rows of all ranks are for experts here, grouped by expert. By one block, a barrier after `start_grouping`; `slots`: the
// first. The rows' own blocks keep what the combine needs of their slots.
DEVICE void group_messages(const ArriveFew &d, uint64_t exchange, const Heads &heads, FourSlots slots, Grouping &g,
                           const GroupingArrays &arrays) {
    const ExchangeParams &p = d.exchange;
    if (threadIdx.x < p.ranks) {
        p.counts[threadIdx.x] = heads.rows[threadIdx.x];
        p.loads[(exchange & 1) * MAX_RANKS + threadIdx.x] = heads.loads[threadIdx.x];
    }
    if (threadIdx.x == 0) p.state->open = exchange;
    const int turns = ceil_div(p.ranks * fours_of_message(d), FEW_THREADS);
    bool shared = false;
    for (int turn = 0; turn < turns; turn++) {
        if (turn > 0) slots = read_slots(d, turn);
        if (slots.sender < 0) continue;
        const uint32_t ids[4] = {slots.ids.x, slots.ids.y, slots.ids.z, slots.ids.w};
        uint32_t local[4];
        int token = slots.token, slot = slots.slot;
#pragma unroll
        for (int a = 0; a < 4; a++) {
            const int row = slots.sender * p.few_tokens + token;
            local[a] = 0xffffu;
            if (token < heads.rows[slots.sender]) {
                const uint2 held = ids[a] < MAX_EXPERTS ? g.holders[ids[a]] : make_uint2(ABSENT, ABSENT);
                const uint32_t id = held.x & 0xffffu;
                if (held.y != ABSENT) {
                    atomicOr(&g.several[row / 32], 1u << (row % 32));
                    shared = true;
                } else if (held.x != ABSENT && static_cast<int>(held.x >> 16) == p.rank && id < static_cast<uint32_t>(d.group.experts)) {
                    local[a] = id;
                    mark_row(arrays.tokens_of, d.group.words, id, row);
                }
            }
            if (++slot == p.k) slot = 0, token++;
        }
        reinterpret_cast<uint2 *>(arrays.id_of)[turn * FEW_THREADS + threadIdx.x] = make_uint2(local[0] | local[1] << 16, local[2] | local[3] << 16);
    }
    if (__syncthreads_or(shared)) {
        // Rows with an expert that several ranks hold: a warp each.
        const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31;
        for (int row = warp; row < p.ranks * p.few_tokens; row += FEW_THREADS / WARP) {
            if (!(g.several[row / 32] >> (row % 32) & 1)) continue;
            const int sender = row / p.few_tokens, token = row % p.few_tokens;
            int rank;
            uint32_t local;
            choose_for(p, d.layer, message_of(d.messages, sender, 0, p.k), sender, token, exchange, lane, rank, local);
            if (lane >= p.k) continue;
            uint16_t &id = arrays.id_of[sender * fours_of_message(d) * 4 + token * p.k + lane];
            // Slots of experts that one rank holds are marked already.
            if (local >= static_cast<uint32_t>(d.group.experts) || id != 0xffffu) continue;
            id = local;
            mark_row(arrays.tokens_of, d.group.words, local, row);
        }
        __syncthreads();
    }
    const int expert = threadIdx.x;
    int rows = 0;
    if (expert < d.group.experts) {
#pragma unroll 4
        for (int w = expert * d.group.words; w < (expert + 1) * d.group.words; w++) {
            const int more = __popc(arrays.tokens_of[w]);
            arrays.starts[w] = rows, rows += more;
        }
    }
    const int pieces = ceil_div(rows, GROUP_ROWS);
    int2 total;
    const int2 at = scan_pairs(rows, pieces, g.scratch, total);
    if (expert < MAX_EXPERTS) g.first[expert] = at.x;
    if (expert == 0) *d.group.groups.count = total.y, *d.group.rows = total.x;
#pragma unroll 1
    for (int piece = 0; piece < pieces; piece++)
        d.group.groups.group[at.y + piece] = {expert, at.x + piece * GROUP_ROWS, min(GROUP_ROWS, rows - piece * GROUP_ROWS), 0};
    __syncthreads();
    for (int turn = 0; turn < turns; turn++) {
        if (turns > 1) slots = locate_slots(d, turn);
        if (slots.sender < 0) continue;
        const uint2 packed = reinterpret_cast<const uint2 *>(arrays.id_of)[turn * FEW_THREADS + threadIdx.x];
        const uint32_t local[4] = {packed.x & 0xffffu, packed.x >> 16, packed.y & 0xffffu, packed.y >> 16};
        int token = slots.token, slot = slots.slot;
#pragma unroll
        for (int a = 0; a < 4; a++) {
            if (local[a] != 0xffffu) {
                const uint32_t row = slots.sender * p.few_tokens + token, word = local[a] * d.group.words + row / 32;
                const int before = arrays.starts[word] + __popc(arrays.tokens_of[word] & ((1u << row % 32) - 1));
                arrays.places[g.first[local[a]] + before] = row << 16 | (row * p.k + slot);
            }
            if (++slot == p.k) slot = 0, token++;
        }
    }
    __syncthreads();
    for (int place = threadIdx.x; place < total.x; place += FEW_THREADS) {
        const uint32_t both = arrays.places[place];
        d.group.groups.row_token[place] = both >> 16;
        d.group.groups.row_slot[place] = both & 0xffffu;
    }
}

// What the combine needs of a row's slots. By one warp.
DEVICE void keep_slots(const ArriveFew &d, uint64_t exchange, int sender, int token) {
    const ExchangeParams &p = d.exchange;
    const int lane = threadIdx.x & 31, at = (sender * p.few_tokens + token) * p.k + lane;
    const Message from = message_of(d.messages, sender, 0, p.k);
    int rank;
    uint32_t local;
    float weight = 0.f;
    if (lane < p.k) weight = from.weights[token * p.k + lane];
    choose_for(p, d.layer, from, sender, token, exchange, lane, rank, local);
    if (lane >= p.k) return;
    p.ids[at] = local < static_cast<uint32_t>(d.group.experts) ? local : ABSENT, p.weights[at] = weight;
    if (sender == p.rank) p.owner[token * p.k + lane] = rank < 0 ? 0 : rank;
}

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

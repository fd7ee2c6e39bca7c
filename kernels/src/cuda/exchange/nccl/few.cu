// The exchange of up to 128 tokens a rank over NCCL: what a rank makes of what all say, its results, their sum. Rows travel as
// F32 or BF16; sums are those of ../few_combine.cu, in the same order.
// Bytes: every row is written once, and read once by each rank.
#include "../../../ops/rmsnorm/rows.cuh"
#include "../group.cuh"
#include "messages.cuh"
#include "values.cuh"

constexpr int FEW_THREADS = 512;

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

// Slots of all messages, used or not, and who holds their experts: on their way before anyone knows how many there are. A
// thread has the same slot of several rows.
constexpr int SLOTS_AHEAD = 4;
struct SlotsAhead {
    int slot, sender[SLOTS_AHEAD], token[SLOTS_AHEAD];  // sender: -1 beyond the last
    uint32_t id[SLOTS_AHEAD];
    float weight[SLOTS_AHEAD];
    uint2 held[SLOTS_AHEAD];  // the first two owners: the second says whether there are several
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
#pragma unroll
    for (int a = 0; a < SLOTS_AHEAD; a++)
        if (s.sender[a] >= 0) s.held[a] = first_owners(p, d.layer, s.id[a]);
}

// Which rows of all ranks are for experts here, grouped by expert. By one block; `slots`: the first.
DEVICE void group_messages(const ArriveFew &d, uint64_t exchange, const Heads &heads, SlotsAhead &slots, uint32_t *tokens_of) {
    constexpr int ROW_WORDS = 1024 / 32;
    const ExchangeParams &p = d.exchange;
    __shared__ uint32_t several[ROW_WORDS];
    // Where the rows of each word of marks begin; the slots' experts.
    uint16_t *starts = reinterpret_cast<uint16_t *>(tokens_of + d.group.experts * d.group.words);
    uint16_t *id_of = starts + d.group.experts * d.group.words;
    if (threadIdx.x < ROW_WORDS) several[threadIdx.x] = 0;
    if (threadIdx.x < p.ranks) {
        p.counts[threadIdx.x] = heads.rows[threadIdx.x];
        p.loads[(exchange & 1) * MAX_RANKS + threadIdx.x] = heads.loads[threadIdx.x];
    }
    if (threadIdx.x == 0) p.state->open = exchange;
    __syncthreads();
    const auto keep = [&](int sender, int token, int slot, int rank, uint32_t local, float weight) {
        const int row = sender * p.few_tokens + token, at = row * p.k + slot;
        if (local >= static_cast<uint32_t>(d.group.experts)) local = ABSENT;
        p.ids[at] = local, p.weights[at] = weight, id_of[at] = local;
        if (sender == p.rank) p.owner[token * p.k + slot] = rank < 0 ? 0 : rank;
        if (local != ABSENT) mark_row(tokens_of, d.group.words, local, row);
    };
    bool shared = false;
    const int turns = ceil_div(p.ranks * d.messages.carried, FEW_THREADS / p.k * SLOTS_AHEAD);
    for (int turn = 0; turn < turns; turn++) {
        if (turn > 0) read_slots(d, turn, slots);
#pragma unroll
        for (int a = 0; a < SLOTS_AHEAD; a++) {
            const int sender = slots.sender[a], token = slots.token[a];
            if (sender < 0 || token >= heads.rows[sender]) continue;
            const uint2 held = slots.held[a];
            if (held.y != ABSENT) {
                const int row = sender * p.few_tokens + token;
                atomicOr(&several[row / 32], 1u << (row % 32));
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
            if (!(several[row / 32] >> (row % 32) & 1)) continue;
            const int sender = row / p.few_tokens, token = row % p.few_tokens;
            const Message from = message_of(d.messages, sender, 0, p.k);
            int rank;
            uint32_t local;
            choose_for(p, d.layer, from, sender, token, exchange, lane, rank, local);
            if (lane < p.k) keep(sender, token, lane, rank, local, from.weights[token * p.k + lane]);
        }
        __syncthreads();
    }
    int begin = make_groups(d.group, tokens_of);
    if (threadIdx.x < d.group.experts)
        for (int w = threadIdx.x * d.group.words; w < (threadIdx.x + 1) * d.group.words; w++) starts[w] = begin, begin += __popc(tokens_of[w]);
    __syncthreads();
    for (int turn = 0; turn < turns; turn++) {
        if (turns > 1) locate_slots(d, turn, slots);
#pragma unroll
        for (int a = 0; a < SLOTS_AHEAD; a++) {
            const int sender = slots.sender[a], token = slots.token[a];
            if (sender < 0 || token >= heads.rows[sender]) continue;
            const uint32_t row = sender * p.few_tokens + token, slot = row * p.k + slots.slot, id = id_of[slot];
            if (id == 0xffffu) continue;
            const uint32_t word = id * d.group.words + row / 32;
            const uint32_t place = starts[word] + __popc(tokens_of[word] & ((1u << row % 32) - 1));
            d.group.groups.row_token[place] = row;
            d.group.groups.row_slot[place] = slot;
        }
    }
}

// Block 0 groups, the others make F32 rows of what came.
template <bool EXACT> DEVICE void arrive_few(const ArriveFew &d) {
    using V = Values<EXACT>;
    extern __shared__ uint32_t tokens_of[];  // [local experts][words], as many half words, the slots' experts as half words
    __shared__ Heads heads;
    const ExchangeParams &p = d.exchange;
    if (blockIdx.x == 0)
        for (int i = threadIdx.x; i < d.group.experts * d.group.words; i += FEW_THREADS) tokens_of[i] = 0;
    wait_for_inputs();
    allow_next_kernel();
    const uint64_t exchange = p.state->begun + 1;
    SlotsAhead slots;
    if (blockIdx.x == 0) read_slots(d, 0, slots);
    if (!read_heads(p, d.messages, min(d.messages.carried, p.few_tokens), exchange, heads, blockIdx.x == 0)) {
        if (blockIdx.x > 0) return;
        if (threadIdx.x == 0) *d.group.groups.count = 0, p.state->open = exchange;
        if (threadIdx.x < p.ranks) p.counts[threadIdx.x] = 0;
        return;
    }
    if (blockIdx.x == 0) return group_messages(d, exchange, heads, slots, tokens_of);
    const int units = p.hidden / V::COUNT;
    for (int n = blockIdx.x - 1; n < p.ranks * d.messages.carried; n += gridDim.x - 1) {
        const int sender = n % p.ranks, token = n / p.ranks;
        if (token >= heads.rows[sender]) continue;
        const Message from = message_of(d.messages, sender, 0, p.k);
        const uint4 *row = reinterpret_cast<const uint4 *>(from.rows + static_cast<size_t>(token) * d.messages.row_bytes);
        float *to = d.x + static_cast<size_t>(sender * p.few_tokens + token) * p.hidden;
        for (int u = threadIdx.x; u < units; u += FEW_THREADS) {
            float v[V::COUNT];
            V::unpack(row[u], v);
            V::write(to + u * V::COUNT, v);
        }
    }
}

// The weighted sum of each row's slots here, or in deterministic mode each slot, for the row's owner: a block a row.
template <bool EXACT> DEVICE void return_few(const ReturnFew &c) {
    using V = Values<EXACT>;
    constexpr int AHEAD = EXACT ? 8 : 4;
    const ExchangeParams &p = c.exchange;
    __shared__ uint32_t ids[MAX_TOP_K];
    __shared__ float weights[MAX_TOP_K];
    __shared__ int counts[MAX_RANKS];
    wait_for_inputs();
    allow_next_kernel();
    const uint64_t exchange = p.state->open;
    if (threadIdx.x < p.ranks) counts[threadIdx.x] = p.counts[threadIdx.x];
    const auto read_slots = [&](int n) {
        const int row = n % p.ranks * p.few_tokens + n / p.ranks;
        if (threadIdx.x < p.k) ids[threadIdx.x] = p.ids[row * p.k + threadIdx.x], weights[threadIdx.x] = p.weights[row * p.k + threadIdx.x];
    };
    read_slots(blockIdx.x);  // there are no more blocks than rows
    if (__syncthreads_or(failed(p))) return;
    if (blockIdx.x == 0) stamp_results(p, c.messages, exchange);
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
        uint4 *to = reinterpret_cast<uint4 *>(result_for(c.messages, owner, p.rank, token));
        const float *y = c.y + static_cast<size_t>(row) * p.k * p.hidden;
        for (int u = threadIdx.x; u < units; u += FEW_THREADS) {
            float sum[V::COUNT] = {};
            for (unsigned rest = present; rest;) {
                float v[AHEAD][V::COUNT];
                int slot[AHEAD];
#pragma unroll
                for (int a = 0; a < AHEAD; a++) {
                    slot[a] = rest ? __ffs(rest) - 1 : -1;
                    rest &= rest - 1;
                    if (slot[a] >= 0) V::read(y + static_cast<size_t>(slot[a]) * p.hidden + u * V::COUNT, v[a]);
                }
#pragma unroll
                for (int a = 0; a < AHEAD; a++) {
                    if (slot[a] < 0) continue;
                    if (EXACT && p.deterministic) {
                        to[slot[a] * units + u] = V::pack(v[a]);
                        continue;
                    }
                    const float w = weights[slot[a]];
#pragma unroll
                    for (int i = 0; i < V::COUNT; i++) sum[i] = fmaf(w, v[a][i], sum[i]);
                }
            }
            if (!(EXACT && p.deterministic)) to[u] = V::pack(sum);
        }
    }
}

// What came back for this rank's tokens, added in the order of ranks or of slots, and the next norm: a block a token.
template <bool EXACT, int PAIRS> DEVICE void sum_few(const SumFew &c) {
    using V = Values<EXACT>;
    constexpr int AHEAD = 4;
    extern __shared__ __align__(16) float row_sum[];  // [hidden]
    __shared__ float scratch[NORM_THREADS / WARP], weight[MAX_TOP_K];
    __shared__ int owner[MAX_TOP_K];
    const ExchangeParams &p = c.exchange;
    const int token = blockIdx.x;
    wait_for_inputs();
    allow_next_kernel();
    const uint64_t exchange = p.state->open;
    if (token < c.tokens.count && threadIdx.x < p.k) {
        owner[threadIdx.x] = p.owner[token * p.k + threadIdx.x];
        weight[threadIdx.x] = c.tokens.weights[token * p.k + threadIdx.x];
    }
    float2 v[PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int k = 2 * (threadIdx.x + i * NORM_THREADS);
        v[i] = make_float2(0.f, 0.f);
        if (token < c.tokens.count && k < p.hidden)
            v[i] = *reinterpret_cast<const float2 *>(c.norm.input.x0 + static_cast<size_t>(token) * p.hidden + k);
    }
    const bool good = results_came(p, c.messages, exchange, token == 0);
    if (token == 0 && threadIdx.x == 0) p.state->begun = exchange;
    if (token >= c.tokens.count) return;
    const int units = p.hidden / V::COUNT;
    const bool slots = EXACT && p.deterministic;
    uint64_t from = 0;
    if (slots)
        from = (1ull << p.k) - 1;
    else
        for (int j = 0; j < p.k; j++) from |= 1ull << owner[j];
    for (int u = threadIdx.x; u < units && good; u += FEW_THREADS) {
        float sum[V::COUNT] = {};
        for (uint64_t rest = from; rest;) {
            uint4 packed[AHEAD];
            int index[AHEAD];
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                index[a] = rest ? __ffsll(rest) - 1 : -1;
                rest &= rest - 1;
                if (index[a] < 0) continue;
                const uint8_t *row = result_of(c.messages, slots ? owner[index[a]] : index[a], token);
                packed[a] = reinterpret_cast<const uint4 *>(row)[(slots ? index[a] * units : 0) + u];
            }
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                if (index[a] < 0) continue;
                float one[V::COUNT];
                V::unpack(packed[a], one);
#pragma unroll
                for (int e = 0; e < V::COUNT; e++) sum[e] = slots ? fmaf(weight[index[a]], one[e], sum[e]) : sum[e] + one[e];
            }
        }
        V::write(row_sum + u * V::COUNT, sum);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int k = 2 * (threadIdx.x + i * NORM_THREADS);
        if (k >= p.hidden) continue;
        if (good) v[i].x += row_sum[k], v[i].y += row_sum[k + 1];
        *reinterpret_cast<float2 *>(c.norm.input.sum_out + static_cast<size_t>(token) * p.hidden + k) = v[i];
    }
    if (c.norm.normed || c.norm.plane) finish_row(c.norm, token, v, scratch);
}

#define FEW(NAME, EXACT)                                                                                                               \
    extern "C" __global__ void __launch_bounds__(FEW_THREADS, 1) nccl_arrive_##NAME(const __grid_constant__ ArriveFew d) {                 \
        arrive_few<EXACT>(d);                                                                                                          \
    }                                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(FEW_THREADS) nccl_return_##NAME(const __grid_constant__ ReturnFew c) { return_few<EXACT>(c); }
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

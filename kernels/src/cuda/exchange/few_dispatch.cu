// Few tokens, there, one kernel: block 0 waits for what comes and groups it by expert; the others choose the experts of this
// rank's tokens, send their rows, then unpack what comes into F32 rows.
#include "../gemv.cuh"
#include "few.cuh"
#include "group.cuh"

struct DispatchFew {
    ExchangeParams exchange;
    ExchangeTokens tokens;
    const float *normed;  // [count, hidden]; the kernels of NORM, which also choose: from `norm`, at most INLINE_WIDTH values
    float *x;             // [ranks * few_tokens, hidden]
    GroupRows group;
    RouteParams route;    // the gate's logits, for sigmoid; none: the choice of experts has been made
    uint32_t *ids;        // where the choice goes: those of `tokens`
    float *weights;
    NormInput norm;
};

DEVICE int meta_units(int k) { return (k + 1) / 2; }

// One warp more than move rows: the scout, who learns what is to come.
constexpr int DISPATCH_THREADS = FEW_THREADS + WARP, MOST_METAS = MAX_TOP_K / 2;

// Places of arrivals are dealt to blocks by token, then rank, so that few tokens of many ranks spread.
struct Place {
    int rank, token;
};
DEVICE Place place_of(const ExchangeParams &p, int n) { return {n % p.ranks, n / p.ranks}; }
DEVICE int row_of(const ExchangeParams &p, const Place &at) { return at.rank * p.few_tokens + at.token; }

enum Verdict { UNKNOWN, NO_ROW, ROW, GAVE_UP };

// What the scout's block knows: tokens of each rank (-1: not yet), and whether the block's first place gets a row.
struct Scouted {
    int counts[MAX_RANKS];
    int verdict;
};

// By the scout. Lanes 0 to 7 poll the slots of the block's first place, if it has one, the others the headers of all
// ranks.
DEVICE void scout(const ExchangeParams &p, uint64_t exchange, const Place &first, bool has_place, volatile Scouted &known) {
    constexpr int HEADERS = WARP - MOST_METAS;
    const int lane = threadIdx.x & 31, metas = meta_units(p.k);
    const uint8_t *area = p.area[p.rank];
    const uint32_t stamp = small_stamp(exchange);
    const bool reads_meta = lane < MOST_METAS;
    int rank = reads_meta ? first.rank : lane - MOST_METAS;
    bool open = reads_meta ? has_place && lane < metas : rank < p.ranks, decided = !has_place;
    bool wanted = false, good = true;
    const uint8_t *meta = area + p.at.few_meta + (static_cast<size_t>(row_of(p, first)) * metas + lane) * sizeof(Unit);
    Patience patience;
    while (__any_sync(ALL_LANES, open)) {
        if (open) {
            const Unit u = load_unit(reads_meta ? meta : area + p.at.few_header + rank * sizeof(Unit));
            if (reads_meta && u.stamp == stamp) {
                wanted = u.a != 0xffffffffu, open = false;
            } else if (!reads_meta && header_stamp(u) == exchange) {
                if (u.a > static_cast<uint32_t>(p.few_tokens)) {
                    fail(p, COUNT, rank, exchange);
                    good = open = false;
                } else {
                    known.counts[rank] = u.a;
                    if (blockIdx.x == 0) p.counts[rank] = u.a, p.loads[(exchange & 1) * MAX_RANKS + rank] = u.b;
                    rank += HEADERS;
                    open = rank < p.ranks;
                }
            } else if (!patience.wait(p, DISPATCH_DEADLINE, rank, exchange)) {
                good = open = false;
            }
        }
        __syncwarp();
        if (!decided) {
            const int count = known.counts[first.rank];
            const bool none = count >= 0 && first.token >= count;
            if (none && reads_meta) open = false;
            const bool slots_known = !__any_sync(ALL_LANES, reads_meta && open);
            const bool any = __any_sync(ALL_LANES, wanted);
            decided = none || slots_known;
            if (decided && lane == 0) known.verdict = !none && any ? ROW : NO_ROW;
        }
    }
    if (__any_sync(ALL_LANES, !good) && lane == 0) known.verdict = GAVE_UP;
}

// Where a token goes, as all threads of a block see it.
struct Sending {
    uint32_t local_of[MAX_TOP_K];
    int rank_of[MAX_TOP_K];
    float weight_of[MAX_TOP_K];
    uint64_t ranks;
};

// Values that a thread holds of a row that is to be sent.
template <bool EXACT> struct RowPart {
    static constexpr int VALUES = Packing<EXACT>::VALUES, AHEAD = EXACT ? 2 : 1;
    float v[AHEAD][VALUES];

    static DEVICE void read(const ExchangeParams &p, const float *from, int u, float (&to)[VALUES]) {
        Packing<EXACT>::load(from, u, ceil_div(p.hidden, VALUES), p.hidden, to);
    }

    DEVICE void read(const ExchangeParams &p, const float *from) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) read(p, from, threadIdx.x + i * FEW_THREADS, v[i]);
    }

    DEVICE void add(const RowPart &other) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
#pragma unroll
            for (int e = 0; e < VALUES; e++) v[i][e] += other.v[i][e];
    }

    // Of the values that no other thread has.
    DEVICE float squares(int units) const {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (static_cast<int>(threadIdx.x) + i * FEW_THREADS >= units) continue;
#pragma unroll
            for (int e = 0; e < VALUES; e++) sum += v[i][e] * v[i][e];
        }
        return sum;
    }

    DEVICE void scale(const RowPart &weight, float factor) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
#pragma unroll
            for (int e = 0; e < VALUES; e++) v[i][e] = v[i][e] * factor * weight.v[i][e];
    }
};

// What a token's experts are chosen from, the choice, and sums of squares for its norm.
struct Choosing {
    float score[MAX_EXPERTS];
    uint32_t most[MAX_EXPERTS / WARP];  // of each warp's experts, as `ordered`
    uint2 candidate[MAX_EXPERTS];       // choice as `ordered`, expert
    int candidates;
    uint32_t id[WARP];
    float weight[WARP], squares[FEW_THREADS / WARP];
};

// Scores of a token's experts, one a thread of the first MAX_EXPERTS: what the choice goes by, 0 for those that there are not.
DEVICE uint32_t score_token(const RouteParams &p, int token, Choosing &choosing) {
    const int e = threadIdx.x;
    uint32_t key = 0;
    if (e < p.experts) {
        const float *from = p.logits + static_cast<size_t>(token) * p.experts + e;
        const size_t stride = static_cast<size_t>(p.tokens) * p.experts;
        float z = 0.f;
#pragma unroll 8
        for (int part = 0; part < p.parts; part++) z += __ldcg(from + part * stride);
        const float s = 1.f / (1.f + expf(-z));
        choosing.score[e] = s;
        key = ordered(s + (p.bias ? p.bias[e] : 0.f));
    }
    const uint32_t most = __reduce_max_sync(ALL_LANES, key);
    if (e % WARP == 0) choosing.most[e / WARP] = most;
    return key;
}

// The experts that can be among the k best, of at least k groups those that are no worse than the worst group's best; by the
// threads that scored.
DEVICE void list_candidates(const RouteParams &p, uint32_t key, Choosing &choosing) {
    const int e = threadIdx.x, groups = ceil_div(p.experts, WARP);
    uint32_t least = 0;
    if (groups >= p.k) {
        least = choosing.most[0];
        for (int g = 1; g < groups; g++) least = min(least, choosing.most[g]);
    }
    const bool can = e < p.experts && key >= least;
    const unsigned all = __ballot_sync(ALL_LANES, can);
    int first = 0;
    if (e % WARP == 0 && all) first = atomicAdd(&choosing.candidates, __popc(all));
    first = __shfl_sync(ALL_LANES, first, 0);
    if (can) choosing.candidate[first + __popc(all & ((1u << e % WARP) - 1))] = make_uint2(key, e);
}

// The k best, best first, the lower expert first among equals, by the scout; as `choose_experts` does it.
DEVICE void choose_candidates(const DispatchFew &d, int token, Choosing &choosing) {
    const int lane = threadIdx.x & 31, k = d.route.k, count = choosing.candidates;
#pragma unroll 1
    for (int c = lane; c < count; c += WARP) {
        const uint2 mine = choosing.candidate[c];
        int better = 0;
#pragma unroll 4
        for (int i = 0; i < count; i++) {
            const uint2 other = choosing.candidate[i];
            better += other.x > mine.x || other.x == mine.x && other.y < mine.y;
        }
        if (better < k) choosing.id[better] = mine.y, choosing.weight[better] = choosing.score[mine.y];
    }
    __syncwarp();
    float weight = lane < k ? choosing.weight[lane] : 0.f, total = 0.f;
    for (int j = 0; j < k; j++) total += choosing.weight[j];
    if (d.route.renormalize) weight = weight / total;
    __syncwarp();
    if (lane < k) {
        choosing.weight[lane] = weight;
        d.ids[token * k + lane] = choosing.id[lane], d.weights[token * k + lane] = weight;
    }
}

// Requests a token's row and finds its destinations, the scout those; nobody waits for the other. A barrier must follow.
template <bool EXACT, bool NORM>
DEVICE void prepare_token(const DispatchFew &d, uint64_t exchange, int token, Sending &sending, RowPart<EXACT> &part, Choosing &choosing) {
    const ExchangeParams &p = d.exchange;
    const size_t row = static_cast<size_t>(token) * p.hidden;
    const int lane = threadIdx.x & 31;
    const bool scouts = threadIdx.x >= FEW_THREADS;
    RowPart<EXACT> more, weight;
    if (!scouts) {
        part.read(p, (NORM ? d.norm.x0 : d.normed) + row);
        if (NORM) more.read(p, d.norm.x1 + row), weight.read(p, d.norm.weight);
    }
    if (d.route.logits) {
        uint32_t key = 0;
        if (threadIdx.x < MAX_EXPERTS) key = score_token(d.route, token, choosing);
        if (threadIdx.x == 0) choosing.candidates = 0;
        if (NORM && !scouts) {
            part.add(more);
            const float squares = warp_sum(part.squares(ceil_div(p.hidden, RowPart<EXACT>::VALUES)));
            if (lane == 0) choosing.squares[threadIdx.x / WARP] = squares;
        }
        __syncthreads();
        if (threadIdx.x < MAX_EXPERTS) list_candidates(d.route, key, choosing);
        __syncthreads();
    }
    if (scouts) {
        if (d.route.logits) {
            choose_candidates(d, token, choosing);
        } else if (lane < p.k) {
            const int slot = token * p.k + lane;
            choosing.id[lane] = d.tokens.ids[slot], choosing.weight[lane] = d.tokens.weights[slot];
        }
        const Destinations to = choose_ranks(p, d.tokens.layer, token, choosing.id[lane], choosing.weight[lane], exchange, lane);
        if (lane < p.k) sending.rank_of[lane] = to.rank, sending.local_of[lane] = to.local, sending.weight_of[lane] = to.weight;
        if (lane == 0) sending.ranks = to.mask;
    } else if (NORM) {
        float total = 0.f;
#pragma unroll
        for (int w = 0; w < FEW_THREADS / WARP; w++) total += choosing.squares[w];
        part.scale(weight, rsqrtf(total / d.norm.k + d.norm.eps));
    }
}

template <bool EXACT>
DEVICE void send_token(const DispatchFew &d, uint64_t exchange, int token, const Sending &sending, const RowPart<EXACT> &part) {
    constexpr int VALUES = Packing<EXACT>::VALUES, AHEAD = RowPart<EXACT>::AHEAD;
    const ExchangeParams &p = d.exchange;
    const uint32_t stamp = small_stamp(exchange);
    const int units = ceil_div(p.hidden, VALUES), metas = meta_units(p.k);
    // The scout's share first: who waits for the row wants to know of it.
    for (int i = DISPATCH_THREADS - 1 - static_cast<int>(threadIdx.x); i < p.ranks * metas; i += DISPATCH_THREADS) {
        const int to = i / metas, slot = i % metas * 2, row = p.rank * p.few_tokens + token;
        uint32_t ids = 0xffffffffu;
        if (sending.rank_of[slot] == to) ids = (ids & 0xffff0000u) | sending.local_of[slot];
        if (slot + 1 < p.k && sending.rank_of[slot + 1] == to) ids = (ids & 0xffffu) | sending.local_of[slot + 1] << 16;
        const uint32_t second = slot + 1 < p.k ? __float_as_uint(sending.weight_of[slot + 1]) : 0;
        store_unit(p.area[to] + p.at.few_meta + (static_cast<size_t>(row) * metas + slot / 2) * sizeof(Unit),
                   {ids, __float_as_uint(sending.weight_of[slot]), second, stamp});
    }
    if (threadIdx.x >= FEW_THREADS) return;
    const auto write = [&](int u, const float (&x)[VALUES]) {
        const Unit unit = Packing<EXACT>::pack(x, stamp);
        for (uint64_t rest = sending.ranks; rest; rest &= rest - 1) {
            const int to = __ffsll(rest) - 1, row = p.rank * p.few_tokens + token;
            store_unit(p.area[to] + p.at.few_rows + (static_cast<size_t>(row) * units + u) * sizeof(Unit), unit);
        }
    };
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        if (static_cast<int>(threadIdx.x) + i * FEW_THREADS < units) write(threadIdx.x + i * FEW_THREADS, part.v[i]);
    for (int u = threadIdx.x + AHEAD * FEW_THREADS; u < units; u += FEW_THREADS) {
        float x[VALUES];
        RowPart<EXACT>::read(p, d.normed + static_cast<size_t>(token) * p.hidden, u, x);
        write(u, x);
    }
}

// One row that came, or comes, for experts here, as F32; by all but the scout. Until the verdict is known, if there is
// doubt, it may not come at all. False: gave up.
template <bool EXACT>
DEVICE bool unpack_row(const DispatchFew &d, uint64_t exchange, const Place &at, const volatile int *verdict) {
    constexpr int VALUES = Packing<EXACT>::VALUES;
    const ExchangeParams &p = d.exchange;
    const uint32_t stamp = small_stamp(exchange);
    const int units = ceil_div(p.hidden, VALUES), row = row_of(p, at);
    const uint8_t *from = p.area[p.rank] + p.at.few_rows + static_cast<size_t>(row) * units * sizeof(Unit);
    float *to = d.x + static_cast<size_t>(row) * p.hidden;
    for (int u = threadIdx.x; u < units; u += FEW_THREADS) {
        Patience patience;
        Unit unit = load_unit(from + u * sizeof(Unit));
        while (unit.stamp != stamp) {
            if (verdict && *verdict == NO_ROW) return true;
            if (verdict && *verdict == GAVE_UP || !patience.wait(p, DISPATCH_DEADLINE, at.rank, exchange)) return false;
            unit = load_unit(from + u * sizeof(Unit));
        }
        float v[VALUES];
        Packing<EXACT>::unpack(unit, v);
        Packing<EXACT>::store(to, u, units, p.hidden, v);
    }
    return true;
}

template <bool EXACT, bool TRACED> DEVICE void receive_rows(const DispatchFew &d, uint64_t exchange, int first, int step, volatile Scouted &known) {
    const ExchangeParams &p = d.exchange;
    const Place place = place_of(p, first);
    const bool has_place = place.token < p.few_tokens;
    if (threadIdx.x >= FEW_THREADS)
        scout(p, exchange, place, has_place, known);
    else if (has_place)
        unpack_row<EXACT>(d, exchange, place, &known.verdict);
    __syncthreads();
    mark<TRACED>(p, TRACED_DISPATCH, exchange, 4);
    if (known.verdict == GAVE_UP) return;
    int most = 0;
    for (int r = 0; r < p.ranks; r++) most = max(most, known.counts[r]);
    if (threadIdx.x >= FEW_THREADS) return;
    // Each warp finds out for itself whether a row comes: no barriers between places.
    const int metas = meta_units(p.k), lane = threadIdx.x & 31;
    for (int n = first + step; n / p.ranks < most; n += step) {
        const Place at = place_of(p, n);
        if (at.token >= known.counts[at.rank]) continue;
        bool wanted = false, good = true;
        if (lane < metas) {
            Unit u;
            good = await_unit(p, p.area[p.rank] + p.at.few_meta + (static_cast<size_t>(row_of(p, at)) * metas + lane) * sizeof(Unit),
                              small_stamp(exchange), DISPATCH_DEADLINE, at.rank, exchange, u);
            wanted = good && u.a != 0xffffffffu;
        }
        if (__any_sync(ALL_LANES, wanted)) good = unpack_row<EXACT>(d, exchange, at, nullptr) && good;
        if (__any_sync(ALL_LANES, !good)) return;
    }
}

// Waits for the slots of all tokens and groups them. Block 0.
template <bool TRACED> DEVICE void group_arrivals(const DispatchFew &d, uint64_t exchange, volatile Scouted &known, uint32_t *tokens_of, uint16_t *id_of) {
    const ExchangeParams &p = d.exchange;
    const uint32_t stamp = small_stamp(exchange);
    const int metas = meta_units(p.k);
    bool good = true;
    if (threadIdx.x >= FEW_THREADS) {
        scout(p, exchange, {0, 0}, false, known);
        good = known.verdict != GAVE_UP;
    } else {
        for (int i = threadIdx.x; i < p.ranks * p.few_tokens * metas && good; i += FEW_THREADS) {
            const Place at = place_of(p, i / metas);
            const int row = row_of(p, at), slot = i % metas * 2;
            const uint8_t *from = p.area[p.rank] + p.at.few_meta + (static_cast<size_t>(row) * metas + slot / 2) * sizeof(Unit);
            Patience patience;
            Unit u{};
            bool there = true;
            while (true) {
                const int count = known.counts[at.rank];
                there = count < 0 || at.token < count;
                if (!there) break;
                u = load_unit(from);
                if (u.stamp == stamp) break;
                good = patience.wait(p, DISPATCH_DEADLINE, at.rank, exchange);
                if (!good) break;
            }
            if (!there || !good) continue;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                if (slot + j >= p.k) break;
                uint32_t id = j ? u.a >> 16 : u.a & 0xffffu;
                if (id >= static_cast<uint32_t>(d.group.experts)) id = ABSENT;
                const size_t to = static_cast<size_t>(row) * p.k + slot + j;
                p.ids[to] = id, p.weights[to] = __uint_as_float(j ? u.c : u.b);
                id_of[to] = id;
                if (id != ABSENT) mark_row(tokens_of, d.group.words, id, row);
            }
        }
    }
    if (!__syncthreads_and(good)) {
        if (threadIdx.x == 0) *d.group.groups.count = 0;
        if (threadIdx.x < p.ranks) p.counts[threadIdx.x] = 0;
        return;
    }
    if (!p.alone) allow_next_kernel();
    mark<TRACED>(p, TRACED_DISPATCH, exchange, 4);
    __shared__ int counts[MAX_RANKS];
    if (threadIdx.x < p.ranks) counts[threadIdx.x] = known.counts[threadIdx.x];
    __syncthreads();
    finish_groups(d.group, counts, p.ranks, p.few_tokens, p.k,
                  [&](uint32_t slot) { return id_of[slot] == 0xffffu ? ABSENT : id_of[slot]; }, tokens_of);
}

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
    __shared__ Choosing choosing;
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

// Few tokens, there, one kernel: block 0 waits for what comes and groups it by expert; the others send this rank's rows, then
// unpack what comes into F32 rows.
#include "few.cuh"
#include "group.cuh"

struct DispatchFew {
    ExchangeParams exchange;
    ExchangeTokens tokens;
    const float *normed;  // [count, hidden]
    float *x;             // [ranks * few_tokens, hidden]
    GroupRows group;
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
};

// Requests a token's row and finds its destinations, the scout those; nobody waits for the other. A barrier must follow.
template <bool EXACT>
DEVICE void prepare_token(const DispatchFew &d, uint64_t exchange, int token, Sending &sending, RowPart<EXACT> &part) {
    const ExchangeParams &p = d.exchange;
    if (threadIdx.x >= FEW_THREADS) {
        const int lane = threadIdx.x & 31;
        const Destinations to = choose_ranks(p, d.tokens, token, exchange, lane);
        if (lane < p.k) sending.rank_of[lane] = to.rank, sending.local_of[lane] = to.local, sending.weight_of[lane] = to.weight;
        if (lane == 0) sending.ranks = to.mask;
        return;
    }
    const float *from = d.normed + static_cast<size_t>(token) * p.hidden;
#pragma unroll
    for (int i = 0; i < RowPart<EXACT>::AHEAD; i++) RowPart<EXACT>::read(p, from, threadIdx.x + i * FEW_THREADS, part.v[i]);
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

template <bool EXACT, bool TRACED> DEVICE void dispatch_few(const DispatchFew &d) {
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
    RowPart<EXACT> part;
    if (blockIdx.x > 0 && token < d.tokens.count) prepare_token<EXACT>(d, exchange, token, sending, part);
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
        prepare_token<EXACT>(d, exchange, token, sending, part);
        __syncthreads();
    }
    mark<TRACED>(p, TRACED_DISPATCH, exchange, 3);
    receive_rows<EXACT, TRACED>(d, exchange, blockIdx.x - 1, senders, known);
    mark<TRACED>(p, TRACED_DISPATCH, exchange, 5);
    if (!p.alone) allow_next_kernel();
}

#define DISPATCH(NAME, EXACT, TRACED)                                                                                  \
    extern "C" __global__ void __maxnreg__(56) NAME(const __grid_constant__ DispatchFew p) { dispatch_few<EXACT, TRACED>(p); }
DISPATCH(exchange_dispatch_exact, true, false)
DISPATCH(exchange_dispatch_bf16, false, false)
DISPATCH(exchange_dispatch_exact_traced, true, true)
DISPATCH(exchange_dispatch_bf16_traced, false, true)

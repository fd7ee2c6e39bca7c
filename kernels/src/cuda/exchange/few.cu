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

// How values travel in a unit: three F32 or six BF16. Unit u of U has values u, u + U, u + 2 U, ..: neighbouring threads
// touch neighbouring values.
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
        const int units = ceil_div(p.hidden, VALUES);
#pragma unroll
        for (int i = 0; i < VALUES; i++) to[i] = u + i * units < p.hidden ? from[u + i * units] : 0.f;
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
        const int to = i / metas, slot = i % metas * 2, row = place_for(p, to) * p.few_tokens + token;
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
            const int to = __ffsll(rest) - 1, row = place_for(p, to) * p.few_tokens + token;
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

// One row that came, or comes, for experts here, as F32; by all but the scout. Until the verdict is known it may not come
// at all. False: gave up.
template <bool EXACT>
DEVICE bool unpack_row(const DispatchFew &d, uint64_t exchange, const Place &at, const volatile int &verdict) {
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
            if (verdict == NO_ROW) return true;
            if (verdict == GAVE_UP || !patience.wait(p, DISPATCH_DEADLINE, at.rank, exchange)) return false;
            unit = load_unit(from + u * sizeof(Unit));
        }
        float v[VALUES];
        Packing<EXACT>::unpack(unit, v);
#pragma unroll
        for (int i = 0; i < VALUES; i++)
            if (u + i * units < p.hidden) to[u + i * units] = v[i];
    }
    return true;
}

template <bool EXACT> DEVICE void receive_rows(const DispatchFew &d, uint64_t exchange, int first, int step, volatile Scouted &known) {
    const ExchangeParams &p = d.exchange;
    const Place place = place_of(p, first);
    const bool has_place = place.token < p.few_tokens;
    if (threadIdx.x >= FEW_THREADS)
        scout(p, exchange, place, has_place, known);
    else if (has_place)
        unpack_row<EXACT>(d, exchange, place, known.verdict);
    __syncthreads();
    if (known.verdict == GAVE_UP) return;
    int most = 0;
    for (int r = 0; r < p.ranks; r++) most = max(most, known.counts[r]);
    const int metas = meta_units(p.k);
    __shared__ int expected;
    for (int n = first + step; n / p.ranks < most; n += step) {
        const Place at = place_of(p, n);
        if (at.token >= known.counts[at.rank]) continue;
        bool wanted = false, good = true;
        if (threadIdx.x < metas) {
            Unit u;
            good = await_unit(p, p.area[p.rank] + p.at.few_meta + (static_cast<size_t>(row_of(p, at)) * metas + threadIdx.x) * sizeof(Unit),
                              small_stamp(exchange), DISPATCH_DEADLINE, at.rank, exchange, u);
            wanted = good && u.a != 0xffffffffu;
        }
        if (threadIdx.x == 0) expected = ROW;
        if (__syncthreads_or(!good)) return;
        if (!__syncthreads_or(wanted)) continue;
        if (threadIdx.x < FEW_THREADS) good = unpack_row<EXACT>(d, exchange, at, expected);
        if (__syncthreads_or(!good)) return;
    }
}

// Waits for the slots of all tokens and groups them. Block 0.
DEVICE void group_arrivals(const DispatchFew &d, uint64_t exchange, volatile Scouted &known, uint32_t *tokens_of, uint16_t *id_of) {
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
    __shared__ int counts[MAX_RANKS];
    if (threadIdx.x < p.ranks) counts[threadIdx.x] = known.counts[threadIdx.x];
    __syncthreads();
    finish_groups(d.group, counts, p.ranks, p.few_tokens, p.k,
                  [&](uint32_t slot) { return id_of[slot] == 0xffffu ? ABSENT : id_of[slot]; }, tokens_of);
}

template <bool EXACT> DEVICE void dispatch_few(const DispatchFew &d) {
    extern __shared__ uint32_t tokens_of[];  // [local experts][words], then the slots' experts, 16 bits each
    __shared__ Scouted known;
    const ExchangeParams &p = d.exchange;
    if (blockIdx.x == 0)
        for (int i = threadIdx.x; i < d.group.experts * d.group.words; i += DISPATCH_THREADS) tokens_of[i] = 0;
    if (threadIdx.x < MAX_RANKS) known.counts[threadIdx.x] = -1;
    if (threadIdx.x == 0) known.verdict = UNKNOWN;
    wait_for_inputs();
    if (p.alone) allow_next_kernel();
    const uint64_t exchange = p.state->begun + 1;
    // Rows that this rank's experts had before: the load that the others see.
    const uint32_t load = *d.group.rows;
    const int senders = gridDim.x - 1;
    int token = blockIdx.x - 1;
    __shared__ Sending sending;
    RowPart<EXACT> part;
    const bool sends = d.phase != RECEIVE;
    if (blockIdx.x > 0 && token < d.tokens.count && sends) prepare_token<EXACT>(d, exchange, token, sending, part);
    if (__syncthreads_or(failed(p))) {
        if (blockIdx.x == 0 && threadIdx.x == 0) *d.group.groups.count = 0, p.state->open = exchange;
        if (blockIdx.x == 0 && threadIdx.x < p.ranks) p.counts[threadIdx.x] = 0;
        return;
    }
    if (blockIdx.x == 0) {
        if (d.phase == SEND) return;
        if (threadIdx.x == 0) p.state->open = exchange;
        group_arrivals(d, exchange, known, tokens_of, reinterpret_cast<uint16_t *>(tokens_of + d.group.experts * d.group.words));
        return;
    }
    if (blockIdx.x == 1 && threadIdx.x < p.ranks && sends)
        store_unit(p.area[threadIdx.x] + p.at.few_header + place_for(p, threadIdx.x) * sizeof(Unit), header(d.tokens.count, load, exchange));
    while (sends && token < d.tokens.count) {
        send_token<EXACT>(d, exchange, token, sending, part);
        token += senders;
        if (token >= d.tokens.count) break;
        __syncthreads();
        prepare_token<EXACT>(d, exchange, token, sending, part);
        __syncthreads();
    }
    if (d.phase != SEND) receive_rows<EXACT>(d, exchange, blockIdx.x - 1, senders, known);
    if (!p.alone) allow_next_kernel();
}

extern "C" __global__ void __maxnreg__(40) exchange_dispatch_exact(const __grid_constant__ DispatchFew p) { dispatch_few<true>(p); }
extern "C" __global__ void __maxnreg__(40) exchange_dispatch_bf16(const __grid_constant__ DispatchFew p) { dispatch_few<false>(p); }

// ---- combine ----------------------------------------------------------------------------------------------------------

// Results of the rows that came, to their owners, by block `worker` of `workers`. `ids` and `weights` hold those of the
// worker's first place.
template <bool EXACT>
DEVICE void send_results(const CombineFew &c, uint64_t exchange, const int *counts, uint32_t *ids, float *weights, int worker, int workers) {
    constexpr int VALUES = Packing<EXACT>::VALUES;
    const ExchangeParams &p = c.exchange;
    const uint32_t stamp = small_stamp(exchange);
    const int units = ceil_div(p.hidden, VALUES);
    int most = 0;
    for (int r = 0; r < p.ranks; r++) most = max(most, counts[r]);
    for (int n = worker; n / p.ranks < most; n += workers) {
        const int owner = n % p.ranks, token = n / p.ranks, row = owner * p.few_tokens + token;
        if (n != worker) {
            __syncthreads();
            if (threadIdx.x < p.k) {
                ids[threadIdx.x] = p.ids[row * p.k + threadIdx.x];
                weights[threadIdx.x] = p.weights[row * p.k + threadIdx.x];
            }
            __syncthreads();
        }
        if (token >= counts[owner]) continue;
        unsigned present = 0;
        for (int j = 0; j < p.k; j++) present |= (ids[j] != ABSENT) << j;
        if (!present) continue;
        uint8_t *back = p.area[owner] + p.at.few_back;
        const float *y = c.y + static_cast<size_t>(row) * p.k * p.hidden;
        for (int u = threadIdx.x; u < units; u += FEW_THREADS) {
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
                    const float *from = y + static_cast<size_t>(slot[a]) * p.hidden + u;
#pragma unroll
                    for (int i = 0; i < VALUES; i++) v[a][i] = u + i * units < p.hidden ? from[i * units] : 0.f;
                }
#pragma unroll
                for (int a = 0; a < AHEAD; a++) {
                    if (slot[a] < 0) continue;
                    if (EXACT && p.deterministic) {
                        const int at = ((p.staged ? owner * p.few_tokens : 0) + token) * p.k + slot[a];
                        store_unit(back + (static_cast<size_t>(at) * units + u) * sizeof(Unit), Packing<EXACT>::pack(v[a], stamp));
                    } else {
                        const float w = weights[slot[a]];
#pragma unroll
                        for (int i = 0; i < VALUES; i++) sum[i] = fmaf(w, v[a][i], sum[i]);
                    }
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
            const auto at = [&](int one) {
                const int first = p.staged && slots ? owner[one] * p.few_tokens : 0;
                const int place = slots ? (first + token) * p.k + one : one * p.few_tokens + token;
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
#pragma unroll
        for (int i = 0; i < VALUES; i++)
            if (u + i * units < p.hidden) row[u + i * units] = good ? sum[i] : 0.f;
    }
    return good;
}

DEVICE void copy_async16(float *to, const float *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
DEVICE void copies_async_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The last block says that this rank's experts have read what came, and waits until all ranks have said so: the
// others need not.
DEVICE void settle(const ExchangeParams &p, uint64_t exchange, bool passing, int phase) {
    if (!passing && threadIdx.x < p.ranks) {
        if (phase != RECEIVE)
            store_release(reinterpret_cast<uint64_t *>(p.area[threadIdx.x] + p.at.few_done) + place_for(p, threadIdx.x), exchange);
        if (phase != SEND)
            await_done(p, reinterpret_cast<const uint64_t *>(p.area[p.rank] + p.at.few_done) + threadIdx.x, threadIdx.x, exchange);
    }
    if (phase != SEND && threadIdx.x == 0) p.state->begun = exchange;
}

template <bool EXACT, int PAIRS> DEVICE void combine_few(const CombineFew &c) {
    extern __shared__ __align__(16) float row_sum[];  // [hidden]: what came back; then the state it is added to
    __shared__ float scratch[NORM_THREADS / WARP], weight[MAX_TOP_K], weights[MAX_TOP_K];
    __shared__ int owner[MAX_TOP_K], counts[MAX_RANKS];
    __shared__ uint32_t ids[MAX_TOP_K];
    const ExchangeParams &p = c.exchange;
    const int workers = gridDim.x - 1, worker = blockIdx.x;
    wait_for_inputs();
    if (p.alone) allow_next_kernel();
    const uint64_t exchange = p.state->open;
    // All that the first place and the first token need, at once.
    const int lane = threadIdx.x & 31, place = worker % p.ranks * p.few_tokens + worker / p.ranks;
    if (threadIdx.x < p.ranks) counts[threadIdx.x] = p.counts[threadIdx.x];
    if (threadIdx.x / WARP == 2 && lane < p.k && worker / p.ranks < p.few_tokens)
        ids[lane] = p.ids[place * p.k + lane], weights[lane] = p.weights[place * p.k + lane];
    if (threadIdx.x / WARP == 3 && lane < p.k && worker < c.tokens.count)
        owner[lane] = p.owner[worker * p.k + lane], weight[lane] = c.tokens.weights[worker * p.k + lane];
    const bool passing = __syncthreads_or(failed(p));
    if (worker == workers) {
        settle(p, exchange, passing, c.phase);
        if (!p.alone) allow_next_kernel();
        return;
    }
    if (!passing && c.phase != RECEIVE) send_results<EXACT>(c, exchange, counts, ids, weights, worker, workers);
    for (int token = worker; token < c.tokens.count && c.phase != SEND; token += workers) {
        if (token != worker) {
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
        if (c.norm.normed || c.norm.plane) finish_row(c.norm, token, v, scratch);
        __syncthreads();
    }
    if (!p.alone) allow_next_kernel();
}

// For the usual widths so few registers that combine's blocks may start beside those of dispatch that still wait: 17 warps
// of 40 registers and 16 of 80 fit one multiprocessor.
#define COMBINE(PAIRS, BOUND)                                                                                          \
    extern "C" __global__ void BOUND exchange_combine_exact_##PAIRS(const __grid_constant__ CombineFew p) {            \
        combine_few<true, PAIRS>(p);                                                                                   \
    }                                                                                                                  \
    extern "C" __global__ void BOUND exchange_combine_bf16_##PAIRS(const __grid_constant__ CombineFew p) {             \
        combine_few<false, PAIRS>(p);                                                                                  \
    }
COMBINE(3, __maxnreg__(80))
COMBINE(6, __launch_bounds__(FEW_THREADS, 1))
COMBINE(16, __launch_bounds__(FEW_THREADS, 1))

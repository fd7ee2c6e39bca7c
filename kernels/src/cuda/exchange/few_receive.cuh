// What comes in the dispatch of few tokens: a scout in every block learns what there will be, the other threads unpack rows,
// and block 0 groups the slots of all.
#pragma once
#include "few_parts.cuh"

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

// What goes out in the dispatch of few tokens: a block finds a token's destinations and sends its row to them.
#pragma once
#include "few_choose.cuh"

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

// Requests a token's row and finds its destinations, the scout those; nobody waits for the other. A barrier must follow.
template <bool EXACT, bool NORM>
DEVICE void prepare_token(const DispatchFew &d, uint64_t exchange, int token, Sending &sending, RowPart<EXACT> &part, Sent &choosing) {
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

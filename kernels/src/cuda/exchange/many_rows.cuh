// What all ways back of many tokens share: the sum of a row's results, to its owner, and the sum of what all ranks have for a
// token, into its hidden state; by ROW_WARPS warps each.
#pragma once
#include "many.cuh"
#include "sum_slots.cuh"

struct CombineMany {
    ExchangeParams exchange;
    ExchangeTokens tokens;
    const __nv_bfloat16 *sorted;   // [sorted rows, hidden]
    const uint32_t *row_of_slot;   // [ranks][many_tokens, k]
    float *hidden;                 // [count, hidden]
    int senders;                   // blocks that send, where others add
    int ahead;                     // chunks of own shares that a block which adds has room for
};

// Which row of a block's chunk this warp works on, and the thread's place among those of the row.
DEVICE int chunk_row() { return threadIdx.x / (ROW_WARPS * WARP); }
DEVICE int row_part() { return threadIdx.x % (ROW_WARPS * WARP); }

// By a whole warp.
DEVICE RowSlots slots_of(const CombineMany &c, int owner, int token) {
    const ExchangeParams &p = c.exchange;
    const size_t row = static_cast<size_t>(owner) * p.many_tokens + token;
    const float *weights = reinterpret_cast<const float *>(p.area[p.rank] + p.at.many_weights);
    return slots_of(c.row_of_slot + row * p.k, weights + row * p.k, p.k, threadIdx.x % WARP);
}

// Ranks that have a share in a token's sum. By a whole warp.
DEVICE uint64_t owners_of(const ExchangeParams &p, int token) {
    const int lane = threadIdx.x % WARP;
    return or_lanes(lane < p.k ? 1ull << p.owner[token * p.k + lane] : 0);
}

// The weighted sum of one row's slots here, rounded to BF16.
DEVICE void sum_row(const CombineMany &c, const RowSlots &slots, uint4 *to) {
    const int units = c.exchange.hidden / 8;
    if (!slots.present) return;
#pragma unroll 1
    for (int first = 0; first < units; first += ROW_WARPS * WARP) {
        const int u = first + row_part();
        const uint4 sum = sum_slots(slots, c.sorted, c.exchange.hidden, u);
        if (u < units) to[u] = sum;
    }
}

// The same, to its owner.
DEVICE void return_row(const CombineMany &c, int owner, int token) {
    const ExchangeParams &p = c.exchange;
    uint8_t *to = p.area[owner] + p.at.many_back + (static_cast<size_t>(place_for(p, owner)) * p.many_tokens + token) * p.hidden * 2;
    sum_row(c, slots_of(c, owner, token), reinterpret_cast<uint4 *>(to));
}

// hidden += what the ranks `owners` have for one token, in the order of ranks. `own`: this rank's share, if that has not come back
// like the others'.
DEVICE void add_row(const CombineMany &c, int token, uint64_t owners, const uint4 *own) {
    constexpr int AHEAD = 2;
    const ExchangeParams &p = c.exchange;
    const int units = p.hidden / 8;
    float *to = c.hidden + static_cast<size_t>(token) * p.hidden;
    const uint8_t *back = p.area[p.rank] + p.at.many_back + static_cast<size_t>(token) * p.hidden * 2;
#pragma unroll 1
    for (int u = row_part(); u < units; u += ROW_WARPS * WARP) {
        float4 low = *reinterpret_cast<const float4 *>(to + u * 8), high = *reinterpret_cast<const float4 *>(to + u * 8 + 4);
        float sum[8] = {};
#pragma unroll 1
        for (uint64_t rest = owners; rest;) {
            uint4 v[AHEAD];
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                const int rank = rest ? __ffsll(rest) - 1 : -1;
                v[a] = make_uint4(0, 0, 0, 0);
                if (own && rank == p.rank)
                    v[a] = own[u];
                else if (rank >= 0)
                    v[a] = __ldcg(reinterpret_cast<const uint4 *>(back + static_cast<size_t>(rank) * p.many_tokens * p.hidden * 2 + u * 16));
                rest &= rest - 1;
            }
#pragma unroll
            for (int a = 0; a < AHEAD; a++) add_eight(sum, v[a]);
        }
        low.x += sum[0], low.y += sum[1], low.z += sum[2], low.w += sum[3];
        high.x += sum[4], high.y += sum[5], high.z += sum[6], high.w += sum[7];
        *reinterpret_cast<float4 *>(to + u * 8) = low;
        *reinterpret_cast<float4 *>(to + u * 8 + 4) = high;
    }
}

// Waits until every rank has returned all, or has read what came; threads beyond the ranks pass. False: gave up.
DEVICE bool await_returns(const ExchangeParams &p, uint64_t exchange) {
    return threadIdx.x >= p.ranks ||
           await_done<true>(p, reinterpret_cast<const uint64_t *>(p.area[p.rank] + p.at.many_done) + threadIdx.x, threadIdx.x, exchange);
}

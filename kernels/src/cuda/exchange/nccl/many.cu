// The exchange of many tokens over NCCL: this rank's message, the choice of ranks for everybody's tokens, the results for the
// others, their sum. Rows travel as they stand in planes, BF16 or FP8 with a scale per 128 values; results as BF16.
// Bytes: each row once out of the plane and once into the message; results as in ../many.cu.
#include "../../plane.cuh"
#include "../fp8_rows.cuh"
#include "messages.cuh"

constexpr int MANY_THREADS = 256, MANY_WARPS = MANY_THREADS / WARP;

struct PackMany {
    ExchangeParams exchange;
    Messages messages;
    ExchangeTokens tokens;
    const uint8_t *plane;
    const int *rows;  // this rank's expert rows of the exchange before: the load that the others see
    int plane_blocks, padded, fp8;
};

struct ArriveMany {
    ExchangeParams exchange;
    Messages messages;
    uint32_t *local;  // [ranks][many_tokens, k]: local expert or ABSENT
    int layer;
};

struct ReturnMany {
    ExchangeParams exchange;
    Messages messages;
    const __nv_bfloat16 *sorted;  // [sorted rows, hidden]
    const uint32_t *row_of_slot;  // [ranks][many_tokens, k]
};

struct SumMany {
    ExchangeParams exchange;
    Messages messages;
    ExchangeTokens tokens;
    const __nv_bfloat16 *sorted;  // as in ReturnMany
    const uint32_t *row_of_slot;
    float *hidden;  // [count, hidden]
};

// A warp a token.
extern "C" __global__ void __launch_bounds__(MANY_THREADS) nccl_pack_many(const __grid_constant__ PackMany d) {
    constexpr int AHEAD = 4;
    const ExchangeParams &p = d.exchange;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, units = d.padded / 8;
    wait_for_inputs();
    allow_next_kernel();
    if (__syncthreads_or(failed(p))) return;
    const Message own = message_of(d.messages, p.rank, d.tokens.count, p.k);
    if (blockIdx.x == 0 && threadIdx.x == 0) write_head(own.at, header(d.tokens.count, *d.rows, p.state->begun + 1));
    for (int token = blockIdx.x * MANY_WARPS + warp; token < d.tokens.count; token += gridDim.x * MANY_WARPS) {
        if (lane < p.k) {
            own.ids[token * p.k + lane] = d.tokens.ids[token * p.k + lane];
            own.weights[token * p.k + lane] = d.tokens.weights[token * p.k + lane];
        }
        const int r = token % PLANE_ROWS;
        const uint8_t *from = d.plane + static_cast<size_t>(token / PLANE_ROWS) * PLANE_BLOCK + r * 128;
        uint8_t *row = own.rows + static_cast<size_t>(token) * d.messages.row_bytes;
#pragma unroll 1
        for (int first = 0; first < units; first += AHEAD * WARP) {  // units: a multiple of 16, so half warps are whole
            uint4 v[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const int u = first + i * WARP + lane;
                v[i] = make_uint4(0, 0, 0, 0);
                if (u < units)
                    v[i] = *reinterpret_cast<const uint4 *>(from + static_cast<size_t>(u / 8) * d.plane_blocks * PLANE_BLOCK + ((u % 8 ^ r) * 16));
            }
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const int u = first + i * WARP + lane;
                if (d.fp8) {
                    // Lanes beyond the row take part in the exchange of maxima with zeros.
                    float scale;
                    const uint2 packed = to_fp8(v[i], scale);
                    if (u >= units) continue;
                    *reinterpret_cast<uint2 *>(row + u * 8) = packed;
                    if (u % 16 == 0) *reinterpret_cast<float *>(row + d.padded + u / 16 * 4) = scale;
                } else if (u < units) {
                    *reinterpret_cast<uint4 *>(row + u * 16) = v[i];
                }
            }
        }
    }
}

// Which slots are for experts here: a warp a row.
extern "C" __global__ void __launch_bounds__(MANY_THREADS) nccl_arrive_many(const __grid_constant__ ArriveMany d) {
    __shared__ Heads heads;
    const ExchangeParams &p = d.exchange;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31;
    wait_for_inputs();
    allow_next_kernel();
    const uint64_t exchange = p.state->begun + 1;
    const bool good = read_heads(p, d.messages, p.many_tokens, exchange, heads, blockIdx.x == 0);
    if (blockIdx.x == 0 && threadIdx.x < p.ranks) {
        p.counts[threadIdx.x] = good ? heads.rows[threadIdx.x] : 0;
        if (good) p.loads[(exchange & 1) * MAX_RANKS + threadIdx.x] = heads.loads[threadIdx.x];
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) p.state->open = exchange;
    if (!good) return;
    int most = 0;
    for (int r = 0; r < p.ranks; r++) most = max(most, heads.rows[r]);
    for (int n = blockIdx.x * MANY_WARPS + warp; n < most * p.ranks; n += gridDim.x * MANY_WARPS) {
        const int sender = n % p.ranks, token = n / p.ranks;
        if (token >= heads.rows[sender]) continue;
        const Message from = message_of(d.messages, sender, heads.rows[sender], p.k);
        int rank;
        uint32_t local;
        choose_for(p, d.layer, from, sender, token, exchange, lane, rank, local);
        if (lane >= p.k) continue;
        d.local[(static_cast<size_t>(sender) * p.many_tokens + token) * p.k + lane] = local;
        if (sender == p.rank) p.owner[token * p.k + lane] = rank < 0 ? 0 : rank;
    }
}

// The slots of a row that are for experts here: lane j < k has slot j's sorted row and weight; all lanes which there are.
struct Slots {
    uint32_t sorted;
    float weight;
    unsigned present;
};
DEVICE Slots slots_of(const ExchangeParams &p, const Messages &m, const uint32_t *row_of_slot, int owner, int rows, int token, int lane) {
    const Message from = message_of(m, owner, rows, p.k);
    const size_t row = static_cast<size_t>(owner) * p.many_tokens + token;
    Slots s{ABSENT, 0.f, 0};
    if (lane < p.k) s.sorted = row_of_slot[row * p.k + lane], s.weight = from.weights[token * p.k + lane];
    s.present = __ballot_sync(ALL_LANES, s.sorted != ABSENT);
    return s;
}

// Their weighted sum, of unit `u`'s eight values, as it travels: rounded to BF16. By a whole warp.
DEVICE uint4 sum_slots(const Slots &s, const __nv_bfloat16 *sorted, int hidden, int u) {
    constexpr int AHEAD = 4;
    float sum[8] = {};
    for (unsigned rest = s.present; rest;) {
        uint4 v[AHEAD];
        float w[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const int slot = rest ? __ffs(rest) - 1 : 0;
            const size_t at = static_cast<size_t>(__shfl_sync(ALL_LANES, s.sorted, slot)) * hidden;
            w[a] = __shfl_sync(ALL_LANES, s.weight, slot);
            v[a] = make_uint4(0, 0, 0, 0);
            if (rest && u * 8 < hidden) v[a] = *reinterpret_cast<const uint4 *>(sorted + at + u * 8);
            rest &= rest - 1;
        }
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const uint32_t words[4] = {v[a].x, v[a].y, v[a].z, v[a].w};
#pragma unroll
            for (int e = 0; e < 4; e++) {
                sum[2 * e] = fmaf(w[a], bf16_low(words[e]), sum[2 * e]);
                sum[2 * e + 1] = fmaf(w[a], bf16_high(words[e]), sum[2 * e + 1]);
            }
        }
    }
    return make_uint4(pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]), pack_bf16(sum[4], sum[5]), pack_bf16(sum[6], sum[7]));
}

// The weighted sum of each row's slots here, for the row's owner; this rank's own rows are left to `nccl_sum_many`.
extern "C" __global__ void __launch_bounds__(MANY_THREADS) nccl_return_many(const __grid_constant__ ReturnMany c) {
    const ExchangeParams &p = c.exchange;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, units = p.hidden / 8, others = p.ranks - 1;
    __shared__ int counts[MAX_RANKS];
    wait_for_inputs();
    allow_next_kernel();
    if (threadIdx.x < p.ranks) counts[threadIdx.x] = p.counts[threadIdx.x];
    if (__syncthreads_or(failed(p))) return;
    if (blockIdx.x == 0) stamp_results(p, c.messages, p.state->open);
    int most = 0;
    for (int r = 0; r < p.ranks; r++) most = max(most, r == p.rank ? 0 : counts[r]);
    for (int n = blockIdx.x * MANY_WARPS + warp; n < most * others; n += gridDim.x * MANY_WARPS) {
        const int token = n / others, owner = n % others + (n % others >= p.rank);
        if (token >= counts[owner]) continue;
        const Slots slots = slots_of(p, c.messages, c.row_of_slot, owner, counts[owner], token, lane);
        if (!slots.present) continue;
        uint8_t *to = result_for(c.messages, owner, p.rank, token);
        for (int u = lane; u < ceil_div(units, WARP) * WARP; u += WARP) {
            const uint4 sum = sum_slots(slots, c.sorted, p.hidden, u);
            if (u < units) *reinterpret_cast<uint4 *>(to + u * 16) = sum;
        }
    }
}

DEVICE void add_bf16(float (&sum)[8], const uint4 &v) {
    sum[0] += bf16_low(v.x), sum[1] += bf16_high(v.x), sum[2] += bf16_low(v.y), sum[3] += bf16_high(v.y);
    sum[4] += bf16_low(v.z), sum[5] += bf16_high(v.z), sum[6] += bf16_low(v.w), sum[7] += bf16_high(v.w);
}

// hidden += what came back and what was computed here, in the order of ranks.
extern "C" __global__ void __launch_bounds__(MANY_THREADS) nccl_sum_many(const __grid_constant__ SumMany c) {
    const ExchangeParams &p = c.exchange;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, units = p.hidden / 8;
    wait_for_inputs();
    allow_next_kernel();
    const uint64_t exchange = p.state->open;
    const bool good = results_came(p, c.messages, exchange, blockIdx.x == 0);
    if (blockIdx.x == 0 && threadIdx.x == 0) p.state->begun = exchange;
    if (!good) return;
    for (int token = blockIdx.x * MANY_WARPS + warp; token < c.tokens.count; token += gridDim.x * MANY_WARPS) {
        const uint64_t mask = or_lanes(lane < p.k ? 1ull << p.owner[token * p.k + lane] : 0);
        const Slots slots = slots_of(p, c.messages, c.row_of_slot, p.rank, c.tokens.count, token, lane);
        float *to = c.hidden + static_cast<size_t>(token) * p.hidden;
        for (int u = lane; u < ceil_div(units, WARP) * WARP; u += WARP) {
            const bool in = u < units;
            float4 low = make_float4(0.f, 0.f, 0.f, 0.f), high = low;
            if (in) low = *reinterpret_cast<const float4 *>(to + u * 8), high = *reinterpret_cast<const float4 *>(to + u * 8 + 4);
            // The first other rank's part is on its way while this rank's is summed.
            const uint64_t others = mask & ~(1ull << p.rank);
            const int first = others ? __ffsll(others) - 1 : -1;
            uint4 early = make_uint4(0, 0, 0, 0);
            if (in && first >= 0) early = *reinterpret_cast<const uint4 *>(result_of(c.messages, first, token) + u * 16);
            const uint4 own = sum_slots(slots, c.sorted, p.hidden, u);
            float sum[8] = {};
            for (uint64_t rest = mask; rest; rest &= rest - 1) {
                const int rank = __ffsll(rest) - 1;
                if (rank == p.rank)
                    add_bf16(sum, own);
                else if (rank == first)
                    add_bf16(sum, early);
                else if (in)
                    add_bf16(sum, *reinterpret_cast<const uint4 *>(result_of(c.messages, rank, token) + u * 16));
            }
            if (!in) continue;
            low.x += sum[0], low.y += sum[1], low.z += sum[2], low.w += sum[3];
            high.x += sum[4], high.y += sum[5], high.z += sum[6], high.w += sum[7];
            *reinterpret_cast<float4 *>(to + u * 8) = low;
            *reinterpret_cast<float4 *>(to + u * 8 + 4) = high;
        }
    }
}

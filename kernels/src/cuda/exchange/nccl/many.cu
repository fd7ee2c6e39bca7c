// The exchange of many tokens over NCCL: this rank's message, the choice of ranks for everybody's tokens, the results for the
// others, their sum. BF16 rows travel as the plane that they are, which whoever makes it has written into the message; FP8 rows one
// after the other, each with a scale per 128 values; results as BF16. To ranks whose memory is mapped here all but heads is written straight;
// heads go by the library behind it, and say that it is there.
// Bytes: FP8 rows once out of the plane and once into the message; results as in ../many.cu.
#include <type_traits>

#include "../../plane.cuh"
#include "../fp8_rows.cuh"
#include "../sum_slots.cuh"
#include "messages.cuh"

constexpr int MANY_THREADS = 256, MANY_WARPS = MANY_THREADS / WARP;
// Of a block that has a multiprocessor to itself.
constexpr int MOST_THREADS = 1024;

struct PackMany {
    ExchangeParams exchange;
    Messages messages;
    ExchangeTokens tokens;
    const uint8_t *plane;  // null: it is in the message
    const int *rows;  // this rank's expert rows of the exchange before: the load that the others see
    int plane_blocks, padded, fp8;
    int parts;  // warps of a row
    int picks;  // rows go straight to the ranks alone that want them
};

struct ArriveMany {
    ExchangeParams exchange;
    Messages messages;
    uint32_t *local;  // [ranks][many_tokens, k]: local expert or ABSENT
    int layer;
};

struct ResultsMany {
    ExchangeParams exchange;
    Messages messages;
    ExchangeTokens tokens;
    const __nv_bfloat16 *sorted;  // [sorted rows, hidden]
    const uint32_t *row_of_slot;  // [ranks][many_tokens, k]
    float *hidden;                // [count, hidden], added to
    int parts;                    // warps of a row
    int own;                      // whose rows are summed: OTHERS_ROWS, OWN_ROWS or ALL_ROWS
};
enum Rows : int { OTHERS_ROWS, OWN_ROWS, ALL_ROWS };

// The ranks that want a row of this rank's, as every rank works it out. By a whole warp.
DEVICE uint64_t wanting(const PackMany &d, uint64_t exchange, int token, int lane) {
    const Message own{nullptr, nullptr, const_cast<uint32_t *>(d.tokens.ids), nullptr};
    int rank;
    uint32_t local;
    choose_for(d.exchange, d.tokens.layer, own, d.exchange.rank, token, exchange, lane, rank, local);
    return or_lanes(rank < 0 ? 0 : 1ull << rank);
}

// `parts` warps a token, as in all that move rows: few tokens are spread over the device.
extern "C" __global__ void __launch_bounds__(MANY_THREADS) nccl_pack_many(const __grid_constant__ PackMany d) {
    constexpr int AHEAD = 4;
    const ExchangeParams &p = d.exchange;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, units = d.padded / 8;
    wait_for_inputs();
    allow_next_kernel();
    const Message own = message_of(d.messages, p.rank, d.tokens.count, p.k);
    const int blocks = ceil_div(d.tokens.count, PLANE_ROWS);
    const uint64_t exchange = p.state->begun + 1;
    constexpr uint64_t ALL = ~0ull;
    // Into the messages at other ranks, at the place that `at` has in this one.
    const auto send = [&](const void *at, const auto &v, uint64_t wanted) {
        for (uint64_t rest = d.messages.straight; rest; rest &= rest - 1) {
            const int rank = __ffsll(rest) - 1;
            uint8_t *there = message_at(p, d.messages, rank) + (static_cast<const uint8_t *>(at) - own.at);
            if (wanted >> rank & 1) *reinterpret_cast<std::decay_t<decltype(v)> *>(there) = v;
        }
    };
    const auto put = [&](auto *at, const auto &v, uint64_t wanted) { *at = v, send(at, v, wanted); };
    if (blockIdx.x == 0 && threadIdx.x == 0) write_own_head(p, own, d.tokens.count, d.rows);
    auto *plane = reinterpret_cast<const uint4 *>(own.rows);
    constexpr int UNITS = PLANE_BLOCK / 16;
    if (!d.plane && d.messages.straight && d.picks) {
        // Rows of a block of the plane, as they lie; few are shared among blocks of threads.
        static_assert(PLANE_ROWS == MANY_WARPS && UNITS == 2 * WARP);
        __shared__ uint64_t wanted_by[PLANE_ROWS];
        const int columns = d.padded / 64, shares = min(max(gridDim.x / max(blocks, 1), 1), columns);
        for (int n = blockIdx.x; n < blocks * shares; n += gridDim.x) {
            const int block = n / shares, share = n % shares, token = block * PLANE_ROWS + warp;
            const int end = (share + 1) * columns / shares * UNITS;
            __syncthreads();
            const uint64_t wanted = token < d.tokens.count ? wanting(d, exchange, token, lane) : 0;
            if (lane == 0) wanted_by[warp] = wanted;
            __syncthreads();
            for (int first = share * columns / shares * UNITS + warp * AHEAD * WARP + lane; first < end; first += MANY_WARPS * AHEAD * WARP) {
                const auto at = [&](int i) {
                    const int unit = first + i * WARP;
                    return plane + (static_cast<size_t>(unit / UNITS) * blocks + block) * UNITS + unit % UNITS;
                };
                uint4 v[AHEAD];
#pragma unroll
                for (int i = 0; i < AHEAD; i++)
                    if (first + i * WARP < end) v[i] = *at(i);
#pragma unroll
                for (int i = 0; i < AHEAD; i++)
                    if (first + i * WARP < end) send(at(i), v[i], wanted_by[(first + i * WARP) % UNITS / (UNITS / PLANE_ROWS)]);
            }
        }
    } else if (!d.plane && d.messages.straight) {
        // As it lies.
        const int all = blocks * (d.padded / 64) * UNITS;
        for (int first = (blockIdx.x * MANY_WARPS + warp) * AHEAD * WARP; first < all; first += gridDim.x * MANY_WARPS * AHEAD * WARP) {
            uint4 v[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                if (first + i * WARP + lane < all) v[i] = plane[first + i * WARP + lane];
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                if (first + i * WARP + lane < all) send(plane + first + i * WARP + lane, v[i], ALL);
        }
    }
    for (int n = blockIdx.x * MANY_WARPS + warp; n < d.tokens.count * d.parts; n += gridDim.x * MANY_WARPS) {
        const int token = n / d.parts, part = n % d.parts;
        if (part == 0 && lane < p.k) {
            put(own.ids + token * p.k + lane, d.tokens.ids[token * p.k + lane], ALL);
            put(own.weights + token * p.k + lane, d.tokens.weights[token * p.k + lane], ALL);
        }
        if (!d.plane) continue;
        const uint64_t wanted = d.picks ? wanting(d, exchange, token, lane) : ALL;
        const int r = token % PLANE_ROWS;
        const uint8_t *from = d.plane + static_cast<size_t>(token / PLANE_ROWS) * PLANE_BLOCK + r * 128;
        uint8_t *row = own.rows + static_cast<size_t>(token) * d.messages.row_bytes;
#pragma unroll 1
        for (int first = part * AHEAD * WARP; first < units; first += d.parts * AHEAD * WARP) {  // units: a multiple of 16, so half warps are whole
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
                    put(reinterpret_cast<uint2 *>(row + u * 8), packed, wanted);
                    if (u % 16 == 0) put(reinterpret_cast<float *>(row + d.padded + u / 16 * 4), scale, wanted);
                } else if (u < units) {
                    uint8_t *at = own.rows + (static_cast<size_t>(u / 8) * blocks + token / PLANE_ROWS) * PLANE_BLOCK + r * 128 + ((u % 8 ^ r) * 16);
                    put(reinterpret_cast<uint4 *>(at), v[i], wanted);
                }
            }
        }
    }
    finish_straight(d.messages);
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

// What lane j knows of slot j of a row, as it was read: of all ranks' tokens the sorted row and its weight.
DEVICE RowSlots read_slots(const ResultsMany &c, int owner, int rows, int token, int lane) {
    const ExchangeParams &p = c.exchange;
    RowSlots slots{ABSENT, 0.f, 0};
    if (lane >= p.k) return slots;
    slots.sorted = __ldcg(c.row_of_slot + (static_cast<size_t>(owner) * p.many_tokens + token) * p.k + lane);
    slots.weight = __ldcg(message_of(c.messages, owner, rows, p.k).weights + token * p.k + lane);
    return slots;
}

// The weighted sum of each row's slots here, for the row's owner.
extern "C" __global__ void __launch_bounds__(MOST_THREADS) nccl_return_many(const __grid_constant__ ResultsMany c) {
    const ExchangeParams &p = c.exchange;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, units = p.hidden / 8;
    const int owners = c.own == OWN_ROWS ? 1 : c.own == ALL_ROWS ? p.ranks : p.ranks - 1;
    const int warps = blockDim.x / WARP, first = blockIdx.x * warps + warp;
    __shared__ int counts[MAX_RANKS];
    // Counts and slots have been known since rows were sorted: the experts' kernels are between that and this one.
    if (threadIdx.x < p.ranks) counts[threadIdx.x] = __ldcg(p.counts + threadIdx.x);
    const bool passes = __syncthreads_or(failed(p));
    const auto owner_of = [&](int row) {
        if (c.own != OTHERS_ROWS) return c.own == OWN_ROWS ? p.rank : row % owners;
        return row % owners + (row % owners >= p.rank);
    };
    int most = 0;
    for (int r = 0; r < p.ranks; r++) most = max(most, c.own == ALL_ROWS || (r == p.rank) == (c.own == OWN_ROWS) ? counts[r] : 0);
    const int all = most * owners * c.parts;
    // A row's slots are on their way while the one before is summed.
    RowSlots next{};
    const auto read = [&](int n) {
        if (n >= all) return;
        const int row = n / c.parts, token = row / owners, owner = owner_of(row);
        if (token < counts[owner]) next = read_slots(c, owner, counts[owner], token, lane);
    };
    read(first);
    wait_for_inputs();
    allow_next_kernel();
    if (passes) return;
    if (blockIdx.x == 0 && c.own != OWN_ROWS) stamp_results(p, c.messages, p.state->open);
    for (int n = first; n < all; n += gridDim.x * warps) {
        const int row = n / c.parts, part = n % c.parts, token = row / owners, owner = owner_of(row);
        RowSlots slots = next;
        read(n + gridDim.x * warps);
        if (token >= counts[owner]) continue;
        slots.present = __ballot_sync(ALL_LANES, slots.sorted != ABSENT);
        if (!slots.present) continue;
        uint8_t *to = result_to(p, c.messages, owner, token);
        for (int u = part * WARP + lane; u < ceil_div(units, WARP) * WARP; u += c.parts * WARP) {
            const uint4 sum = sum_slots(slots, c.sorted, p.hidden, u);
            if (u < units) *reinterpret_cast<uint4 *>(to + u * 16) = sum;
        }
    }
    finish_straight(c.messages);
}

// hidden += what came back, in the order of ranks. `OWN`: this rank's share is still to be summed; as rounded as if it had come.
template <bool OWN> DEVICE void sum_many(const ResultsMany &c) {
    // Ranks whose results are asked for before it is known that they came.
    constexpr int EARLY = 2;
    const ExchangeParams &p = c.exchange;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, units = p.hidden / 8, all = c.tokens.count * c.parts;
    const int first = blockIdx.x * MANY_WARPS + warp, first_unit = first % c.parts * WARP + lane;
    wait_for_inputs();
    allow_next_kernel();
    const Ahead ahead = read_ahead(p, c.messages.back, c.messages.back_stride);
    const uint64_t exchange = p.state->open;
    int owner = 0;
    RowSlots slots{ABSENT, 0.f, 0};
    float4 low, high;
    uint4 early[EARLY];
    const auto read_row = [&](int n) {
        const int token = n / c.parts;
        if (lane < p.k) owner = p.owner[token * p.k + lane];
        if (OWN) slots = read_slots(c, p.rank, c.tokens.count, token, lane);
    };
    const auto read_unit = [&](int token, int u) {
        if (u >= units) return;
        const float *from = c.hidden + static_cast<size_t>(token) * p.hidden + u * 8;
        low = *reinterpret_cast<const float4 *>(from), high = *reinterpret_cast<const float4 *>(from + 4);
#pragma unroll
        for (int a = 0; a < EARLY; a++)
            if (a < p.ranks && !(OWN && a == p.rank)) early[a] = *reinterpret_cast<const uint4 *>(result_of(c.messages, a, token) + u * 16);
    };
    if (first < all) read_row(first), read_unit(first / c.parts, first_unit);
    const bool good = check_results(p, ahead, exchange, blockIdx.x == 0);
    if (blockIdx.x == 0 && threadIdx.x == 0) p.state->begun = exchange;
    if (!good) return;
    for (int n = first; n < all; n += gridDim.x * MANY_WARPS) {
        const int token = n / c.parts, part = n % c.parts;
        if (n != first) read_row(n);
        const uint64_t mask = or_lanes(lane < p.k ? 1ull << owner : 0);
        if (OWN) slots.present = __ballot_sync(ALL_LANES, slots.sorted != ABSENT);
        float *to = c.hidden + static_cast<size_t>(token) * p.hidden;
        for (int u = part * WARP + lane; u < ceil_div(units, WARP) * WARP; u += c.parts * WARP) {
            if (n != first || u != first_unit) read_unit(token, u);
            uint4 own{};
            if (OWN) own = sum_slots(slots, c.sorted, p.hidden, u);
            if (u >= units) continue;
            float sum[8] = {};
#pragma unroll
            for (int a = 0; a < EARLY; a++)
                if (mask >> a & 1) add_eight(sum, OWN && a == p.rank ? own : early[a]);
            for (uint64_t rest = mask >> EARLY << EARLY; rest; rest &= rest - 1) {
                const int rank = __ffsll(rest) - 1;
                if (OWN && rank == p.rank)
                    add_eight(sum, own);
                else
                    add_eight(sum, *reinterpret_cast<const uint4 *>(result_of(c.messages, rank, token) + u * 16));
            }
            low.x += sum[0], low.y += sum[1], low.z += sum[2], low.w += sum[3];
            high.x += sum[4], high.y += sum[5], high.z += sum[6], high.w += sum[7];
            *reinterpret_cast<float4 *>(to + u * 8) = low;
            *reinterpret_cast<float4 *>(to + u * 8 + 4) = high;
        }
    }
}
extern "C" __global__ void __launch_bounds__(MANY_THREADS, 3) nccl_sum_many(const __grid_constant__ ResultsMany c) { sum_many<true>(c); }
extern "C" __global__ void __launch_bounds__(MANY_THREADS, 4) nccl_add_many(const __grid_constant__ ResultsMany c) { sum_many<false>(c); }

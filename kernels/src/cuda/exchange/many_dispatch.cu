// Many tokens, there: `send`, then `arrive` (one block) waits; the sort reads rows where they came. Only the one-block kernel
// waits, so peers that share the device always get on. Bytes: each row once per destination rank, 2 bytes a value
// (FP8: 1 1/32).
#include "fp8_rows.cuh"
#include "many.cuh"

struct DispatchMany {
    ExchangeParams exchange;
    ExchangeTokens tokens;
    const uint8_t *plane;
    int plane_blocks, padded, fp8;
    const int *rows;  // this rank's expert rows of the exchange before: the load that the others see
};

// Four warps a row: its 16-byte parts are on their way before anyone asks where they go.
template <bool TRACED> DEVICE void send_rows(const DispatchMany &d) {
    constexpr int AHEAD = 3, ROW_LANES = ROW_WARPS * WARP;
    const ExchangeParams &p = d.exchange;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, units = d.padded / 8, part = warp % ROW_WARPS * WARP + lane;
    const uint64_t came = entered<TRACED>();
    wait_for_inputs();
    allow_next_kernel();
    const uint64_t exchange = p.state->begun + 1;
    mark<TRACED>(p, TRACED_DISPATCH, exchange, 0, came);
    mark<TRACED>(p, TRACED_DISPATCH, exchange, 1);
    if (__syncthreads_or(failed(p))) return;
    for (int token = blockIdx.x * CHUNK + warp / ROW_WARPS; token < d.tokens.count; token += gridDim.x * CHUNK) {
        const int r = token % PLANE_ROWS;
        const uint8_t *from = d.plane + static_cast<size_t>(token / PLANE_ROWS) * PLANE_BLOCK + r * 128;
        uint4 v[AHEAD];
        const auto read = [&](int first) {
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const int u = first + i * ROW_LANES + part;
                v[i] = make_uint4(0, 0, 0, 0);
                if (u < units)
                    v[i] = *reinterpret_cast<const uint4 *>(from + static_cast<size_t>(u / 8) * d.plane_blocks * PLANE_BLOCK + ((u % 8 ^ r) * 16));
            }
        };
        read(0);
        const Destinations to = choose_ranks(p, d.tokens, token, exchange, lane);
        for (int rank = warp % ROW_WARPS; rank < p.ranks; rank += ROW_WARPS) {
            if (lane >= p.k) continue;
            const size_t row = static_cast<size_t>(place_for(p, rank)) * p.many_tokens + token;
            reinterpret_cast<uint32_t *>(p.area[rank] + p.at.many_ids)[row * p.k + lane] = to.rank == rank ? to.local : ABSENT;
            reinterpret_cast<float *>(p.area[rank] + p.at.many_weights)[row * p.k + lane] = to.weight;
        }
        const auto into = [&](int to) {
            return p.area[to] + p.at.many_rows + (static_cast<size_t>(place_for(p, to)) * p.many_tokens + token) * p.row_bytes;
        };
#pragma unroll 1
        for (int first = 0; first < units; first += AHEAD * ROW_LANES) {  // units: a multiple of 16, so half warps are whole
            if (first > 0) read(first);
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const int u = first + i * ROW_LANES + part;
                if (d.fp8) {
                    // Lanes beyond the row take part in the exchange of maxima with zeros.
                    float scale;
                    const uint2 packed = to_fp8(v[i], scale);
                    if (u >= units) continue;
                    for (uint64_t rest = to.mask; rest; rest &= rest - 1) {
                        uint8_t *to_row = into(__ffsll(rest) - 1);
                        *reinterpret_cast<uint2 *>(to_row + u * 8) = packed;
                        if (u % 16 == 0) *reinterpret_cast<float *>(to_row + d.padded + u / 16 * 4) = scale;
                    }
                } else if (u < units) {
                    for (uint64_t rest = to.mask; rest; rest &= rest - 1)
                        *reinterpret_cast<uint4 *>(into(__ffsll(rest) - 1) + u * 16) = v[i];
                }
            }
        }
    }
    mark<TRACED>(p, TRACED_DISPATCH, exchange, 2);
    tell_all(p, [&](int rank) {
        store_unit(p.area[rank] + p.at.many_header + place_for(p, rank) * sizeof(Unit), header(d.tokens.count, *d.rows, exchange));
    });
    mark<TRACED>(p, TRACED_DISPATCH, exchange, 5);
}

// One block of MAX_RANKS threads.
template <bool TRACED> DEVICE void arrive(const DispatchMany &d) {
    const ExchangeParams &p = d.exchange;
    wait_for_inputs();
    const uint64_t exchange = p.state->begun + 1;
    mark<TRACED>(p, TRACED_ARRIVE, exchange, 1);
    const int rank = threadIdx.x;
    bool good = !failed(p);
    Unit u{};
    if (good && rank < p.ranks) {
        good = await_header(p, p.area[p.rank] + p.at.many_header + rank * sizeof(Unit), rank, exchange, u);
        fence_system();
        if (good && u.a > static_cast<uint32_t>(p.many_tokens)) {
            fail(p, COUNT, rank, exchange);
            good = false;
        }
    }
    good = __syncthreads_and(good);
    if (rank < p.ranks) {
        p.counts[rank] = good ? u.a : 0;
        if (good) p.loads[(exchange & 1) * MAX_RANKS + rank] = u.b;
    }
    if (rank == 0) p.state->open = exchange;
    mark<TRACED>(p, TRACED_ARRIVE, exchange, 5);
    allow_next_kernel();
}

#define SEND_ROWS(NAME, TRACED)                                                                                        \
    extern "C" __global__ void __launch_bounds__(MANY_THREADS, 4) NAME(const __grid_constant__ DispatchMany d) { send_rows<TRACED>(d); }
SEND_ROWS(exchange_send, false)
SEND_ROWS(exchange_send_traced, true)
#define ARRIVE(NAME, TRACED)                                                                                           \
    extern "C" __global__ void __launch_bounds__(MAX_RANKS) NAME(const __grid_constant__ DispatchMany d) { arrive<TRACED>(d); }
ARRIVE(exchange_arrive, false)
ARRIVE(exchange_arrive_traced, true)

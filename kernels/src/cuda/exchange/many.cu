// The exchange of many tokens: rows in bulk, a warp a row, and one stamp per rank pair behind a system-wide fence.
//
// Dispatch: `send`, then `arrive` (one block) waits; the sort reads rows where they came. Combine: `return`, `settle`
// (one block) waits, `add`. Only one-block kernels wait, so peers that share the device always get on.
// Bytes: each row once per destination rank in, once out; 2 bytes a value (FP8: 1 1/32 in).
#include <cuda_fp8.h>

#include "../plane.cuh"
#include "exchange.cuh"

constexpr int MANY_THREADS = 256, MANY_WARPS = MANY_THREADS / WARP;
constexpr float FP8_LARGEST = 448.f;

struct DispatchMany {
    ExchangeParams exchange;
    ExchangeTokens tokens;
    const uint8_t *plane;
    int plane_blocks, padded, fp8;
    const int *rows;  // this rank's expert rows of the exchange before: the load that the others see
};

struct CombineMany {
    ExchangeParams exchange;
    ExchangeTokens tokens;
    const __nv_bfloat16 *sorted;   // [sorted rows, hidden]
    const uint32_t *row_of_slot;   // [ranks][many_tokens, k]
    float *hidden;                 // [count, hidden]
};

// All blocks have written: the last one to say so tells every rank. `tell(rank)` runs on a thread of its own.
template <class Tell> DEVICE void tell_all(const ExchangeParams &p, const Tell &tell) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        fence_system();  // this block's rows, before the count
        last = atomicAdd(&p.state->arrived, 1u) == gridDim.x - 1;
        if (last) p.state->arrived = 0;
    }
    __syncthreads();
    if (last && threadIdx.x < p.ranks) {
        fence_system();  // what the other blocks counted, before the stamp
        tell(threadIdx.x);
    }
}

// Eight values to E4M3 with the scale of 16 lanes' 128.
DEVICE uint2 to_fp8(const uint4 &v, float &scale) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    float x[8], largest = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = bf16_low(words[i]), x[2 * i + 1] = bf16_high(words[i]);
        largest = fmaxf(largest, fmaxf(fabsf(x[2 * i]), fabsf(x[2 * i + 1])));
    }
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, offset));
    scale = largest * (1.f / FP8_LARGEST);
    const float inverse = largest > 0.f ? FP8_LARGEST / largest : 0.f;
    uint32_t out[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t pair = __nv_cvt_float2_to_fp8x2(make_float2(x[2 * i] * inverse, x[2 * i + 1] * inverse), __NV_SATFINITE, __NV_E4M3);
        out[i / 2] |= pair << (i % 2 * 16);
    }
    return make_uint2(out[0], out[1]);
}

extern "C" __global__ void __launch_bounds__(MANY_THREADS) exchange_send(const __grid_constant__ DispatchMany d) {
    constexpr int AHEAD = 4;
    const ExchangeParams &p = d.exchange;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, units = d.padded / 8;
    wait_for_inputs();
    allow_next_kernel();
    if (__syncthreads_or(failed(p))) return;
    const uint64_t exchange = p.state->begun + 1;
    for (int token = blockIdx.x * MANY_WARPS + warp; token < d.tokens.count; token += gridDim.x * MANY_WARPS) {
        const Destinations to = choose_ranks(p, d.tokens, token, exchange, lane);
        for (int rank = 0; rank < p.ranks; rank++) {
            if (lane >= p.k) continue;
            const size_t row = static_cast<size_t>(place_for(p, rank)) * p.many_tokens + token;
            reinterpret_cast<uint32_t *>(p.area[rank] + p.at.many_ids)[row * p.k + lane] = to.rank == rank ? to.local : ABSENT;
            reinterpret_cast<float *>(p.area[rank] + p.at.many_weights)[row * p.k + lane] = to.weight;
        }
        const int r = token % PLANE_ROWS;
        const uint8_t *from = d.plane + static_cast<size_t>(token / PLANE_ROWS) * PLANE_BLOCK + r * 128;
        const auto into = [&](int to) {
            return p.area[to] + p.at.many_rows + (static_cast<size_t>(place_for(p, to)) * p.many_tokens + token) * p.row_bytes;
        };
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
    tell_all(p, [&](int rank) {
        store_unit(p.area[rank] + p.at.many_header + place_for(p, rank) * sizeof(Unit), header(d.tokens.count, *d.rows, exchange));
    });
}

// One block of MAX_RANKS threads.
extern "C" __global__ void __launch_bounds__(MAX_RANKS) exchange_arrive(const __grid_constant__ DispatchMany d) {
    const ExchangeParams &p = d.exchange;
    wait_for_inputs();
    const uint64_t exchange = p.state->begun + 1;
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
    allow_next_kernel();
}

// The weighted sum of each row's slots here, to the row's owner.
extern "C" __global__ void __launch_bounds__(MANY_THREADS) exchange_return(const __grid_constant__ CombineMany c) {
    const ExchangeParams &p = c.exchange;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, units = p.hidden / 8;
    __shared__ int counts[MAX_RANKS];
    wait_for_inputs();
    allow_next_kernel();
    if (__syncthreads_or(failed(p))) return;
    const uint64_t exchange = p.state->open;
    int most = 0;
    if (threadIdx.x < p.ranks) counts[threadIdx.x] = p.counts[threadIdx.x];
    __syncthreads();
    for (int r = 0; r < p.ranks; r++) most = max(most, counts[r]);
    // Neighbouring warps serve different owners: all links are busy at once.
    const float *weights_here = reinterpret_cast<const float *>(p.area[p.rank] + p.at.many_weights);
    for (int n = blockIdx.x * MANY_WARPS + warp; n < most * p.ranks; n += gridDim.x * MANY_WARPS) {
        const int owner = n % p.ranks, token = n / p.ranks;
        if (token >= counts[owner]) continue;
        const size_t row = static_cast<size_t>(owner) * p.many_tokens + token;
        const uint32_t sorted = lane < p.k ? c.row_of_slot[row * p.k + lane] : ABSENT;
        const float weight = lane < p.k ? weights_here[row * p.k + lane] : 0.f;
        const unsigned present = __ballot_sync(ALL_LANES, sorted != ABSENT);
        if (!present) continue;
        uint8_t *to = p.area[owner] + p.at.many_back + (static_cast<size_t>(place_for(p, owner)) * p.many_tokens + token) * p.hidden * 2;
        for (int u = lane; u < ceil_div(units, WARP) * WARP; u += WARP) {
            constexpr int AHEAD = 4;
            float sum[8] = {};
            for (unsigned rest = present; rest;) {
                uint4 v[AHEAD];
                float w[AHEAD];
#pragma unroll
                for (int a = 0; a < AHEAD; a++) {
                    const int slot = rest ? __ffs(rest) - 1 : 0;
                    const size_t from = static_cast<size_t>(__shfl_sync(ALL_LANES, sorted, slot)) * p.hidden;
                    w[a] = __shfl_sync(ALL_LANES, weight, slot);
                    v[a] = make_uint4(0, 0, 0, 0);
                    if (rest && u < units) v[a] = *reinterpret_cast<const uint4 *>(c.sorted + from + u * 8);
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
            if (u < units)
                *reinterpret_cast<uint4 *>(to + u * 16) =
                    make_uint4(pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]), pack_bf16(sum[4], sum[5]), pack_bf16(sum[6], sum[7]));
        }
    }
    tell_all(p, [&](int rank) { store_release(reinterpret_cast<uint64_t *>(p.area[rank] + p.at.many_done) + place_for(p, rank), exchange); });
}

// Waits until every rank has returned all; threads beyond the ranks pass. False: gave up.
DEVICE bool await_returns(const ExchangeParams &p, uint64_t exchange) {
    return threadIdx.x >= p.ranks ||
           await_done(p, reinterpret_cast<const uint64_t *>(p.area[p.rank] + p.at.many_done) + threadIdx.x, threadIdx.x, exchange);
}

// One block of MAX_RANKS threads.
extern "C" __global__ void __launch_bounds__(MAX_RANKS) exchange_settle(const __grid_constant__ CombineMany c) {
    const ExchangeParams &p = c.exchange;
    wait_for_inputs();
    const uint64_t exchange = p.state->open;
    if (!failed(p)) await_returns(p, exchange);
    if (threadIdx.x == 0) p.state->begun = exchange;
    allow_next_kernel();
}

// hidden += what came back, in the order of ranks. Alone on its device it waits itself, without `settle`.
extern "C" __global__ void __launch_bounds__(MANY_THREADS) exchange_add(const __grid_constant__ CombineMany c) {
    constexpr int AHEAD = 2;
    const ExchangeParams &p = c.exchange;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, units = p.hidden / 8;
    wait_for_inputs();
    allow_next_kernel();
    bool good = !failed(p);
    if (p.alone) {
        const uint64_t exchange = p.state->open;
        good = good && await_returns(p, exchange);
        if (blockIdx.x == 0 && threadIdx.x == 0) p.state->begun = exchange;
    }
    if (!__syncthreads_and(good)) return;
    for (int token = blockIdx.x * MANY_WARPS + warp; token < c.tokens.count; token += gridDim.x * MANY_WARPS) {
        const uint64_t mask = or_lanes(lane < p.k ? 1ull << p.owner[token * p.k + lane] : 0);
        float *to = c.hidden + static_cast<size_t>(token) * p.hidden;
        const uint8_t *back = p.area[p.rank] + p.at.many_back;
#pragma unroll 2
        for (int u = lane; u < units; u += WARP) {
            float4 low = *reinterpret_cast<const float4 *>(to + u * 8), high = *reinterpret_cast<const float4 *>(to + u * 8 + 4);
            float sum[8] = {};
            for (uint64_t rest = mask; rest;) {
                uint4 v[AHEAD];
#pragma unroll
                for (int a = 0; a < AHEAD; a++) {
                    v[a] = make_uint4(0, 0, 0, 0);
                    if (rest) {
                        const size_t row = static_cast<size_t>(__ffsll(rest) - 1) * p.many_tokens + token;
                        v[a] = __ldcg(reinterpret_cast<const uint4 *>(back + row * p.hidden * 2 + u * 16));
                    }
                    rest &= rest - 1;
                }
#pragma unroll
                for (int a = 0; a < AHEAD; a++) {
                    sum[0] += bf16_low(v[a].x), sum[1] += bf16_high(v[a].x), sum[2] += bf16_low(v[a].y), sum[3] += bf16_high(v[a].y);
                    sum[4] += bf16_low(v[a].z), sum[5] += bf16_high(v[a].z), sum[6] += bf16_low(v[a].w), sum[7] += bf16_high(v[a].w);
                }
            }
            low.x += sum[0], low.y += sum[1], low.z += sum[2], low.w += sum[3];
            high.x += sum[4], high.y += sum[5], high.z += sum[6], high.w += sum[7];
            *reinterpret_cast<float4 *>(to + u * 8) = low;
            *reinterpret_cast<float4 *>(to + u * 8 + 4) = high;
        }
    }
}

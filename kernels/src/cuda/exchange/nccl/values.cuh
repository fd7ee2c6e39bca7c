// Rows of a message of few tokens, as F32 or BF16: how a thread holds, reads and writes its part.
#pragma once
#include <type_traits>

#include "../../ptx.cuh"

constexpr int PACK_THREADS = 256;

// Four values of a row, F32 or as BF16. Neighbouring threads have neighbouring fours: wherever they are F32 as well, a warp touches
// whole sectors at once.
template <bool EXACT> struct Values {
    static constexpr int COUNT = 4;
    using Packed = std::conditional_t<EXACT, uint4, uint2>;
    // Past the first-level cache.
    static DEVICE float4 read(const float *from) { return __ldcg(reinterpret_cast<const float4 *>(from)); }
    static DEVICE Packed pack(const float4 &v) {
        if constexpr (EXACT)
            return make_uint4(__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w));
        else
            return make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
    }
    static DEVICE float4 unpack(const Packed &p) {
        if constexpr (EXACT)
            return make_float4(__uint_as_float(p.x), __uint_as_float(p.y), __uint_as_float(p.z), __uint_as_float(p.w));
        else
            return make_float4(bf16_low(p.x), bf16_high(p.x), bf16_low(p.y), bf16_high(p.y));
    }
};

// One row by PACK_THREADS threads. It is read before the kernel waits, past the first-level cache: the kernel before last, or an
// earlier one, wrote it.
template <bool EXACT> struct PackedRow {
    using V = Values<EXACT>;
    static constexpr int AHEAD = 3;
    float4 v[AHEAD];

    DEVICE void read(const float *from, int hidden) {
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const int u = threadIdx.x + a * PACK_THREADS;
            if (u < hidden / V::COUNT) v[a] = V::read(from + u * V::COUNT);
        }
    }
    DEVICE void write(uint8_t *to, const float *from, int hidden) {
        auto *units = reinterpret_cast<typename V::Packed *>(to);
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const int u = threadIdx.x + a * PACK_THREADS;
            if (u < hidden / V::COUNT) units[u] = V::pack(v[a]);
        }
        for (int u = threadIdx.x + AHEAD * PACK_THREADS; u < hidden / V::COUNT; u += PACK_THREADS) units[u] = V::pack(V::read(from + u * V::COUNT));
    }
};

// A message that the choice of experts writes beside: see messages.cuh. `rows` null: none.
struct PackBeside {
    const float *normed;  // [count, hidden]
    uint8_t *rows;
    uint32_t *ids;
    float *weights;
    uint4 *head;  // the message's beginning
    const int *load;
    const uint64_t *begun;
    uint8_t *const *at_peers;  // [ranks]: where the message begins at each of `straight`
    uint64_t straight;         // ranks into whose memory all but the head is written as well
    int row_bytes, hidden, exact;

    // Where what lies at `at` in the message lies at a rank of `straight`.
    template <class T> DEVICE T *at_peer(int rank, T *at) const {
        return reinterpret_cast<T *>(at_peers[rank] + (reinterpret_cast<uint8_t *>(at) - reinterpret_cast<uint8_t *>(head)));
    }
};

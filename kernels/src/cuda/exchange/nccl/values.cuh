// Rows of a message of few tokens, as F32 or BF16: how a thread holds, reads and writes its part.
#pragma once
#include "../../ptx.cuh"

constexpr int PACK_THREADS = 256;

// Sixteen bytes of a row: four F32 or eight BF16.
template <bool EXACT> struct Values {
    static constexpr int COUNT = EXACT ? 4 : 8;
    static DEVICE void read(const float *from, float (&v)[COUNT]) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            const float4 four = __ldcg(reinterpret_cast<const float4 *>(from + i));
            v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
        }
    }
    static DEVICE void write(float *to, const float (&v)[COUNT]) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) *reinterpret_cast<float4 *>(to + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
    }
    static DEVICE uint4 pack(const float (&v)[COUNT]) {
        if constexpr (EXACT)
            return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
        else
            return make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
    }
    static DEVICE void unpack(const uint4 &u, float (&v)[COUNT]) {
        const uint32_t words[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if constexpr (EXACT)
                v[i] = __uint_as_float(words[i]);
            else
                v[2 * i] = bf16_low(words[i]), v[2 * i + 1] = bf16_high(words[i]);
        }
    }
};

// One row by PACK_THREADS threads. It is read before the kernel waits, past the first-level cache: the kernel before last, or an
// earlier one, wrote it.
template <bool EXACT> struct PackedRow {
    using V = Values<EXACT>;
    static constexpr int AHEAD = EXACT ? 3 : 2;
    float v[AHEAD][V::COUNT];

    DEVICE void read(const float *from, int hidden) {
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const int u = threadIdx.x + a * PACK_THREADS;
            if (u < hidden / V::COUNT) V::read(from + u * V::COUNT, v[a]);
        }
    }
    DEVICE void write(uint8_t *to, const float *from, int hidden) {
        uint4 *units = reinterpret_cast<uint4 *>(to);
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const int u = threadIdx.x + a * PACK_THREADS;
            if (u < hidden / V::COUNT) units[u] = V::pack(v[a]);
        }
        for (int u = threadIdx.x + AHEAD * PACK_THREADS; u < hidden / V::COUNT; u += PACK_THREADS) {
            float more[V::COUNT];
            V::read(from + u * V::COUNT, more);
            units[u] = V::pack(more);
        }
    }
};

// A message that the choice of experts writes beside: see messages.cuh. `rows` null: none.
struct PackBeside {
    const float *normed;  // [count, hidden]
    uint8_t *rows;
    uint32_t *ids;
    float *weights;
    uint4 *head;
    const int *load;
    const uint64_t *begun;
    int row_bytes, hidden, exact;
};

// What both halves of the exchange of up to 128 tokens a rank share: everything travels in stamped 16-byte units, so nobody
// waits for a fence. Bytes: 4/3 of the rows.
#pragma once
#include "exchange.cuh"

constexpr int FEW_THREADS = 512;

// How values travel in a unit: three F32, or three pairs of BF16. Unit u of U has values (pairs) u, u + U and u + 2 U:
// neighbouring threads touch neighbouring ones.
template <bool EXACT> struct Packing {
    static constexpr int STEP = EXACT ? 1 : 2, VALUES = 3 * STEP;
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
    // The values of unit `u` of `units` in a row of `width`, which is even; zeros past its end.
    static DEVICE void load(const float *row, int u, int units, int width, float (&v)[VALUES]) {
#pragma unroll
        for (int i = 0; i < 3; i++) {
            const int at = (u + i * units) * STEP;
            if constexpr (EXACT) {
                v[i] = at < width ? row[at] : 0.f;
            } else {
                const float2 pair = at < width ? *reinterpret_cast<const float2 *>(row + at) : make_float2(0.f, 0.f);
                v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
            }
        }
    }
    static DEVICE void store(float *row, int u, int units, int width, const float (&v)[VALUES]) {
#pragma unroll
        for (int i = 0; i < 3; i++) {
            const int at = (u + i * units) * STEP;
            if (at >= width) continue;
            if constexpr (EXACT)
                row[at] = v[i];
            else
                *reinterpret_cast<float2 *>(row + at) = make_float2(v[2 * i], v[2 * i + 1]);
        }
    }
};

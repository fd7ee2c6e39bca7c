// What the products of dense weights share: how results leave.
#pragma once
#include "../../cuda/gemm.cuh"
#include "linear_params.cuh"

// A warp's 16 outputs of 32 tokens on their way out: through shared memory, so that four lanes write 64 bytes of a token.
constexpr int OUT_TOKENS = 32, OUT_STRIDE = TILE_ROWS + 4, OUT_FLOATS = OUT_TOKENS * OUT_STRIDE;

// Four outputs of one token at a time go to `out`: token, and the sums of columns 4t .. 4t + 4 of the warp's sixteen.
template <int N, int UNROLL = 4, class Out> DEVICE void leave(const float *acc, int first, int tokens, float *staged, int lane, const Out &out) {
    const int g = lane >> 2, t = lane & 3;
    float *to = staged + 2 * t * OUT_STRIDE + g;
    const float *from = staged + g * OUT_STRIDE + 4 * t;
#pragma unroll
    for (int round = 0; round < N / OUT_TOKENS; round++) {
#pragma unroll
        for (int j = 0; j < OUT_TOKENS / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) to[(8 * j + e % 2) * OUT_STRIDE + 8 * (e / 2)] = acc[4 * (round * (OUT_TOKENS / 8) + j) + e];
        __syncwarp();
#pragma unroll UNROLL
        for (int i = 0; i < 4; i++) {
            const int token = first + round * OUT_TOKENS + 8 * i + g;
            if (token < tokens) out(token, *reinterpret_cast<const float4 *>(from + 8 * i * OUT_STRIDE));
        }
        __syncwarp();
    }
}

// Sums acc[0 .. N / 2] of tile `at`, of the tokens from `first` to `end`. `staged`: OUT_FLOATS of this warp. A residual that lies in y itself
// is added there, without waiting for what it is: nobody else writes it. ONE_LOOP: for kernels whose registers run out; the others
// are faster with a loop for each way to leave.
template <int N, bool ONE_LOOP>
DEVICE void write_tile(const GemmParams &p, float *y, const float *residual, int at, int first, int end, const float *acc, float *staged, int lane) {
    const int column = at * TILE_ROWS + 4 * (lane & 3);
    const auto place = [&](int token) { return static_cast<size_t>(token) * p.width + column; };
    if constexpr (ONE_LOOP) {
        leave<N>(acc, first, column < p.width ? end : 0, staged, lane, [&](int token, float4 v) {
            float *to = y + place(token);
            const float *from = residual ? residual + place(token) : nullptr;
            if (p.width % 4) {
                const float value[4] = {v.x, v.y, v.z, v.w};
                for (int i = 0; i < 4 && column + i < p.width; i++) to[i] = value[i] + (from ? from[i] : 0.f);
            } else if (from == to) {
                add_results(to, v);
            } else {
                if (from) {
                    const float4 r = *reinterpret_cast<const float4 *>(from);
                    v = make_float4(v.x + r.x, v.y + r.y, v.z + r.z, v.w + r.w);
                }
                *reinterpret_cast<float4 *>(to) = v;
            }
        });
    } else {
        if (p.width % 4 == 0) {
            // Past the width there is no output.
            const int tokens = column < p.width ? end : 0;
            if (residual == y) {
                leave<N>(acc, first, tokens, staged, lane, [&](int token, float4 v) {
                    add_results(y + place(token), v);
                });
            } else {
                leave<N>(acc, first, tokens, staged, lane, [&](int token, float4 v) {
                    if (residual) {
                        const float4 r = *reinterpret_cast<const float4 *>(residual + place(token));
                        v = make_float4(v.x + r.x, v.y + r.y, v.z + r.z, v.w + r.w);
                    }
                    *reinterpret_cast<float4 *>(y + place(token)) = v;
                });
            }
        } else {
            leave<N, 1>(acc, first, end, staged, lane, [&](int token, float4 v) {
                const float value[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (column + i < p.width) y[place(token) + i] = value[i] + (residual ? residual[place(token) + i] : 0.f);
            });
        }
    }
}

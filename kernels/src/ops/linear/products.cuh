// What the products of dense weights share: parameters, and how results leave.
#pragma once
#include "../../cuda/gemm.cuh"

constexpr int LINEAR_SEGMENTS = 3;

struct GemmParams {
    Weight segments[LINEAR_SEGMENTS];
    const uint8_t *plane;  // [K / 64 or, quantised, K / 128][blocks][1024]
    float *y;              // [parts][tokens, width]
    const float *residual; // or null
    int tokens, blocks, width, tiles, steps, parts;
};

// The segment that `tile` lies in; `tile` becomes its place there.
DEVICE const Weight &segment_of(const GemmParams &p, int &tile) {
    if (tile < p.segments[0].tiles) return p.segments[0];
    tile -= p.segments[0].tiles;
    if (tile < p.segments[1].tiles) return p.segments[1];
    tile -= p.segments[1].tiles;
    return p.segments[2];
}

// Outputs column .. column + 4 of a token.
DEVICE void write_outputs(const GemmParams &p, float *to, int column, float4 v) {
    if (p.width % 4 == 0) {
        if (column < p.width) *reinterpret_cast<float4 *>(to) = v;
        return;
    }
    const float value[4] = {v.x, v.y, v.z, v.w};
    for (int i = 0; i < 4 && column + i < p.width; i++) to[i] = value[i];
}

DEVICE float4 read_residual(const GemmParams &p, const float *from, int column) {
    if (p.width % 4 == 0) return column < p.width ? *reinterpret_cast<const float4 *>(from) : make_float4(0.f, 0.f, 0.f, 0.f);
    float value[4] = {};
    for (int i = 0; i < 4 && column + i < p.width; i++) value[i] = from[i];
    return make_float4(value[0], value[1], value[2], value[3]);
}

// A warp's 16 outputs of 32 tokens on their way out: through shared memory, so that four lanes write 64 bytes of a token.
constexpr int OUT_TOKENS = 32, OUT_STRIDE = TILE_ROWS + 4, OUT_FLOATS = OUT_TOKENS * OUT_STRIDE;

// Sums acc[0 .. N / 2] of tile `at`, of the tokens from `first` on. `staged`: OUT_FLOATS of this warp.
template <int N>
DEVICE void write_tile(const GemmParams &p, float *y, const float *residual, int at, int first, const float *acc, float *staged, int lane) {
    const int g = lane >> 2, t = lane & 3, column = at * TILE_ROWS + 4 * t;
#pragma unroll
    for (int round = 0; round < N / OUT_TOKENS; round++) {
        const int token = first + round * OUT_TOKENS + g;
        float4 v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            v[i] = make_float4(0.f, 0.f, 0.f, 0.f);
            if (residual && token + 8 * i < p.tokens) v[i] = read_residual(p, residual + static_cast<size_t>(token + 8 * i) * p.width + column, column);
        }
#pragma unroll
        for (int j = 0; j < OUT_TOKENS / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                staged[(8 * j + 2 * t + e % 2) * OUT_STRIDE + g + 8 * (e / 2)] = acc[4 * (round * (OUT_TOKENS / 8) + j) + e];
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float4 sum = *reinterpret_cast<const float4 *>(staged + (8 * i + g) * OUT_STRIDE + 4 * t);
            v[i].x += sum.x, v[i].y += sum.y, v[i].z += sum.z, v[i].w += sum.w;
            if (token + 8 * i < p.tokens) write_outputs(p, y + static_cast<size_t>(token + 8 * i) * p.width + column, column, v[i]);
        }
        __syncwarp();
    }
}

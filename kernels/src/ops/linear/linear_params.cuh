// Parameters of the products of dense weights with planes.
#pragma once
#include "../../cuda/stream.cuh"

constexpr int LINEAR_SEGMENTS = 3;

// How a dense product by pairs of blocks is shared out (wide_shares.cuh): rows whose tokens are multiplied before the next rows' are, in pairs of 128; how many such pairs
// at the end have so many whole tiles of 256 tokens alone, and into how many shares the tokens behind those are cut.
struct WideCut {
    int band, pairs, whole, cuts;
};

struct GemmParams {
    Weight segments[LINEAR_SEGMENTS];
    const uint8_t *plane;  // [K / 64 or, quantised, K / 128][blocks][1024]
    float *y;              // [parts][tokens, width]; wide_staged.cu, quantised.cu: or that many BF16
    const float *residual; // or null
    int tokens, blocks, width, tiles, steps, parts;
    WideCut cut;
};

// Parameters of the products of dense weights with planes.
#pragma once
#include "../../cuda/stream.cuh"

constexpr int LINEAR_SEGMENTS = 3;

struct GemmParams {
    Weight segments[LINEAR_SEGMENTS];
    const uint8_t *plane;  // [K / 64 or, quantised, K / 128][blocks][1024]
    float *y;              // [parts][tokens, width]; wide_staged.cu, quantised.cu: or that many BF16
    const float *residual; // or null
    int tokens, blocks, width, tiles, steps, parts;
};

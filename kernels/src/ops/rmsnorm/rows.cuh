// The norm of one row by one block, as the kernels that end with it share it.
#pragma once
#include "../../cuda/gemv.cuh"
#include "../../cuda/plane.cuh"
#include "../../cuda/quantised.cuh"

struct NormRows {
    NormInput input;       // weight null: no norm, y = h
    const uint32_t *rows;  // input row of output row r; null: r
    float *normed;         // [rows, k] or null
    uint8_t *plane;        // or null
    uint8_t *quantised;    // quantised plane, or null
    int padded, plane_blocks;
    int bf16_parts;        // input.x1 is BF16
    // There is a place for it.
    __device__ __forceinline__ bool wanted() const { return normed || plane || quantised; }
};

constexpr int NORM_THREADS = 512;

// Writes the row in `y` quantised: the values of two warps share a scale.
template <int PAIRS> DEVICE void quantise_row(const NormRows &p, int row, const float2 (&y)[PAIRS]) {
    __shared__ float largest[PAIRS][NORM_THREADS / WARP];
    const int warp = threadIdx.x / WARP;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const float most = warp_max(fmaxf(fabsf(y[i].x), fabsf(y[i].y)));
        if (threadIdx.x % WARP == 0) largest[i][warp] = most;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int k = 2 * (threadIdx.x + i * NORM_THREADS);
        if (k >= p.padded) break;
        const QuantisedScale scale(fmaxf(largest[i][warp], largest[i][warp ^ 1]));
        // The neighbour has the other two of four inputs.
        const uint32_t own = scale.quantise(y[i].x, y[i].y, 0.f, 0.f), next = __shfl_down_sync(ALL_LANES, own, 1);
        if (k % 4 == 0) *reinterpret_cast<uint32_t *>(p.quantised + quantised_offset(row, k, p.plane_blocks)) = __byte_perm(own, next, 0x5140);
        if (k % 128 == 0) *reinterpret_cast<float *>(p.quantised + quantised_scale(row, k / 128, p.padded / 128, p.plane_blocks)) = scale.scale;
    }
}

// The thread's weights of a norm, to be requested before the row is there.
template <int PAIRS> DEVICE void norm_weights(const NormRows &p, float2 (&w)[PAIRS]) {
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int k = 2 * (threadIdx.x + i * NORM_THREADS);
        w[i] = make_float2(1.f, 1.f);
        if (p.input.weight && k < p.input.k) w[i] = __ldg(reinterpret_cast<const float2 *>(p.input.weight + k));
    }
}

// Normalises the row in `v` (PAIRS * 1024 values at most) and writes it out.
template <int PAIRS>
DEVICE void finish_row(const NormRows &p, int row, const float2 (&v)[PAIRS], const float2 (&w)[PAIRS], float *scratch) {
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) squares += v[i].x * v[i].x + v[i].y * v[i].y;
    const float inverse = p.input.weight ? rsqrtf(block_sum(squares, scratch) / p.input.k + p.input.eps) : 1.f;
    float2 out[PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int k = 2 * (threadIdx.x + i * NORM_THREADS);
        float2 &y = out[i];
        y = make_float2(0.f, 0.f);
        if (2 * i * NORM_THREADS >= p.padded) break;
        if (k < p.input.k) {
            y.x = v[i].x * inverse * w[i].x, y.y = v[i].y * inverse * w[i].y;
            if (p.normed) *reinterpret_cast<float2 *>(p.normed + static_cast<size_t>(row) * p.input.k + k) = y;
        }
        if (p.plane && k < p.padded)
            *reinterpret_cast<uint32_t *>(p.plane + plane_offset(row, k, p.plane_blocks)) = pack_bf16(y.x, y.y);
    }
    if (p.quantised) quantise_row<PAIRS>(p, row, out);
}

template <int PAIRS> DEVICE void finish_row(const NormRows &p, int row, const float2 (&v)[PAIRS], float *scratch) {
    float2 w[PAIRS];
    norm_weights(p, w);
    finish_row(p, row, v, w, scratch);
}

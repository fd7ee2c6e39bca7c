// From the residual stream to the next linear's input: h = x0 + the parts x1, y = h / rms(h) * weight, as F32 (few tokens) and
// as a plane (many).
// One block a row, registers hold the row between the two passes' worth of arithmetic; bytes: rows once in, once out.
#include "combine.cuh"

// The thread's values of a row from `at` on, zeros past its end.
template <int PAIRS> DEVICE void load_pairs(const float *values, size_t at, int width, float2 (&v)[PAIRS], bool bf16 = false) {
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int k = 2 * (threadIdx.x + i * NORM_THREADS);
        v[i] = make_float2(0.f, 0.f);
        if (k >= width) continue;
        v[i] = bf16 ? __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(reinterpret_cast<const __nv_bfloat16 *>(values) + at + k))
                    : *reinterpret_cast<const float2 *>(values + at + k);
    }
}

template <int PAIRS> DEVICE void norm_rows(const NormRows &p) {
    __shared__ float scratch[NORM_THREADS / WARP];
    float2 weight[PAIRS];
    norm_weights(p, weight);
    wait_for_inputs();
    allow_next_kernel();
    const int row = blockIdx.x;
    const size_t from = static_cast<size_t>(p.rows ? p.rows[row] : row) * p.input.k;
    float2 v[PAIRS];
    load_pairs(p.input.x0, from, p.input.k, v);
    // Some parts at a time, so that all their values are on their way together.
    constexpr int AHEAD = PAIRS <= 3 ? 4 : 1;
#pragma unroll 1
    for (int first = 0; first < p.input.more; first += AHEAD) {
        float2 more[AHEAD][PAIRS];
#pragma unroll
        for (int a = 0; a < AHEAD; a++)
            load_pairs(p.input.x1, static_cast<size_t>(first + a) * p.input.stride + from, first + a < p.input.more ? p.input.k : 0, more[a], p.bf16_parts);
#pragma unroll
        for (int a = 0; a < AHEAD; a++)
#pragma unroll
            for (int i = 0; i < PAIRS; i++) v[i].x += more[a][i].x, v[i].y += more[a][i].y;
    }
    if (p.input.sum_out) {
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const int k = 2 * (threadIdx.x + i * NORM_THREADS);
            if (k < p.input.k) *reinterpret_cast<float2 *>(p.input.sum_out + from + k) = v[i];
        }
    }
    finish_row(p, row, v, weight, scratch);
}

template <int PAIRS> DEVICE void combine_rows(const CombineRows &p) {
    __shared__ float scratch[NORM_THREADS / WARP];
    float2 weight[PAIRS];
    norm_weights(p.norm, weight);
    wait_for_inputs();
    allow_next_kernel();
    const int row = blockIdx.x, width = p.norm.input.k;
    const size_t from = static_cast<size_t>(row) * width;
    float2 v[PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int k = 2 * (threadIdx.x + i * NORM_THREADS);
        v[i] = make_float2(0.f, 0.f);
        if (k >= width) continue;
        float2 sum = make_float2(0.f, 0.f);
#pragma unroll 4
        for (int j = 0; j < p.slots; j++) {
            const float w = p.weights[row * p.slots + j];
            const size_t slot = static_cast<size_t>(row) * p.slots + j;
            float2 y;
            if (p.y) {
                y = *reinterpret_cast<const float2 *>(p.y + slot * width + k);
            } else {
                const size_t from = static_cast<size_t>(p.row_of_slot[slot]) * width + k;
                y = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(p.sorted + from));
            }
            sum.x = fmaf(w, y.x, sum.x), sum.y = fmaf(w, y.y, sum.y);
        }
        v[i] = *reinterpret_cast<const float2 *>(p.norm.input.x0 + from + k);
        v[i].x += sum.x, v[i].y += sum.y;
        *reinterpret_cast<float2 *>(p.norm.input.sum_out + from + k) = v[i];
    }
    if (p.norm.wanted()) finish_row(p.norm, row, v, weight, scratch);
}

#define ROWS(PAIRS)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(NORM_THREADS)                                                         \
        norm_rows_##PAIRS(const __grid_constant__ NormRows p) { norm_rows<PAIRS>(p); }                                 \
    extern "C" __global__ void __launch_bounds__(NORM_THREADS)                                                         \
        combine_rows_##PAIRS(const __grid_constant__ CombineRows p) { combine_rows<PAIRS>(p); }
ROWS(3)
ROWS(6)
ROWS(16)

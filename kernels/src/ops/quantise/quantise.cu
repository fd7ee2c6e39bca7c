// A plane of BF16 becomes a quantised plane (plane.cuh): for each row, for each 128 inputs, e4m3 and a scale.
//
// Eight threads a (row, chunk), sixteen values each. Bytes: 3 a value, scales apart.
#include <cuda_fp8.h>

#include "../../cuda/plane.cuh"
#include "../../cuda/quantised.cuh"

struct QuantiseParams {
    const uint8_t *plane;
    uint8_t *quantised;
    const int *count;  // rows, on the device; null: `rows`
    int rows, chunks;  // chunks of 128 inputs
    int blocks;        // of both planes
};

constexpr int QUANTISE_THREADS = 256, QUANTISE_ROWS = 32;

extern "C" __global__ void __launch_bounds__(QUANTISE_THREADS) quantise_plane(const __grid_constant__ QuantiseParams p) {
    wait_for_inputs();
    allow_next_kernel();
    const int rows = p.count ? min(*p.count, p.rows) : p.rows, s = threadIdx.x % 8, in_tile = threadIdx.x / 8;
    const int tiles = ceil_div(rows, QUANTISE_ROWS);
    for (int w = blockIdx.x; w < tiles * p.chunks; w += gridDim.x) {
        const int chunk = w / tiles, row = w % tiles * QUANTISE_ROWS + in_tile, r = row % PLANE_ROWS;
        if (row >= rows) continue;  // all eight threads of a row
        const unsigned lanes = 0xffu << (threadIdx.x & 24);
        const uint8_t *from =
            p.plane + (static_cast<size_t>(2 * chunk + s / 4) * p.blocks + row / PLANE_ROWS) * PLANE_BLOCK + r * 128;
        // Product s % 4 of the chunk of 64: first the inputs 0 and 1 of each lane's four, then 2 and 3.
        const int unit = s % 4 * 2;
        const uint4 first = *reinterpret_cast<const uint4 *>(from + ((unit ^ r) * 16));
        const uint4 second = *reinterpret_cast<const uint4 *>(from + (((unit + 1) ^ r) * 16));
        const uint32_t low[4] = {first.x, first.y, first.z, first.w}, high[4] = {second.x, second.y, second.z, second.w};
        float largest = 0.f;
#pragma unroll
        for (int t = 0; t < 4; t++) {
            largest = fmaxf(largest, fmaxf(fabsf(bf16_low(low[t])), fabsf(bf16_high(low[t]))));
            largest = fmaxf(largest, fmaxf(fabsf(bf16_low(high[t])), fabsf(bf16_high(high[t]))));
        }
#pragma unroll
        for (int offset = 1; offset < 8; offset *= 2) largest = fmaxf(largest, __shfl_xor_sync(lanes, largest, offset));
        const QuantisedScale scale(largest);
        // Of four inputs 0, 2, 1 and 3.
        uint32_t out[4];
#pragma unroll
        for (int t = 0; t < 4; t++)
            out[t] = scale.quantise(bf16_low(low[t]), bf16_low(high[t]), bf16_high(low[t]), bf16_high(high[t]));
        uint8_t *to = p.quantised + (static_cast<size_t>(chunk) * p.blocks + row / PLANE_ROWS) * PLANE_BLOCK + r * 128;
        *reinterpret_cast<uint4 *>(to + ((s ^ r) * 16)) = make_uint4(out[0], out[1], out[2], out[3]);
        if (s == 0) *reinterpret_cast<float *>(p.quantised + quantised_scale(row, chunk, p.chunks, p.blocks)) = scale.scale;
    }
}

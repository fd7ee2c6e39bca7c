// Ceilings, measured: how fast this device reads, and how fast its tensor cores multiply random numbers.
#include "gemm.cuh"

struct ReadParams {
    const uint4 *data;
    unsigned long long units;  // of 16 bytes
    uint32_t *sink;
};

// Reads everything once: eight independent 16-byte loads a thread.
extern "C" __global__ void __launch_bounds__(512) probe_read(const __grid_constant__ ReadParams p) {
    const unsigned long long stride = static_cast<unsigned long long>(gridDim.x) * blockDim.x;
    unsigned long long at = static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    uint32_t sum = 0;
    for (; at + 7 * stride < p.units; at += 8 * stride) {
        uint4 v[8];
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = __ldcs(p.data + at + i * stride);
#pragma unroll
        for (int i = 0; i < 8; i++) sum ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
    }
    if (sum == 0x9e3779b9u) *p.sink = sum;
}

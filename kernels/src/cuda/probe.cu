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

struct MultiplyParams {
    uint32_t *sink;
    int rounds;
};

constexpr int PROBE_THREADS = 256, PROBE_PLANE = 2 * GEMM_COLUMNS * 128;

// A pair of random bf16 numbers between -2 and 2.
DEVICE uint32_t probe_pair(uint32_t seed) {
    uint32_t x = seed * 0x9e3779b9u;
    x = (x ^ x >> 16) * 0x85ebca6bu;
    x = (x ^ x >> 13) * 0xc2b2ae35u;
    return (x & 0x807f807fu) | 0x3f003f00u | (x >> 3 & 0x00800080u);
}

// Products of random numbers as `consume` issues them (weights in registers, 128 columns in shared memory), and nothing
// else: 2 warpgroups x 2 sets x 8 products of 64 x 128 x 16 a round.
extern "C" __global__ void __launch_bounds__(PROBE_THREADS) probe_multiply(const __grid_constant__ MultiplyParams p) {
    extern __shared__ uint8_t shared[];
    uint8_t *plane = shared + (-shared_address(shared) & 1023);
    for (int at = threadIdx.x * 4; at < PROBE_PLANE; at += PROBE_THREADS * 4)
        *reinterpret_cast<uint32_t *>(plane + at) = probe_pair(at + blockIdx.x);
    asm volatile("fence.proxy.async;" ::: "memory");
    __syncthreads();
    const uint32_t address = shared_address(plane);
    float acc[2][64];
    uint32_t a[2][2][4];
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int i = 0; i < 64; i++) acc[h][i] = 0.f;
#pragma unroll
        for (int i = 0; i < 8; i++) a[i / 4][h][i % 4] = probe_pair((threadIdx.x * 2 + h) * 8 + i);
    }
    for (int round = 0; round < p.rounds; round++) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint64_t b = plane_descriptor(address + (i / 4) * (GEMM_COLUMNS * 128) + (i % 4) * 32);
            products_begin();
#pragma unroll
            for (int h = 0; h < 2; h++) FewProduct<GEMM_COLUMNS>::run<true>(acc[h], a[i & 1][h], b);
            products_end();
            products_wait<1>();
        }
    }
    products_wait<0>();
    float sum = 0.f;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        hold(acc[h]);
#pragma unroll
        for (int i = 0; i < 64; i++) sum += acc[h][i];
    }
    if (__float_as_uint(sum) == 0x9e3779b9u) *p.sink = 1;
}

// Rows of the residual stream of many tokens to the next products' planes: y = x / rms(x) * weight.
//
// A block of 128 threads a row, so that many rows are on their way; a thread has, of 32 inputs, the pairs c, 8 + c, 16 + c and
// 24 + c: sixteen bytes of a plane, and sixteen lanes have the 128 inputs that share a scale. Bytes: 4 a value in, 2 or 1 out.
#include "../../cuda/plane.cuh"
#include "../../cuda/quantised.cuh"

struct NormMany {
    const float *x;       // [rows, width]
    const float *weight;  // [width]
    uint8_t *plane;       // or null
    uint8_t *quantised;   // quantised plane, or null
    float eps;
    int width, padded, plane_blocks;
};

constexpr int MANY_THREADS = 128;

template <int PASSES> DEVICE void norm_many(const NormMany &p) {
    __shared__ float scratch[MANY_THREADS / WARP];
    wait_for_inputs();
    allow_next_kernel();
    const int row = blockIdx.x, r = row % PLANE_ROWS, c = threadIdx.x % 4 * 2, odd = threadIdx.x % 2;
    const float *x = p.x + static_cast<size_t>(row) * p.width;
    float2 v[PASSES][4];
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < PASSES; i++)
#pragma unroll
        for (int t = 0; t < 4; t++) {
            const int k = (threadIdx.x + i * MANY_THREADS) / 4 * 32 + 8 * t + c;
            v[i][t] = k < p.width ? *reinterpret_cast<const float2 *>(x + k) : make_float2(0.f, 0.f);
            squares += v[i][t].x * v[i][t].x + v[i][t].y * v[i][t].y;
        }
    const float inverse = rsqrtf(block_sum(squares, scratch) / p.width + p.eps);
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
        const int group = (threadIdx.x + i * MANY_THREADS) / 4;
        // All sixteen lanes of 128 inputs: rows are padded to those.
        if (group * 32 >= p.padded) break;
        float largest = 0.f;
        uint32_t words[4];
#pragma unroll
        for (int t = 0; t < 4; t++) {
            const int k = group * 32 + 8 * t + c;
            const float2 w = k < p.width ? *reinterpret_cast<const float2 *>(p.weight + k) : make_float2(0.f, 0.f);
            v[i][t].x *= inverse * w.x, v[i][t].y *= inverse * w.y;
            largest = fmaxf(largest, fmaxf(fabsf(v[i][t].x), fabsf(v[i][t].y)));
            words[t] = pack_bf16(v[i][t].x, v[i][t].y);
        }
        if (p.plane) {
            const int unit = 4 * (group % 2) + c / 2;
            *reinterpret_cast<uint4 *>(p.plane + (static_cast<size_t>(group / 2) * p.plane_blocks + row / PLANE_ROWS) * PLANE_BLOCK + r * 128 +
                                       ((unit ^ r) * 16)) = make_uint4(words[0], words[1], words[2], words[3]);
        }
        if (p.quantised) {
            const unsigned lanes = 0xffffu << (threadIdx.x & 16);
#pragma unroll
            for (int offset = 1; offset < 16; offset *= 2) largest = fmaxf(largest, __shfl_xor_sync(lanes, largest, offset));
            const QuantisedScale scale(largest);
            // Pairs t = 0, 1 and t = 2, 3; the neighbour has the other two of each four inputs.
            const uint32_t low = scale.quantise(v[i][0].x, v[i][0].y, v[i][1].x, v[i][1].y);
            const uint32_t high = scale.quantise(v[i][2].x, v[i][2].y, v[i][3].x, v[i][3].y);
            const uint32_t got = __shfl_xor_sync(lanes, odd ? low : high, 1);
            const uint32_t first = odd ? got : low, second = odd ? high : got;
            const uint2 out = make_uint2(__byte_perm(first, second, 0x5140), __byte_perm(first, second, 0x7362));
            *reinterpret_cast<uint2 *>(p.quantised + quantised_offset(row, group * 32 + c / 4 * 4 + 16 * odd, p.plane_blocks)) = out;
            if (threadIdx.x % 16 == 0)
                *reinterpret_cast<float *>(p.quantised + quantised_scale(row, group / 4, p.padded / 128, p.plane_blocks)) = scale.scale;
        }
    }
}

#define MANY(PASSES)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(MANY_THREADS)                                                         \
        norm_many_##PASSES(const __grid_constant__ NormMany p) { norm_many<PASSES>(p); }
MANY(3)
MANY(6)
MANY(16)

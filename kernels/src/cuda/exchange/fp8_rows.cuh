// How a row of many tokens travels as FP8, over either transport: E4M3 with a scale per 128 values.
#pragma once
#include <cuda_fp8.h>

#include "../ptx.cuh"

constexpr float FP8_LARGEST = 448.f;

// Eight values to E4M3 with the scale of 16 lanes' 128.
DEVICE uint2 to_fp8(const uint4 &v, float &scale) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    float x[8], largest = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = bf16_low(words[i]), x[2 * i + 1] = bf16_high(words[i]);
        largest = fmaxf(largest, fmaxf(fabsf(x[2 * i]), fabsf(x[2 * i + 1])));
    }
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, offset));
    scale = largest * (1.f / FP8_LARGEST);
    const float inverse = largest > 0.f ? FP8_LARGEST / largest : 0.f;
    uint32_t out[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t pair = __nv_cvt_float2_to_fp8x2(make_float2(x[2 * i] * inverse, x[2 * i + 1] * inverse), __NV_SATFINITE, __NV_E4M3);
        out[i / 2] |= pair << (i % 2 * 16);
    }
    return make_uint2(out[0], out[1]);
}

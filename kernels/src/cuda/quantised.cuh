// How 128 values become e4m3 and one scale; ops/quantise/cpu.rs is the definition.
#pragma once
#include <cuda_fp8.h>
#include <stdint.h>

struct QuantisedScale {
    float scale;
    __device__ __forceinline__ explicit QuantisedScale(float largest) : scale(fmaxf(largest, 1e-10f) * (1.f / 448.f)) {}
    // Four values as four bytes, the first one lowest.
    __device__ __forceinline__ uint32_t quantise(float a, float b, float c, float d) const {
        const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(__fdiv_rn(a, scale), __fdiv_rn(b, scale)), __NV_SATFINITE, __NV_E4M3);
        const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(__fdiv_rn(c, scale), __fdiv_rn(d, scale)), __NV_SATFINITE, __NV_E4M3);
        return low | high << 16;
    }
};

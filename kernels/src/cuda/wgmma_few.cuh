// Warpgroup products of 32 to 128 tokens with the weights in registers: D[64, N] = A[64, 16] B[16, N], `ADD`: added to what D holds. See
// wgmma.cuh.
#pragma once
#include "wgmma.cuh"
#include "wgmma_lists.cuh"

// The descriptor of what lies `bytes` behind `plane`'s.
DEVICE uint64_t descriptor_behind(uint64_t plane, int bytes) {
    uint64_t behind;
    asm("{\n.reg .b32 low, high;\nmov.b64 {low, high}, %1;\nadd.u32 low, low, %2;\nmov.b64 %0, {low, high};\n}\n" : "=l"(behind) : "l"(plane), "r"(bytes / 16));
    return behind;
}

template <int N> struct FewProduct;

#define FEW_PRODUCT(n, sum_count, names, sums, weights_and_tokens, add_name)                                                    \
    template <> struct FewProduct<n> {                                                                                          \
        template <bool ADD> static __device__ __forceinline__ void run(float (&d)[sum_count], const uint32_t (&a)[4], uint64_t b) { \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" names "}, " weights_and_tokens            \
                         ", " add_name ", 1, 1, 0;"                                                                             \
                         : sums                                                                                                 \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(static_cast<int>(ADD)));                     \
        }                                                                                                                       \
    };

FEW_PRODUCT(32, 16, WGMMA_NAMES_16, WGMMA_SUMS_16, "{%16, %17, %18, %19}, %20", "%21")
FEW_PRODUCT(64, 32, WGMMA_NAMES_32, WGMMA_SUMS_32, "{%32, %33, %34, %35}, %36", "%37")
FEW_PRODUCT(96, 48, WGMMA_NAMES_48, WGMMA_SUMS_48, "{%48, %49, %50, %51}, %52", "%53")
FEW_PRODUCT(128, 64, WGMMA_NAMES_64, WGMMA_SUMS_64, "{%64, %65, %66, %67}, %68", "%69")

#undef FEW_PRODUCT

// Warpgroup products 64 x up to 256 with the weights in registers: D[64, N] += A[64, 16] B[16, N], where N is a multiple of 8 and D the first N / 2
// of 128 registers. See wgmma.cuh.
#pragma once
#include "wgmma.cuh"
#include "wgmma_lists.cuh"

constexpr int WIDE_SUMS = 128;

template <int N> struct WideProduct;

#define WIDE_PRODUCT(n, names, sums, weights_and_tokens)                                                                        \
    template <> struct WideProduct<n> {                                                                                         \
        static __device__ __forceinline__ void run(float (&d)[WIDE_SUMS], const uint32_t (&a)[4], uint64_t b) {                 \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" names "}, " weights_and_tokens            \
                         ", 1, 1, 1, 0;"                                                                                        \
                         : sums                                                                                                 \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                 \
        }                                                                                                                       \
    };

WIDE_PRODUCT(32, WGMMA_NAMES_16, WGMMA_SUMS_16, "{%16, %17, %18, %19}, %20")
WIDE_PRODUCT(64, WGMMA_NAMES_32, WGMMA_SUMS_32, "{%32, %33, %34, %35}, %36")
WIDE_PRODUCT(96, WGMMA_NAMES_48, WGMMA_SUMS_48, "{%48, %49, %50, %51}, %52")
WIDE_PRODUCT(128, WGMMA_NAMES_64, WGMMA_SUMS_64, "{%64, %65, %66, %67}, %68")
WIDE_PRODUCT(160, WGMMA_NAMES_80, WGMMA_SUMS_80, "{%80, %81, %82, %83}, %84")
WIDE_PRODUCT(192, WGMMA_NAMES_96, WGMMA_SUMS_96, "{%96, %97, %98, %99}, %100")
WIDE_PRODUCT(200, WGMMA_NAMES_100, WGMMA_SUMS_100, "{%100, %101, %102, %103}, %104")
WIDE_PRODUCT(224, WGMMA_NAMES_112, WGMMA_SUMS_112, "{%112, %113, %114, %115}, %116")
WIDE_PRODUCT(240, WGMMA_NAMES_120, WGMMA_SUMS_120, "{%120, %121, %122, %123}, %124")
WIDE_PRODUCT(256, WGMMA_NAMES_128, WGMMA_SUMS_128, "{%128, %129, %130, %131}, %132")

#undef WIDE_PRODUCT

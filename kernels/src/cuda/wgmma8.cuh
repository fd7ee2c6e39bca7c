// Warpgroup products of e4m3 with the weights in registers: D[64, N] = A[64, 32] B[32, N] (+ D if `add`), B in shared memory
// as a quantised plane (plane.cuh). A and D lie in the four warps as sixteen rows each; lane (g, t) of a warp holds
// A: (g, 4t..), (g + 8, 4t..), (g, 4t + 16..), (g + 8, 4t + 16..), D as in wgmma.cuh.
#pragma once
#include "wgmma.cuh"
#include "wgmma_lists.cuh"

template <int N> struct Product8;

#define PRODUCT_8(n, sum_count, names, sums, weights_and_tokens, add_name)                                                     \
    template <> struct Product8<n> {                                                                                            \
        static __device__ __forceinline__ void run(float (&d)[sum_count], const uint32_t (&a)[4], uint64_t b, bool add) {       \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add_name ", 0;\n"                                                  \
                         "wgmma.mma_async.sync.aligned.m64n" #n "k32.f32.e4m3.e4m3 {" names "}, " weights_and_tokens            \
                         ", p, 1, 1;\n}\n"                                                                                      \
                         : sums                                                                                                 \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));                     \
        }                                                                                                                       \
    };

PRODUCT_8(32, 16, WGMMA_NAMES_16, WGMMA_SUMS_16, "{%16, %17, %18, %19}, %20", "%21")
PRODUCT_8(64, 32, WGMMA_NAMES_32, WGMMA_SUMS_32, "{%32, %33, %34, %35}, %36", "%37")
PRODUCT_8(96, 48, WGMMA_NAMES_48, WGMMA_SUMS_48, "{%48, %49, %50, %51}, %52", "%53")
PRODUCT_8(128, 64, WGMMA_NAMES_64, WGMMA_SUMS_64, "{%64, %65, %66, %67}, %68", "%69")

#undef PRODUCT_8

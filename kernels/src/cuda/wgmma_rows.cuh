// Warpgroup products of BF16, both operands in shared memory as rows of 128 bytes (plane.cuh): D[64, N] += A[64, 16] B[N, 16]^T. D lies in the first N / 2 of
// 128 registers as in wgmma_wide.cuh.
#pragma once
#include "wgmma.cuh"
#include "wgmma_lists.cuh"

template <int N> struct RowsProduct;

#define ROWS_PRODUCT(n, names, sums, operands)                                                                                  \
    template <> struct RowsProduct<n> {                                                                                         \
        static __device__ __forceinline__ void run(float (&d)[128], uint64_t a, uint64_t b) {                                   \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" names "}, " operands ", 1, 1, 1, 0, 0;"   \
                         : sums                                                                                                 \
                         : "l"(a), "l"(b));                                                                                     \
        }                                                                                                                       \
    };

ROWS_PRODUCT(128, WGMMA_NAMES_64, WGMMA_SUMS_64, "%64, %65")
ROWS_PRODUCT(200, WGMMA_NAMES_100, WGMMA_SUMS_100, "%100, %101")
ROWS_PRODUCT(240, WGMMA_NAMES_120, WGMMA_SUMS_120, "%120, %121")
ROWS_PRODUCT(256, WGMMA_NAMES_128, WGMMA_SUMS_128, "%128, %129")

#undef ROWS_PRODUCT

// A place in shared memory as an operand: the low word of its `plane_descriptor`.
DEVICE uint64_t rows_operand(uint32_t place) { return 64ull << 32 | 1ull << 62 | place; }

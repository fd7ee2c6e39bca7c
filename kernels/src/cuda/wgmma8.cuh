// Warpgroup products of e4m3, both operands in shared memory: D[64, N] = A[64, 32] B[N, 32]^T (+ D if `add`), rows of 128 bytes as in a quantised
// plane (plane.cuh). D lies in the four warps as sixteen rows each; lane (g, t) of a warp has rows g and g + 8, columns 8j + 2t and the next one.
#pragma once
#include "wgmma.cuh"
#include "wgmma_lists.cuh"

// A place in shared memory as an operand: the low word of its `plane_descriptor`.
DEVICE uint64_t operand8(uint32_t place) { return 64ull << 32 | 1ull << 62 | place; }

template <int N> struct Product8;

#define PRODUCT8(n, sum_count, names, sums, a_and_b, add_name)                                                                  \
    template <> struct Product8<n> {                                                                                            \
        static __device__ __forceinline__ void run(float (&d)[sum_count], uint64_t a, uint64_t b, bool add) {                   \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add_name ", 0;\n"                                                  \
                         "wgmma.mma_async.sync.aligned.m64n" #n "k32.f32.e4m3.e4m3 {" names "}, " a_and_b ", p, 1, 1;\n}\n"     \
                         : sums                                                                                                 \
                         : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                                         \
        }                                                                                                                       \
    };

PRODUCT8(32, 16, WGMMA_NAMES_16, WGMMA_SUMS_16, "%16, %17", "%18")
PRODUCT8(64, 32, WGMMA_NAMES_32, WGMMA_SUMS_32, "%32, %33", "%34")
PRODUCT8(96, 48, WGMMA_NAMES_48, WGMMA_SUMS_48, "%48, %49", "%50")
PRODUCT8(128, 64, WGMMA_NAMES_64, WGMMA_SUMS_64, "%64, %65", "%66")

#undef PRODUCT8

template <int SUMS> DEVICE void product8(float (&d)[SUMS], uint64_t a, uint64_t b, bool add) { Product8<2 * SUMS>::run(d, a, b, add); }

// Warpgroup products of e4m3, both operands in shared memory: D[64, 128] = A[64, 32] B[128, 32]^T (+ D if `add`), rows of 128 bytes as in a quantised
// plane (plane.cuh). D lies in the four warps as sixteen rows each; lane (g, t) of a warp has rows g and g + 8, columns 8j + 2t and the next one.
#pragma once
#include "wgmma.cuh"
#include "wgmma_lists.cuh"

// A place in shared memory as an operand: the low word of its `plane_descriptor`.
DEVICE uint64_t operand8(uint32_t place) { return 64ull << 32 | 1ull << 62 | place; }

DEVICE void product8(float (&d)[64], uint64_t a, uint64_t b, bool add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" WGMMA_NAMES_64 "}, %64, %65, p, 1, 1;\n}\n"
                 : WGMMA_SUMS_64
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

// What warpgroup products with the weights in registers share: D[64, N] += A[64, 16] B[16, N], B in shared memory as a plane
// (plane.cuh). A and D lie in the four warps as sixteen rows each, inside a warp as in `mma.m16n8k16`. wgmma_few.cuh and wgmma_wide.cuh have the products.
#pragma once
#include "ptx.cuh"

// Registers are ready for the products that follow.
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// The products since the last call are one group.
DEVICE void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// At most `PENDING` groups are still running.
template <int PENDING> DEVICE void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

// Keeps accumulators out of the compiler's reach while products run on them.
template <int N> DEVICE void hold(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// The same for operands.
DEVICE void hold_operands(uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) asm volatile("" : "+r"(a[i])::"memory");
}

// Descriptor of a plane's chunk in shared memory (1024-byte blocks of eight rows, 128-byte swizzle); product s of the
// chunk starts 32 bytes further.
DEVICE uint64_t plane_descriptor(uint32_t address) {
    return static_cast<uint64_t>((address & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

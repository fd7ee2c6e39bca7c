// How the activations of many tokens lie: the "plane" of R rows of K values (K padded to 128), as BF16.
//
// For each chunk of 64 inputs, for each block of 8 rows, 1024 bytes: row r at r * 128, its eight 16-byte units permuted
// by r. That is the shared-memory tile of `wgmma` (K-major, 128-byte swizzle), so N rows of one chunk are one bulk copy.
// Inside a chunk the inputs stand in the order in which the weights' streams (stream.cuh) count them.
//
// Quantised planes are for products of e4m3 (quantised_wide.cuh): chunks of 128 inputs, the same blocks of 1024 bytes, one byte a
// value; behind all chunks an F32 scale for each (chunk, row): value = e4m3 * scale, scale = largest of the 128 / 448.
#pragma once
#include "ptx.cuh"

constexpr int PLANE_ROWS = 8, PLANE_BLOCK = 1024;

// Where planes begin in a block's shared memory. Said to be more than an expression, or the compiler makes it again in every step.
DEVICE uint32_t aligned_planes(uint8_t *shared) {
    const uint32_t at = shared_address(shared);
    uint32_t planes;
    asm volatile("mov.u32 %0, %1;" : "=r"(planes) : "r"(at + (-at & (PLANE_BLOCK - 1))));
    return planes;
}

// Place of input p (0..64) of a chunk in the products' order.
__host__ __device__ constexpr int plane_place(int p) {
    return 16 * (2 * (p / 32) + p % 8 / 4) + 8 * (p % 4 / 2) + 2 * (p % 32 / 8) + p % 2;
}

// Byte offset of input k of a row of a chunk of 16-bit values: of a plane's block of eight rows, or of a weight's stage (stream.cuh).
__host__ __device__ constexpr int row_offset(int row, int k) { return row * 128 + ((plane_place(k % 64) * 2) ^ (row % PLANE_ROWS * 16)); }

// Byte offset of the pair (k, k + 1), k even, of a row; `blocks`: of 8 rows in the plane.
DEVICE size_t plane_offset(int row, int k, int blocks) {
    return (static_cast<size_t>(k / 64) * blocks + row / PLANE_ROWS) * PLANE_BLOCK + row_offset(row % PLANE_ROWS, k);
}

// Place of input k (0..128) of a quantised chunk in the products' order: the weights' (stream.cuh). Of four inputs 0, 2, 1 and 3.
__host__ __device__ constexpr int quantised_place(int k) { return k / 32 * 32 + k % 8 / 4 * 16 + k % 32 / 8 * 4 + k % 2 * 2 + k % 4 / 2; }

// Byte offset of input k of a row in a quantised plane.
DEVICE size_t quantised_offset(int row, int k, int blocks) {
    const int r = row % PLANE_ROWS;
    return (static_cast<size_t>(k / 128) * blocks + row / PLANE_ROWS) * PLANE_BLOCK + r * 128 + (quantised_place(k % 128) ^ (r * 16));
}

// Byte offset of the scale of a row's 128 inputs from 128 * chunk on; `chunks`: of the plane.
DEVICE size_t quantised_scale(int row, int chunk, int chunks, int blocks) {
    return static_cast<size_t>(chunks) * blocks * PLANE_BLOCK + (static_cast<size_t>(chunk) * blocks * PLANE_ROWS + row) * 4;
}

// How activations lie when they meet the weights: the "image" of one token of K values (K padded to 128).
//
// For each chunk of 64 values 256 bytes: 64 bf16 high parts, then 64 bf16 low parts (x = high + low, 16 bits of
// mantissa) whose 16-byte units are swapped in pairs, so that the eight lanes that read one token's two parts touch
// all 32 banks. After the chunks one F32 sum per 32 values, which INT4's zero points need.
// The same bytes lie in global and in shared memory: filling is one bulk copy per token.
#pragma once
#include "ptx.cuh"

__host__ __device__ constexpr uint32_t image_bytes(int k) { return k * 4 + k / 8; }
constexpr int IMAGE_CHUNK = 64, IMAGE_CHUNK_BYTES = 256, IMAGE_GROUP = 32;

// Byte offset of the pair (k, k+1), k even, of the high and of the low parts.
DEVICE uint32_t image_high(int k) { return (k >> 6) * IMAGE_CHUNK_BYTES + (k & 63) * 2; }
DEVICE uint32_t image_low(int k) { return (k >> 6) * IMAGE_CHUNK_BYTES + 128 + (((k & 63) * 2) ^ 16); }
DEVICE uint32_t image_sum(int padded, int group) { return padded * 4 + group * 4; }

// Sixteen neighbouring lanes write 32 consecutive values, a pair each, and their sum. All lanes of the warp take part.
DEVICE void image_store_pair(uint8_t *image, int padded, int k, float x0, float x1, bool inside) {
    uint32_t high, low;
    split_bf16(x0, x1, high, low);
    float sum = (bf16_low(high) + bf16_low(low)) + (bf16_high(high) + bf16_high(low));
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
    if (!inside) return;
    *reinterpret_cast<uint32_t *>(image + image_high(k)) = high;
    *reinterpret_cast<uint32_t *>(image + image_low(k)) = low;
    if ((threadIdx.x & 15) == 0) *reinterpret_cast<float *>(image + image_sum(padded, k / IMAGE_GROUP)) = sum;
}

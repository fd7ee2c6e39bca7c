// How the activations of few tokens lie in shared memory when they meet the weights: the "image" of one token of K
// values (K a multiple of 128). Kernels make it themselves from F32 rows; it never leaves the multiprocessor.
//
// For 16-bit products, per chunk of 64 values 256 bytes: 64 bf16 high parts, then 64 bf16 low parts (x = high + low, 16
// bits of mantissa), the two halves of the low parts exchanged: the eight lanes that read one token's two parts then
// touch all 32 banks.
//
// Tokens whose values are BF16 need no low parts: per chunk of 64 values 128 bytes, whose halves are exchanged in every other token
// (`row_image_store_block`).
//
// Experts' FP8 meets both kinds as F16 instead (FP8 becomes F16 by one instruction, BF16 takes seven): a block of 128 values times a power of two that
// makes the largest 2^14 to 2^15; that power's reciprocal, the block's step, lies apart, [block][token of a group].
//
// For INT4 weights products are of bytes and exact: x = step * (256 * high + low), 16 bits of the largest of 128
// values. Per block of 128 values 256 bytes: high bytes, low bytes (their 16-byte units exchanged in pairs), in the order
// in which lanes read them; behind all blocks per block 32 bytes, its tail: the step (F32), the sum of the integers, two
// unused words, the sums of each 32. Of a group's rows the tails lie apart, [block][row].
#pragma once
#include "ptx.cuh"

constexpr int IMAGE_BLOCK = 128;

template <bool BYTES> __host__ __device__ constexpr uint32_t image_bytes(int k) { return BYTES ? k * 2 + k / 4 : k * 4; }

// Of BF16 values.
__host__ __device__ constexpr uint32_t row_image_bytes(int k) { return k * 2; }

// Bytes of one block's parts, and of what stands behind them.
template <bool BYTES> constexpr int IMAGE_BLOCK_BYTES = BYTES ? 256 : 512;
constexpr int IMAGE_TAIL_BYTES = 32;
// The tails of a group's rows, at most eight, lie together, block by block: those of four rows are in different banks.
constexpr int BLOCK_TAIL_BYTES = 8 * IMAGE_TAIL_BYTES;

// One warp stores one block: lane l has values 4l .. 4l + 3. `image`: of the token; `tail`: the block's.
DEVICE void image_store_bytes(uint8_t *image, uint8_t *tail, int block, float4 v, int lane) {
    uint8_t *to = image + block * IMAGE_BLOCK_BYTES<true>;
    const float largest = warp_max(fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
    const float step = largest * (1.f / 32512.f), inverse = largest > 0.f ? 32512.f / largest : 0.f;
    const int x[4] = {__float2int_rn(v.x * inverse), __float2int_rn(v.y * inverse), __float2int_rn(v.z * inverse),
                      __float2int_rn(v.w * inverse)};
    uint32_t high = 0, low = 0;
    constexpr int PLACE[4] = {0, 16, 8, 24};  // values 1 and 2 exchanged, as in the weights' words
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int l = static_cast<int8_t>(x[i]);
        low |= (l & 0xffu) << PLACE[i];
        high |= (((x[i] - l) >> 8) & 0xffu) << PLACE[i];
    }
    const int at = (lane % 8 / 2) * 32 + (lane / 8) * 8 + (lane % 2) * 4;
    *reinterpret_cast<uint32_t *>(to + at) = high;
    *reinterpret_cast<uint32_t *>(to + 128 + (at ^ 16)) = low;
    int sum = x[0] + x[1] + x[2] + x[3];
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    sum += __shfl_xor_sync(ALL_LANES, sum, 2);
    sum += __shfl_xor_sync(ALL_LANES, sum, 4);
    if (lane % 8 == 0) *reinterpret_cast<int *>(tail + 16 + lane / 2) = sum;
    sum += __shfl_xor_sync(ALL_LANES, sum, 8);
    sum += __shfl_xor_sync(ALL_LANES, sum, 16);
    // A NaN or an infinity makes the step one: it reaches every product of the block.
    const bool bad = __any_sync(ALL_LANES, !(fabsf(v.x) + fabsf(v.y) + fabsf(v.z) + fabsf(v.w) < INFINITY));
    if (lane == 0) *reinterpret_cast<int2 *>(tail) = make_int2(__float_as_int(bad ? NAN : step), sum);
}

// The same of either kind, tails behind the image; `k`: values of the whole image.
template <bool BYTES> DEVICE void image_store_block(uint8_t *image, int k, int block, float4 v, int lane) {
    if constexpr (BYTES) {
        image_store_bytes(image, image + k * 2 + block * IMAGE_TAIL_BYTES, block, v, lane);
    } else {
        uint8_t *to = image + block * IMAGE_BLOCK_BYTES<false>;
        uint2 high, low;
        split_bf16(v.x, v.y, high.x, low.x);
        split_bf16(v.z, v.w, high.y, low.y);
        to += (lane / 16) * 256;
        const int at = (lane % 16) * 8;
        *reinterpret_cast<uint2 *>(to + at) = high;
        *reinterpret_cast<uint2 *>(to + 128 + (at ^ 64)) = low;
    }
}

// The same of a token whose values are BF16.
DEVICE void row_image_store_block(uint8_t *image, int token, int block, float4 v, int lane) {
    const uint2 pairs = make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
    *reinterpret_cast<uint2 *>(image + block * 256 + (lane / 16) * 128 + ((lane % 16 * 8) ^ (token & 1) * 64)) = pairs;
}

// As F16: scales the block's values for it and returns their step. Infinity and NaN stay what they are.
DEVICE float scale_for_f16(float4 &v) {
    const float largest = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
    const uint32_t exponent = max(__reduce_max_sync(ALL_LANES, __float_as_uint(largest)) >> 23, 15u);
    const float up = __uint_as_float((268 - exponent) << 23);
    v.x *= up, v.y *= up, v.z *= up, v.w *= up;
    return __uint_as_float((exponent - 14) << 23);
}

// A block of an image as high and low parts of F16, `step`: where its step is left.
DEVICE void image_store_f16(uint8_t *image, float *step, int block, float4 v, int lane) {
    const float s = scale_for_f16(v);
    if (lane == 0) *step = s;
    uint2 high, low;
    split_f16(v.x, v.y, high.x, low.x);
    split_f16(v.z, v.w, high.y, low.y);
    uint8_t *to = image + block * IMAGE_BLOCK_BYTES<false> + (lane / 16) * 256;
    const int at = (lane % 16) * 8;
    *reinterpret_cast<uint2 *>(to + at) = high;
    *reinterpret_cast<uint2 *>(to + 128 + (at ^ 64)) = low;
}

// The same of a token whose values are BF16: they fit into one F16 each.
DEVICE void row_image_store_f16(uint8_t *image, float *step, int token, int block, float4 v, int lane) {
    const float s = scale_for_f16(v);
    if (lane == 0) *step = s;
    const uint2 pairs = make_uint2(pack_f16(v.x, v.y), pack_f16(v.z, v.w));
    *reinterpret_cast<uint2 *>(image + block * 256 + (lane / 16) * 128 + ((lane % 16 * 8) ^ (token & 1) * 64)) = pairs;
}

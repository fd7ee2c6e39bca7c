// How weights lie in device memory, and how a warp multiplies them with activations.
//
// A weight [out, in] is cut into tiles of 16 rows, a tile into stages of 64 or 128 inputs. One stage is one bulk
// copy: contiguous, a multiple of 16 bytes, scales included. Inside, each lane's operands of `mma.m16n8k16` lie
// together, 16 bytes at a time, so shared memory is read without conflicts and nothing is shuffled.
// Tiles are stored one after the other, each with all its stages: tile i, stage s is at (i * stages + s) * STAGE_BYTES.
//
// In one chunk of 64 inputs, input k (0..64) belongs to lane column t = k / 16, product s = k % 16 / 4, register
// half = k % 4 / 2, element e = k % 2. So lane column t reads the activations 16t..16t+16: two 16-byte loads.
//
// | format    | stage (inputs, bytes) | inside                                                                      |
// | int4 g128 | 128, 1072 | 2 x [lane][4 words], word s: nibbles (i, i+4) = operand i; 16 x 16-bit scale, 16 x u8 zero |
// | int4 g32  | 128, 1216 | the same; 4 x (16 scales, 16 zeros)                                             |
// | fp8 block | 128, 2064 | 2 chunks x 2 planes x [lane][16 B]: products 2p, 2p+1; F32 scale in the last 16 bytes  |
// | bf16, f16 |  64, 2048 | 4 planes (product s) x [lane][4 operands]                                       |
// | f32       |  64, 4096 | 4 planes of high bf16 parts, then 4 planes of low parts                         |
#pragma once
#include "image.cuh"
#include "ptx.cuh"

enum Format : int { INT4_G128 = 0, INT4_G32 = 1, FP8 = 2, BF16 = 3, F16 = 4, F32 = 5 };

template <int F> struct Layout;
template <> struct Layout<INT4_G128> { static constexpr int K = 128, BYTES = 1024 + 48, GROUP = 128; };
template <> struct Layout<INT4_G32> { static constexpr int K = 128, BYTES = 1024 + 4 * 48, GROUP = 32; };
template <> struct Layout<FP8> { static constexpr int K = 128, BYTES = 2048 + 16, GROUP = 128; };
template <> struct Layout<BF16> { static constexpr int K = 64, BYTES = 2048, GROUP = 64; };
template <> struct Layout<F16> { static constexpr int K = 64, BYTES = 2048, GROUP = 64; };
template <> struct Layout<F32> { static constexpr int K = 64, BYTES = 4096, GROUP = 64; };

constexpr int TILE_ROWS = 16;

// One linear weight on the device.
struct Weight {
    const uint8_t *stream;
    int tiles;        // ceil(out / 16)
    int stages;       // per tile
    int rows;         // out, without padding
    int bf16_scales;  // INT4: scales are bf16, not f16
};

DEVICE float scale_value(uint32_t bits, int bf16_scales) {
    return bf16_scales ? __uint_as_float(bits << 16) : __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// Eight 4-bit weights as bf16 128 + q: the exponent of 128 puts the nibble into the last bits of the mantissa.
DEVICE void unpack_int4(uint32_t word, uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = ((word >> (4 * i)) & 0x000f000fu) | 0x43004300u;
}

// Four e4m3 as two bf16 pairs, (b0, b2) and (b1, b3): the fields move into place, 2^120 mends the exponent's bias
// (subnormals included).
DEVICE void unpack_fp8(uint32_t word, uint32_t &even, uint32_t &odd) {
    uint32_t e = ((word << 8) & 0x80008000u) | ((word << 4) & 0x07f007f0u);
    uint32_t o = (word & 0x80008000u) | ((word >> 4) & 0x07f007f0u);
    const __nv_bfloat162 bias = __float2bfloat162_rn(1.329227995784916e36f);
    __nv_bfloat162 ev = __hmul2(*reinterpret_cast<__nv_bfloat162 *>(&e), bias);
    __nv_bfloat162 ov = __hmul2(*reinterpret_cast<__nv_bfloat162 *>(&o), bias);
    even = *reinterpret_cast<uint32_t *>(&ev);
    odd = *reinterpret_cast<uint32_t *>(&ov);
}

DEVICE void split_f16_pair(uint32_t bits, uint32_t &high, uint32_t &low) {
    float2 v = __half22float2(*reinterpret_cast<__half2 *>(&bits));
    split_bf16(v.x, v.y, high, low);
}

// The activation operands of one chunk for NT groups of four tokens.
template <int NT> struct Operands {
    uint32_t b[NT][8];
    DEVICE void load(uint32_t x, uint32_t token_bytes, int lane) {
        const int column = lane >> 2, t = lane & 3, low = column & 1;
        const uint32_t base = x + (column >> 1) * token_bytes + low * 128;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            uint4 first = load_shared16(base + n * 4 * token_bytes + ((2 * t) ^ low) * 16);
            uint4 second = load_shared16(base + n * 4 * token_bytes + ((2 * t + 1) ^ low) * 16);
            b[n][0] = first.x, b[n][1] = first.y, b[n][2] = first.z, b[n][3] = first.w;
            b[n][4] = second.x, b[n][5] = second.y, b[n][6] = second.z, b[n][7] = second.w;
        }
    }
};

// acc[n] += stage * activations. `x`: address of token 0's chunk in shared memory; `sums`: of its group sums of this
// stage. acc[n][0], [1] belong to row lane/4 and token 4n + lane%4 (high and low part), [2], [3] to row lane/4 + 8.
template <int F, int NT>
DEVICE void multiply_stage(uint32_t stage, uint32_t x, uint32_t sums, uint32_t token_bytes, int lane, int bf16_scales,
                           float (&acc)[NT][4]) {
    const int row = lane >> 2, t = lane & 3;
    if constexpr (F == INT4_G128 || F == INT4_G32) {
        constexpr int GROUPS = 128 / Layout<F>::GROUP;
        float part[NT][4];
#pragma unroll
        for (int c = 0; c < 2; c++) {
            uint4 words = load_shared16(stage + c * 512 + lane * 16);
            Operands<NT> ops;
            ops.load(x + c * 256, token_bytes, lane);
            const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int s = 0; s < 4; s++) {
                constexpr int PRODUCTS = 8 / GROUPS;  // per group
                const int product = c * 4 + s, group = product / PRODUCTS;
                const uint32_t scales = stage + 1024 + group * 48;
                if (product % PRODUCTS == 0) {
                    uint32_t z0, z1;
                    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(z0) : "r"(scales + 32 + row));
                    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(z1) : "r"(scales + 40 + row));
                    const float zero0 = -static_cast<float>(128 + z0), zero1 = -static_cast<float>(128 + z1);
#pragma unroll
                    for (int n = 0; n < NT; n++) {
                        float sum;
                        if constexpr (F == INT4_G128) {
                            uint4 v = load_shared16(sums + (n * 4 + t) * token_bytes);
                            sum = (__uint_as_float(v.x) + __uint_as_float(v.y)) +
                                  (__uint_as_float(v.z) + __uint_as_float(v.w));
                        } else {
                            asm volatile("ld.shared.f32 %0, [%1];"
                                         : "=f"(sum)
                                         : "r"(sums + (n * 4 + t) * token_bytes + group * 4));
                        }
                        part[n][0] = zero0 * sum, part[n][1] = 0.f, part[n][2] = zero1 * sum, part[n][3] = 0.f;
                    }
                }
                uint32_t a[4];
                unpack_int4(word[s], a);
#pragma unroll
                for (int n = 0; n < NT; n++) mma_bf16(part[n], a, ops.b[n][2 * s], ops.b[n][2 * s + 1]);
                if (product % PRODUCTS == PRODUCTS - 1) {
                    uint32_t s0, s1;
                    asm volatile("ld.shared.u16 %0, [%1];" : "=r"(s0) : "r"(scales + row * 2));
                    asm volatile("ld.shared.u16 %0, [%1];" : "=r"(s1) : "r"(scales + 16 + row * 2));
                    const float scale0 = scale_value(s0, bf16_scales), scale1 = scale_value(s1, bf16_scales);
#pragma unroll
                    for (int n = 0; n < NT; n++) {
                        acc[n][0] += scale0 * (part[n][0] + part[n][1]);
                        acc[n][2] += scale1 * (part[n][2] + part[n][3]);
                    }
                }
            }
        }
    } else if constexpr (F == FP8) {
        float part[NT][4] = {};
#pragma unroll
        for (int c = 0; c < 2; c++) {
            Operands<NT> ops;
            ops.load(x + c * 256, token_bytes, lane);
#pragma unroll
            for (int p = 0; p < 2; p++) {
                uint4 words = load_shared16(stage + c * 1024 + p * 512 + lane * 16);
                uint32_t a[4];
                unpack_fp8(words.x, a[0], a[1]);
                unpack_fp8(words.y, a[2], a[3]);
#pragma unroll
                for (int n = 0; n < NT; n++) mma_bf16(part[n], a, ops.b[n][4 * p], ops.b[n][4 * p + 1]);
                unpack_fp8(words.z, a[0], a[1]);
                unpack_fp8(words.w, a[2], a[3]);
#pragma unroll
                for (int n = 0; n < NT; n++) mma_bf16(part[n], a, ops.b[n][4 * p + 2], ops.b[n][4 * p + 3]);
            }
        }
        float scale;
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(scale) : "r"(stage + 2048));
#pragma unroll
        for (int n = 0; n < NT; n++) {
            acc[n][0] += scale * (part[n][0] + part[n][1]);
            acc[n][2] += scale * (part[n][2] + part[n][3]);
        }
    } else {
        Operands<NT> ops;
        ops.load(x, token_bytes, lane);
#pragma unroll
        for (int s = 0; s < 4; s++) {
            uint4 v = load_shared16(stage + s * 512 + lane * 16);
            uint32_t a[4] = {v.x, v.y, v.z, v.w};
            if constexpr (F == F16) {
                uint32_t low[4];
#pragma unroll
                for (int i = 0; i < 4; i++) split_f16_pair(a[i], a[i], low[i]);
#pragma unroll
                for (int n = 0; n < NT; n++) mma_bf16(acc[n], low, ops.b[n][2 * s], ops.b[n][2 * s + 1]);
            }
            if constexpr (F == F32) {
                uint4 l = load_shared16(stage + 2048 + s * 512 + lane * 16);
                const uint32_t low[4] = {l.x, l.y, l.z, l.w};
#pragma unroll
                for (int n = 0; n < NT; n++) mma_bf16(acc[n], low, ops.b[n][2 * s], ops.b[n][2 * s + 1]);
            }
#pragma unroll
            for (int n = 0; n < NT; n++) mma_bf16(acc[n], a, ops.b[n][2 * s], ops.b[n][2 * s + 1]);
        }
    }
}

// Where the weight of (row, input) of a 16-bit stream lies, in bytes (the embedding's gather).
DEVICE size_t element_offset_16bit(int row, int input, int stages) {
    const int k = input & 63, r = row & 15;
    const int lane = (r & 7) * 4 + k / 16, operand = r / 8 + 2 * (k % 4 / 2);
    return (static_cast<size_t>(row / TILE_ROWS) * stages + input / 64) * 2048 + (k % 16 / 4) * 512 + lane * 16 +
           operand * 4 + (k & 1) * 2;
}

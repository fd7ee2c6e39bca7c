// How weights lie in device memory, and how a warp multiplies them with activations.
//
// A weight [out, in] is cut into tiles of 16 rows, a tile into stages of 64 or 128 inputs. One stage is a contiguous
// multiple of 16 bytes, scales included, and comes by one bulk copy (alone or with its neighbours). INT4 lies as each lane's
// operands of the tensor-core products, 16 bytes at a time; all else in whole rows, as an operand of warpgroup products, and matrix
// loads deal each lane its words: shared memory is read without conflicts and nothing is shuffled.
// Tiles are stored one after the other, each with all its stages.
//
// Experts in FP8 are read so fast that it matters where a stage begins: theirs are whole lines of 128 bytes, without scales. In front of
// three of a tile's stages (a *trio*; what a warp has of a tile of down, half of what it has of gate or up) is a line whose end holds
// their scales: right before the stages a *scale block* of 16 bytes with all three, so that one copy brings them with the first stage; before
// it one for each of the other two alone.
//
// In one chunk of 64 inputs, input k belongs to product s = 2 * (k / 32) + k % 8 / 4 (of 16 inputs), lane column
// t = k % 32 / 8, register half = k % 4 / 2, element e = k % 2. So lane column t reads the activations 8t .. 8t + 8 and
// 32 + 8t .. 32 + 8t + 8: two 16-byte loads. INT4's products of bytes take 32 inputs: two of these.
//
// | format    | stage (inputs, bytes) | inside                                                                      |
// | int4 g128 | 128, 1072 | 2 x [lane][4 words], word i: low nibbles row g, high nibbles row g + 8, bytes inputs 0, 2, 1, 3 |
// |           |           | of product i and column t; then 16 scales of 16 bits, 16 zero points of 8 bits  |
// | int4 g32  | 128, 1216 | the same; 4 x (16 scales, 16 zero points)                                       |
// | fp8 block | 128, 2064 | row r's 128 bytes at r * 128, their eight 16-byte units permuted by r % 8, as a quantised plane has them |
// |           |           | (plane.cuh): an operand of e4m3 products; F32 scale in the last 16 bytes        |
// | of experts| 128, 2048 | the same without the scale; trios of a line and three stages, the last of a tile also whole |
// | bf16, f16 |  64, 2048 | rows of 128 bytes as fp8's, in the order of a plane: an operand of bf16 products |
// | f32       |  64, 4096 | the same of high bf16 parts, then of low parts                                  |
#pragma once
#include "image.cuh"
#include "ptx.cuh"

// FP8_EXPERTS: FP8 in trios.
enum Format : int { INT4_G128 = 0, INT4_G32 = 1, FP8 = 2, BF16 = 3, F16 = 4, F32 = 5, FP8_EXPERTS = 7 };

template <int F> constexpr bool INT4 = F == INT4_G128 || F == INT4_G32;
template <int F> constexpr bool E4M3 = F == FP8 || F == FP8_EXPERTS;

template <int F> struct Layout;
// SPAN: stages of one bulk copy in the few-token kernels. LINE: bytes in front of TRIO stages, whose scales lie there.
template <> struct Layout<INT4_G128> { static constexpr int K = 128, BYTES = 1024 + 48, GROUP = 128, SPAN = 2, LINE = 0; };
template <> struct Layout<INT4_G32> { static constexpr int K = 128, BYTES = 1024 + 4 * 48, GROUP = 32, SPAN = 2, LINE = 0; };
template <> struct Layout<FP8> { static constexpr int K = 128, BYTES = 2048 + 16, GROUP = 128, SPAN = 1, LINE = 0; };
template <> struct Layout<FP8_EXPERTS> { static constexpr int K = 128, BYTES = 2048, GROUP = 128, SPAN = 1, LINE = 128; };
template <> struct Layout<BF16> { static constexpr int K = 64, BYTES = 2048, GROUP = 64, SPAN = 1, LINE = 0; };
template <> struct Layout<F16> { static constexpr int K = 64, BYTES = 2048, GROUP = 64, SPAN = 1, LINE = 0; };
template <> struct Layout<F32> { static constexpr int K = 64, BYTES = 4096, GROUP = 64, SPAN = 1, LINE = 0; };

constexpr int TILE_ROWS = 16;

// Stages behind one line of scales, and bytes of a scale block.
constexpr int TRIO = 3, SCALE_BLOCK = 16;
template <int F> constexpr bool TRIOS = Layout<F>::LINE > 0;
template <int F> constexpr int TRIO_BYTES = Layout<F>::LINE + TRIO * Layout<F>::BYTES;

// Bytes of a tile of so many stages.
template <int F> __host__ __device__ constexpr size_t tile_bytes(int stages) {
    return TRIOS<F> ? static_cast<size_t>((stages + TRIO - 1) / TRIO) * TRIO_BYTES<F> : static_cast<size_t>(stages) * Layout<F>::BYTES;
}

// Where a stage of a tile begins.
template <int F> __host__ __device__ constexpr size_t stage_offset(int stage) {
    return static_cast<size_t>(stage) * Layout<F>::BYTES + (TRIOS<F> ? (stage / TRIO + 1) * Layout<F>::LINE : 0);
}

// Where the scale block of stage `of` (0 to 2) of a trio lies, from the trio's first stage on: the first one's has all three scales.
__host__ __device__ constexpr int scale_block(int of) { return -SCALE_BLOCK * (of + 1); }

// The scale block that begins with a stage's scale.
template <int F> __host__ __device__ constexpr size_t scale_offset(int stage) {
    return stage_offset<F>(stage / TRIO * TRIO) + scale_block(stage % TRIO);
}

// One linear weight on the device.
struct Weight {
    const uint8_t *stream;
    int tiles;        // ceil(out / 16)
    int stages;       // per tile
    int rows;         // out, without padding
    int bf16_scales;  // INT4: scales are bf16, not f16
};

// The weight that `tile` lies in, of those that lie end to end in the result; `tile` becomes its place there.
DEVICE const Weight &segment_of(const Weight (&segments)[3], int &tile) {
    if (tile < segments[0].tiles) return segments[0];
    tile -= segments[0].tiles;
    if (tile < segments[1].tiles) return segments[1];
    tile -= segments[1].tiles;
    return segments[2];
}

DEVICE float scale_value(uint32_t bits, int bf16_scales) {
    return bf16_scales ? __uint_as_float(bits << 16) : __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// (v & mask) | set in one instruction: the compiler makes two of it, because only one of two constants can be part of it.
DEVICE uint32_t and_or(uint32_t v, uint32_t mask, uint32_t set) {
    uint32_t out;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(v), "r"(mask), "r"(set));
    return out;
}

// Eight 4-bit weights as bf16 128 + q: the exponent of 128 puts the nibble into the last bits of the mantissa.
DEVICE void unpack_int4(uint32_t word, uint32_t (&a)[4]) {
    uint32_t magic;
    asm("mov.b32 %0, 0x43004300;" : "=r"(magic));
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = and_or(word >> (4 * i), 0x000f000fu, magic);
}

// Four e4m3 as two bf16 pairs, (b0, b2) and (b1, b3): the fields move into place, 2^120 mends the exponent's bias
// (subnormals included).
DEVICE void unpack_fp8(uint32_t word, uint32_t &even, uint32_t &odd) {
    uint32_t e = and_or(word << 4, 0x07f007f0u, (word << 8) & 0x80008000u);
    uint32_t o = and_or(word >> 4, 0x07f007f0u, word & 0x80008000u);
    const __nv_bfloat162 bias = __float2bfloat162_rn(1.329227995784916e36f);
    __nv_bfloat162 ev = __hmul2(*reinterpret_cast<__nv_bfloat162 *>(&e), bias);
    __nv_bfloat162 ov = __hmul2(*reinterpret_cast<__nv_bfloat162 *>(&o), bias);
    even = *reinterpret_cast<uint32_t *>(&ev);
    odd = *reinterpret_cast<uint32_t *>(&ov);
}

// Four e4m3 as two pairs of F16, (b0, b2) and (b1, b3).
DEVICE void e4m3_to_f16(uint32_t word, uint32_t &even, uint32_t &odd) {
    asm("{\n"
        ".reg .b16 l, h;\n"
        "mov.b32 {l, h}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 %0, l;\n"
        "cvt.rn.f16x2.e4m3x2 %1, h;\n"
        "}\n"
        : "=r"(even), "=r"(odd)
        : "r"(__byte_perm(word, 0, 0x3120)));
}

DEVICE void split_f16_pair(uint32_t bits, uint32_t &high, uint32_t &low) {
    float2 v = __half22float2(*reinterpret_cast<__half2 *>(&bits));
    split_bf16(v.x, v.y, high, low);
}

// The activation operands of one chunk for NT groups of four tokens.
template <int NT> struct Operands {
    uint32_t b[NT][8];
    __device__ __forceinline__ void load(uint32_t x, uint32_t token_bytes, int lane) {
        const int column = lane >> 2, t = lane & 3, low = column & 1;
        const uint32_t base = x + (column >> 1) * token_bytes + low * 128;
        const uint32_t near = base + ((t * 16) ^ (low * 64)), far = base + ((64 + t * 16) ^ (low * 64));
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const uint4 first = load_shared16(near + n * 4 * token_bytes), second = load_shared16(far + n * 4 * token_bytes);
            b[n][0] = first.x, b[n][1] = first.y, b[n][2] = first.z, b[n][3] = first.w;
            b[n][4] = second.x, b[n][5] = second.y, b[n][6] = second.z, b[n][7] = second.w;
        }
    }
};

// The same of eight tokens whose values are BF16 (`image.cuh`): one column each.
struct RowOperands {
    uint32_t b[8];
    __device__ __forceinline__ void load(uint32_t x, uint32_t token_bytes, int lane) {
        const int token = lane >> 2, t = lane & 3, odd = token & 1;
        const uint32_t base = x + token * token_bytes;
        const uint4 first = load_shared16(base + ((t * 16) ^ (odd * 64))), second = load_shared16(base + ((64 + t * 16) ^ (odd * 64)));
        b[0] = first.x, b[1] = first.y, b[2] = first.z, b[3] = first.w;
        b[4] = second.x, b[5] = second.y, b[6] = second.z, b[7] = second.w;
    }
};

// The same for a block of 128 of INT4's images.
template <int NT> struct ByteOperands {
    uint32_t b[NT][8];
    __device__ __forceinline__ void load(uint32_t x, uint32_t token_bytes, int lane) {
        const int column = lane >> 2, t = lane & 3, low = column & 1;
        const uint32_t base = x + (column >> 1) * token_bytes + low * 128;
        const uint32_t near = base + ((t * 32) ^ (low * 16)), far = base + ((t * 32 + 16) ^ (low * 16));
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const uint4 first = load_shared16(near + n * 4 * token_bytes), second = load_shared16(far + n * 4 * token_bytes);
            b[n][0] = first.x, b[n][1] = first.y, b[n][2] = first.z, b[n][3] = first.w;
            b[n][4] = second.x, b[n][5] = second.y, b[n][6] = second.z, b[n][7] = second.w;
        }
    }
};

// Units 2i and 2i + 1 of a stage that lies in whole rows: the words of rows g and g + 8 in the one, then in the other, word t for lane column t, which is how a
// matrix load deals them out. Of 16 bits they are product i's operands; of FP8 a word has inputs 0, 2, 1 and 3 of the column's four for product 2i, then
// 2i + 1. `lower`: bytes from the first eight rows to what stands for the other eight.
DEVICE uint4 load_rows(uint32_t stage, uint32_t lower, int i, int lane) {
    const uint32_t matrix = lane / 8, row = lane % 8;
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(stage + matrix % 2 * lower + row * 128 + (((matrix / 2) ^ row) * 16 ^ i * 32)));
    return v;
}
DEVICE uint4 load_rows(uint32_t stage, int i, int lane) { return load_rows(stage, 1024, i, lane); }

// Adds a group's products of bytes: part[0], part[1] are the high and low parts of the upper row, part[2], part[3] those of the lower row, multiplied
// with the upper one's nibble still below it.
DEVICE void add_bytes(const int (&part)[4], int sum, float step, float scale0, float scale1, int zero0, int zero1, float (&acc)[4]) {
    const int upper = part[0] * 256 + part[1], lower = (part[2] * 256 + part[3] - upper) >> 4;
    acc[0] += static_cast<float>(upper - zero0 * sum) * (scale0 * step);
    acc[2] += static_cast<float>(lower - zero1 * sum) * (scale1 * step);
}

// Waits until the registers that `word` is made of are loaded. A bulk copy that is asked for next does not wait for loads of shared memory, and may write where they
// still read.
DEVICE void await_loaded(uint32_t word) {
    asm volatile(
        "{\n"
        ".reg .pred rare;\n"
        "setp.eq.u32 rare, %0, 0x80808080;\n"
        "@rare nanosleep.u32 0;\n"
        "}\n" ::"r"(word)
        : "memory");
}

// acc[n] += stage * activations. `x`: address of token 0's chunk (INT4: block) in shared memory; `tail`: INT4: of the
// block's step and sums, of a token `tail_bytes` behind those of the one before; `scale`: FP8 in trios: the stage's. acc[n][0] (+ [1]) belongs to row lane/4 and token 4n + lane%4,
// acc[n][2] (+ [3]) to row lane/4 + 8.
template <int F, int NT>
DEVICE void multiply_stage(uint32_t stage, uint32_t x, uint32_t tail, uint32_t token_bytes, uint32_t tail_bytes, int lane, int bf16_scales, float scale, float (&acc)[NT][4]) {
    const int row = lane >> 2, t = lane & 3;
    if constexpr (INT4<F>) {
        constexpr int GROUPS = 128 / Layout<F>::GROUP, PER_GROUP = 4 / GROUPS;
        const uint4 first = load_shared16(stage + lane * 16), second = load_shared16(stage + 512 + lane * 16);
        const uint32_t word[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
        ByteOperands<NT> ops;
        ops.load(x, token_bytes, lane);
        float step[NT];
        int sum[NT];
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const int2 v = load_shared8(tail + (n * 4 + t) * tail_bytes);
            step[n] = __int_as_float(v.x), sum[n] = v.y;
        }
        int part[NT][4];
#pragma unroll
        for (int s = 0; s < 4; s++) {
            if (s % PER_GROUP == 0) {
#pragma unroll
                for (int n = 0; n < NT; n++) part[n][0] = part[n][1] = part[n][2] = part[n][3] = 0;
            }
            const uint32_t a[4] = {word[2 * s] & 0x0f0f0f0fu, word[2 * s], word[2 * s + 1] & 0x0f0f0f0fu, word[2 * s + 1]};
#pragma unroll
            for (int n = 0; n < NT; n++) mma_bytes(part[n], a, ops.b[n][2 * s], ops.b[n][2 * s + 1]);
            if (s % PER_GROUP == PER_GROUP - 1) {
                const uint32_t scales = stage + 1024 + (s / PER_GROUP) * 48;
                const float scale0 = scale_value(load_shared_u16(scales + row * 2), bf16_scales);
                const float scale1 = scale_value(load_shared_u16(scales + 16 + row * 2), bf16_scales);
                const int zero0 = load_shared_u8(scales + 32 + row), zero1 = load_shared_u8(scales + 40 + row);
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    int total = sum[n];
                    if constexpr (GROUPS > 1)
                        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(total) : "r"(tail + (n * 4 + t) * tail_bytes + 16 + s * 4));
                    add_bytes(part[n], total, step[n], scale0, scale1, zero0, zero1, acc[n]);
                }
            }
        }
    } else if constexpr (E4M3<F>) {
        float part[NT][4] = {};
#pragma unroll
        for (int c = 0; c < 2; c++) {
            Operands<NT> ops;
            ops.load(x + c * 256, token_bytes, lane);
#pragma unroll
            for (int p = 0; p < 2; p++) {
                const uint4 words = load_rows(stage, c * 2 + p, lane);
                uint32_t a[4];
                unpack_fp8(words.x, a[0], a[2]);
                unpack_fp8(words.y, a[1], a[3]);
#pragma unroll
                for (int n = 0; n < NT; n++) mma_bf16(part[n], a, ops.b[n][4 * p], ops.b[n][4 * p + 1]);
                unpack_fp8(words.z, a[0], a[2]);
                unpack_fp8(words.w, a[1], a[3]);
#pragma unroll
                for (int n = 0; n < NT; n++) mma_bf16(part[n], a, ops.b[n][4 * p + 2], ops.b[n][4 * p + 3]);
            }
        }
        if constexpr (!TRIOS<F>) scale = load_shared_f32(stage + 2048);
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
            uint4 v = load_rows(stage, s, lane);
            uint32_t a[4] = {v.x, v.y, v.z, v.w};
            if constexpr (F == F16) {
                uint32_t low[4];
#pragma unroll
                for (int i = 0; i < 4; i++) split_f16_pair(a[i], a[i], low[i]);
#pragma unroll
                for (int n = 0; n < NT; n++) mma_bf16(acc[n], low, ops.b[n][2 * s], ops.b[n][2 * s + 1]);
            }
            if constexpr (F == F32) {
                uint4 l = load_rows(stage + 2048, s, lane);
                const uint32_t low[4] = {l.x, l.y, l.z, l.w};
#pragma unroll
                for (int n = 0; n < NT; n++) mma_bf16(acc[n], low, ops.b[n][2 * s], ops.b[n][2 * s + 1]);
            }
#pragma unroll
            for (int n = 0; n < NT; n++) mma_bf16(acc[n], a, ops.b[n][2 * s], ops.b[n][2 * s + 1]);
        }
    }
}

// The same of BF16 weights for the images of BF16 values: acc[0] belongs to row lane/4 and token 2 * (lane % 4), acc[1] to
// the token behind it, acc[2] and acc[3] to row lane/4 + 8.
DEVICE void multiply_rows_stage(uint32_t stage, uint32_t x, uint32_t token_bytes, int lane, float (&acc)[4]) {
    RowOperands ops;
    ops.load(x, token_bytes, lane);
#pragma unroll
    for (int s = 0; s < 4; s++) {
        const uint4 v = load_rows(stage, s, lane);
        const uint32_t a[4] = {v.x, v.y, v.z, v.w};
        mma_bf16(acc, a, ops.b[2 * s], ops.b[2 * s + 1]);
    }
}

// The weights of one 16-row tile as operands of BF16 products, on their way from shared memory to registers.
#pragma once
#include "stream.cuh"

// Multiplies a pair of bf16 by an F32 scale: high and low part, so that only the result is rounded.
DEVICE uint32_t scaled(uint32_t v, __nv_bfloat162 high, __nv_bfloat162 low) {
    const __nv_bfloat162 w = *reinterpret_cast<__nv_bfloat162 *>(&v);
    __nv_bfloat162 out = __hfma2(w, high, __hmul2(w, low));
    return *reinterpret_cast<uint32_t *>(&out);
}

// Four e4m3 as two pairs of bf16 times 2^-120, (b0, b2) and (b1, b3): `unpack_fp8` without its multiplication, which is part of the scale.
DEVICE void place_fp8(uint32_t word, uint32_t &even, uint32_t &odd) {
    even = and_or(word << 4, 0x07f007f0u, (word << 8) & 0x80008000u);
    odd = and_or(word >> 4, 0x07f007f0u, word & 0x80008000u);
}
// A scale of 255 or more would overflow: the loader refuses it (weights/fp8.rs of the worker).
constexpr float PLACED_FP8 = 1.329227995784916e36f;

struct SplitScale {
    __nv_bfloat162 high, low;
    __device__ __forceinline__ void set(float s) {
        const __nv_bfloat16 h = __float2bfloat16_rn(s);
        high = __bfloat162bfloat162(h);
        low = __bfloat162bfloat162(__float2bfloat16_rn(s - __bfloat162float(h)));
    }
};

// One step of 128 inputs is eight products, four in each half. `fetch` asks for what a product needs, `make` decodes it; between the two
// another product may run. `at`: the tile's bytes of the step; `scale_at`: FP8 of experts: its scale; `s`: product of the half, a constant.
// INT4 with groups of 128 and FP8 have one scale a step: `first` says that it is wanted.
template <int F> struct TileDecoder {
    SplitScale scale[2];
    __nv_bfloat162 zero[2];
    uint4 words;
    uint32_t s0, s1, z0, z1;  // FP8: the scale's bits in s0

    __device__ __forceinline__ void fetch(uint32_t at, uint32_t scale_at, int half, int s, int lane, bool first) {
        if constexpr (INT4<F>) {
            if (s == 0) words = load_shared16(at + half * 512 + lane * 16);
            fetch_scales(at, scale_at, half, s, lane, first);
        } else if constexpr (E4M3<F>) {
            fetch_scales(at, scale_at, half, s, lane, first);
            if (s % 2 == 0) words = load_rows(at, half * 2 + s / 2, lane);
        } else {
            words = load_rows(at + half * Layout<F>::BYTES, s, lane);
        }
    }

    // Its part without the weights themselves.
    __device__ __forceinline__ void fetch_scales(uint32_t at, uint32_t scale_at, int half, int s, int lane, bool first) {
        if constexpr (INT4<F>) {
            if (F == INT4_G128 ? s == 0 && first : s % 2 == 0) {
                const uint32_t group = at + 1024 + (F == INT4_G128 ? 0 : (half * 2 + s / 2) * 48), row = lane >> 2;
                asm volatile("ld.shared.u16 %0, [%1];" : "=r"(s0) : "r"(group + row * 2));
                asm volatile("ld.shared.u16 %0, [%1];" : "=r"(s1) : "r"(group + 16 + row * 2));
                asm volatile("ld.shared.u8 %0, [%1];" : "=r"(z0) : "r"(group + 32 + row));
                asm volatile("ld.shared.u8 %0, [%1];" : "=r"(z1) : "r"(group + 40 + row));
            }
        } else if constexpr (E4M3<F>) {
            if (s == 0 && first) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(s0) : "r"(TRIOS<F> ? scale_at : at + 2048));
        }
    }

    __device__ __forceinline__ void make(int s, int bf16_scales, bool first, uint32_t (&a)[4]) {
        if constexpr (INT4<F>) {
            if (F == INT4_G128 ? s == 0 && first : s % 2 == 0) scale[0].set(scale_value(s0, bf16_scales)), scale[1].set(scale_value(s1, bf16_scales));
        } else if constexpr (E4M3<F>) {
            if (s == 0 && first) scale[0].set(__uint_as_float(s0) * PLACED_FP8);
        }
        if constexpr (E4M3<F>) {
            place_fp8(s % 2 ? words.z : words.x, a[0], a[2]);
            place_fp8(s % 2 ? words.w : words.y, a[1], a[3]);
        } else {
            make_unscaled(s, first, a);
        }
        if constexpr (INT4<F> || E4M3<F>) {
#pragma unroll
            for (int j = 0; j < 4; j++) a[j] = scaled(a[j], scale[INT4<F> ? j & 1 : 0].high, scale[INT4<F> ? j & 1 : 0].low);
        }
    }

    // Without their scales: INT4 less its zero point, exact.
    __device__ __forceinline__ void make_unscaled(int s, bool first, uint32_t (&a)[4]) {
        if constexpr (INT4<F>) {
            if (F == INT4_G128 ? s == 0 && first : s % 2 == 0) {
                // 128 + zero point as bf16: the exponent of 128 in front of it.
                const uint32_t b0 = z0 * 0x10001u + 0x43004300u, b1 = z1 * 0x10001u + 0x43004300u;
                zero[0] = *reinterpret_cast<const __nv_bfloat162 *>(&b0), zero[1] = *reinterpret_cast<const __nv_bfloat162 *>(&b1);
            }
            unpack_int4(s == 0 ? words.x : s == 1 ? words.y : s == 2 ? words.z : words.w, a);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                __nv_bfloat162 v = __hsub2(*reinterpret_cast<__nv_bfloat162 *>(&a[j]), zero[j & 1]);
                a[j] = *reinterpret_cast<uint32_t *>(&v);
            }
        } else if constexpr (E4M3<F>) {
            unpack_fp8(s % 2 ? words.z : words.x, a[0], a[2]);
            unpack_fp8(s % 2 ? words.w : words.y, a[1], a[3]);
        } else {
            a[0] = words.x, a[1] = words.y, a[2] = words.z, a[3] = words.w;
            if constexpr (F == F16) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float2 f = __half22float2(*reinterpret_cast<__half2 *>(&a[j]));
                    a[j] = pack_bf16(f.x, f.y);
                }
            }
        }
    }

    // Of rows g and g + 8, where a step has one scale a row (INT4 with groups of 128) or one for all of them (FP8).
    __device__ __forceinline__ void row_scales(int bf16_scales, float &upper, float &lower) const {
        if constexpr (E4M3<F>)
            upper = lower = __uint_as_float(s0);
        else
            upper = scale_value(s0, bf16_scales), lower = scale_value(s1, bf16_scales);
    }

    // The low parts of F32 weights.
    __device__ __forceinline__ void make_low(uint32_t at, int half, int s, int lane, uint32_t (&a)[4]) {
        const uint4 v = load_rows(at + half * Layout<F>::BYTES + 2048, s, lane);
        a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
    }
};

// A consumer warp's weights: one tile at `offset` of a step, its scale, FP8 of experts, at `scale`.
template <int F> struct OneTile {
    TileDecoder<F> decoder;
    uint32_t offset, scale;
    int lane, bf16_scales;
    __device__ __forceinline__ OneTile(uint32_t offset, uint32_t scale, int lane, int bf16_scales)
        : offset(offset), scale(scale), lane(lane), bf16_scales(bf16_scales) {}
    __device__ __forceinline__ void fetch(uint32_t step, int half, int s, bool first) { decoder.fetch(step + offset, step + scale, half, s, lane, first); }
    __device__ __forceinline__ void make(int s, bool first, uint32_t (&a)[4]) { decoder.make(s, bf16_scales, first, a); }
};

// Or eight rows of each of two tiles: row g of the result is row g (upper: g + 8) of the one at `offset`, row g + 8 the same of the one
// `between` further; the second one's scale, FP8 of experts, is behind the first one's at `scale`.
template <int F> struct TwoHalves {
    TileDecoder<F> decoder;
    uint4 second;
    uint32_t offset, between, scale;
    int lane, bf16_scales;
    bool upper;
    __device__ __forceinline__ TwoHalves(uint32_t offset, uint32_t between, uint32_t scale, bool upper, int lane, int bf16_scales)
        : offset(offset), between(between), scale(scale), lane(lane), bf16_scales(bf16_scales), upper(upper) {}

    __device__ __forceinline__ void fetch(uint32_t step, int half, int s, bool first) {
        const uint32_t at = step + offset, row = (lane >> 2) + (upper ? 8 : 0);
        if constexpr (INT4<F>) {
            if (s == 0) decoder.words = load_shared16(at + half * 512 + lane * 16), second = load_shared16(at + between + half * 512 + lane * 16);
            if (F == INT4_G128 ? s == 0 && first : s % 2 == 0) {
                const uint32_t group = at + 1024 + (F == INT4_G128 ? 0 : (half * 2 + s / 2) * 48);
                asm volatile("ld.shared.u16 %0, [%1];" : "=r"(decoder.s0) : "r"(group + row * 2));
                asm volatile("ld.shared.u16 %0, [%1];" : "=r"(decoder.s1) : "r"(group + between + row * 2));
                asm volatile("ld.shared.u8 %0, [%1];" : "=r"(decoder.z0) : "r"(group + 32 + row));
                asm volatile("ld.shared.u8 %0, [%1];" : "=r"(decoder.z1) : "r"(group + between + 32 + row));
            }
        } else if constexpr (E4M3<F>) {
            if (s == 0 && first) {
                asm volatile("ld.shared.u32 %0, [%1];" : "=r"(decoder.s0) : "r"(TRIOS<F> ? step + scale : at + 2048));
                asm volatile("ld.shared.u32 %0, [%1];" : "=r"(decoder.s1) : "r"(TRIOS<F> ? step + scale + SCALE_BLOCK : at + between + 2048));
            }
            if (s % 2 == 0) decoder.words = load_rows(at + (upper ? 1024 : 0), between, half * 2 + s / 2, lane);
        } else {
            decoder.words = load_rows(at + half * Layout<F>::BYTES + (upper ? 1024 : 0), between, s, lane);
        }
    }

    __device__ __forceinline__ void make(int s, bool first, uint32_t (&a)[4]) {
        uint4 &w = decoder.words;
        if constexpr (INT4<F>) {
            if (s == 0) {
                // Nibbles 0 and 2 of each four are rows g, 1 and 3 rows g + 8.
                const int right = upper ? 4 : 0, left = 4 - right;
                const auto merge = [&](uint32_t x, uint32_t y) { return ((x >> right) & 0x0f0f0f0fu) | ((y << left) & 0xf0f0f0f0u); };
                w.x = merge(w.x, second.x), w.y = merge(w.y, second.y), w.z = merge(w.z, second.z), w.w = merge(w.w, second.w);
            }
            decoder.make(s, bf16_scales, first, a);
        } else if constexpr (E4M3<F>) {
            if (s == 0 && first) decoder.scale[0].set(__uint_as_float(decoder.s0) * PLACED_FP8), decoder.scale[1].set(__uint_as_float(decoder.s1) * PLACED_FP8);
            place_fp8(s % 2 ? w.z : w.x, a[0], a[2]);
            place_fp8(s % 2 ? w.w : w.y, a[1], a[3]);
#pragma unroll
            for (int j = 0; j < 4; j++) a[j] = scaled(a[j], decoder.scale[j & 1].high, decoder.scale[j & 1].low);
        } else {
            decoder.make(s, bf16_scales, first, a);
        }
    }
};

// How keys and values lie in the page pool, and how a warp reads them as tensor-core operands.
//
// One layer's keys: [page][kv head][token of the page][head_dim], values the same in a second array. A page holds a
// multiple of 16 tokens, so 16 tokens of one head are one contiguous tile: one bulk copy. Inside a tile the 16-byte
// units of a row are permuted by the row (`swizzled`), so that eight rows of one column touch all banks.
#pragma once
#include "../../cuda/ptx.cuh"

enum KvType : int { KV_BF16 = 0, KV_E4M3 = 1, KV_E5M2 = 2 };
constexpr int TILE_TOKENS = 16;

template <int KV> constexpr int KV_BYTES = KV == KV_BF16 ? 2 : 1;

// Byte offset of (row of the tile, byte of the row). Rows of 256 bytes are two halves of 128; eight rows of one half lie
// together, the layout that `wgmma` calls the 128-byte swizzle, then the same rows of the other half: so any number of tiles
// one behind the other is one operand.
template <int ROW_BYTES> DEVICE uint32_t swizzled(int row, int byte) {
    if constexpr (ROW_BYTES == 64) return row * 64 + (byte ^ (((row >> 1) & 3) * 16));
    return row / 8 * (8 * ROW_BYTES) + byte / 128 * 1024 + row % 8 * 128 + ((byte % 128) ^ (row % 8 * 16));
}

// Row of the tile that a byte of it belongs to.
template <int ROW_BYTES> DEVICE int tile_row(int byte) {
    return ROW_BYTES == 64 ? byte / 64 : byte / (8 * ROW_BYTES) * 8 + byte % 1024 / 128;
}

struct Pages {
    uint8_t *k, *v;
    const uint32_t *tables;  // [runs][table_stride]
    int table_stride, page_tokens, kv_heads;
};

// Offset of the tile that holds token `position` of a run, for one head.
template <int ROW_BYTES> DEVICE size_t tile_offset(const Pages &p, uint32_t page, int head, int position) {
    const int in_page = position % p.page_tokens / TILE_TOKENS * TILE_TOKENS;
    return ((static_cast<size_t>(page) * p.kv_heads + head) * p.page_tokens + in_page) * ROW_BYTES;
}

template <int KV> DEVICE uint16_t kv_pair_fp8(float x0, float x1) {
    uint16_t v;
    if constexpr (KV == KV_E4M3)
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(v) : "f"(x1), "f"(x0));
    else
        asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(v) : "f"(x1), "f"(x0));
    return v;
}

// Stores the pair (d, d + 1) of one token into a tile (global or shared memory).
template <int KV, int HD> DEVICE void store_pair(uint8_t *tile, int row, int d, float x0, float x1) {
    uint8_t *at = tile + swizzled<HD * KV_BYTES<KV>>(row, d * KV_BYTES<KV>);
    if constexpr (KV == KV_BF16)
        *reinterpret_cast<uint32_t *>(at) = pack_bf16(x0, x1);
    else
        *reinterpret_cast<uint16_t *>(at) = kv_pair_fp8<KV>(x0, x1);
}

// Two FP8 values as f16, exactly.
template <int KV> DEVICE uint32_t fp8_pair_to_f16(uint16_t v) {
    uint32_t out;
    if constexpr (KV == KV_E4M3)
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(out) : "h"(v));
    else
        asm("cvt.rn.f16x2.e5m2x2 %0, %1;" : "=r"(out) : "h"(v));
    return out;
}

template <int KV> DEVICE void mma_kv(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (KV == KV_BF16)
        mma_bf16(d, a, b0, b1);
    else
        mma_f16(d, a, b0, b1);
}

template <int KV> DEVICE void split_kv(float x0, float x1, uint32_t &high, uint32_t &low) {
    if constexpr (KV == KV_BF16)
        split_bf16(x0, x1, high, low);
    else
        split_f16(x0, x1, high, low);
}

template <int KV> DEVICE uint32_t pack_kv(float x0, float x1) {
    return KV == KV_BF16 ? pack_bf16(x0, x1) : pack_f16(x0, x1);
}

// The head dimension that a lane column t holds as element e (0, 1) of register half h of product s (16 dims each).
// BF16: as the instruction counts; FP8: four neighbouring dims a lane, because loads come in fours.
template <int KV> DEVICE int query_dim(int s, int half, int t) {
    return KV == KV_BF16 ? s * 16 + half * 8 + 2 * t : s * 16 + 4 * t + 2 * half;
}

// scores[2][4] += Q K^T for 16 tokens: scores[n] are tokens 8n..8n+8. q[s]: A operands of product s.
template <int KV, int HD> DEVICE void multiply_keys(uint32_t tile, int lane, const uint32_t (&q)[HD / 16][4], float (&scores)[2][4]) {
    constexpr int ROW = HD * KV_BYTES<KV>;
    const int matrix = lane / 8, row = lane % 8;
    if constexpr (KV == KV_BF16) {
#pragma unroll
        for (int s = 0; s < HD / 16; s++) {
            uint32_t b[4];
            load_matrix4(b, tile + swizzled<ROW>((matrix / 2) * 8 + row, (2 * s + (matrix & 1)) * 16));
            mma_kv<KV>(scores[0], q[s], b[0], b[1]);
            mma_kv<KV>(scores[1], q[s], b[2], b[3]);
        }
    } else {
#pragma unroll
        for (int s = 0; s < HD / 16; s += 2) {
            uint32_t b[4];  // (product s, s + 1) x (tokens 0.., 8..)
            load_matrix4(b, tile + swizzled<ROW>((matrix / 2) * 8 + row, (s + (matrix & 1)) * 16));
#pragma unroll
            for (int i = 0; i < 4; i++)
                mma_kv<KV>(scores[i / 2], q[s + i % 2], fp8_pair_to_f16<KV>(static_cast<uint16_t>(b[i])),
                           fp8_pair_to_f16<KV>(static_cast<uint16_t>(b[i] >> 16)));
        }
    }
}

// out[HD / 8][4] += P V for 16 tokens. out[n][0], [1] are the dims `value_dim(n, t, 0 / 1)` of row lane / 4.
template <int KV, int HD> DEVICE void multiply_values(uint32_t tile, int lane, const uint32_t (&p)[4], float (&out)[HD / 8][4]) {
    constexpr int ROW = HD * KV_BYTES<KV>;
    const int matrix = lane / 8, row = lane % 8;
    if constexpr (KV == KV_BF16) {
#pragma unroll
        for (int n = 0; n < HD / 8; n += 2) {
            uint32_t b[4];  // (tokens 0.., 8..) x (dims 8n.., 8n + 8..)
            load_matrix4_transposed(b, tile + swizzled<ROW>((matrix & 1) * 8 + row, (n + matrix / 2) * 16));
            mma_kv<KV>(out[n], p, b[0], b[1]);
            mma_kv<KV>(out[n + 1], p, b[2], b[3]);
        }
    } else {
#pragma unroll
        for (int u = 0; u < HD / 16; u += 2) {
            uint32_t b[4];  // (tokens 0.., 8..) x (units u, u + 1 of 16 dims)
            load_matrix4_transposed(b, tile + swizzled<ROW>((matrix & 1) * 8 + row, (u + matrix / 2) * 16));
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t even0 = __byte_perm(b[2 * i], 0, 0x20), odd0 = __byte_perm(b[2 * i], 0, 0x31);
                const uint32_t even1 = __byte_perm(b[2 * i + 1], 0, 0x20), odd1 = __byte_perm(b[2 * i + 1], 0, 0x31);
                mma_kv<KV>(out[2 * (u + i)], p, fp8_pair_to_f16<KV>(static_cast<uint16_t>(even0)),
                           fp8_pair_to_f16<KV>(static_cast<uint16_t>(even1)));
                mma_kv<KV>(out[2 * (u + i) + 1], p, fp8_pair_to_f16<KV>(static_cast<uint16_t>(odd0)),
                           fp8_pair_to_f16<KV>(static_cast<uint16_t>(odd1)));
            }
        }
    }
}

// BF16: N tile n holds dims 8n + 2t, +1. FP8: tiles 2u (even dims) and 2u + 1 (odd dims) of unit u.
template <int KV> DEVICE int value_dim(int n, int t, int element) {
    return KV == KV_BF16 ? 8 * n + 2 * t + element : 16 * (n / 2) + 4 * t + 2 * element + (n & 1);
}

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Kernels for every type of keys and values and every size of a head: KERNEL(name, type, size).
#define FP8_KV_KERNELS(KERNEL) KERNEL(e4m3, KV_E4M3, 128) KERNEL(e4m3, KV_E4M3, 64) KERNEL(e5m2, KV_E5M2, 128) KERNEL(e5m2, KV_E5M2, 64)
#define KV_KERNELS(KERNEL) KERNEL(bf16, KV_BF16, 128) KERNEL(bf16, KV_BF16, 64) FP8_KV_KERNELS(KERNEL)

// How the sums of a block of few tokens leave: through shared memory, so that cuts of the inputs meet there and a token's outputs go out side by side.
#pragma once
#include "../../cuda/ptx.cuh"
#include "linear_params.cuh"

// A lane has in sums[i] row lane / 4 (+ 8) of its warp's tile and token 2 * (lane % 4) (+ 1) of eight. CUTS: warps with the same tile, which have cuts of its
// inputs.
template <int N, int TILES, int CUTS> struct FewResults {
    // Four floats more than rows: the lanes of a warp touch all banks.
    static constexpr int ROWS = TILES * TILE_ROWS, STRIDE = ROWS + 4, CUT = N * STRIDE * 4, BYTES = CUTS * CUT, THREADS = TILES * CUTS * WARP;
    uint32_t room;

    // All warps that multiply, and no other.
    static DEVICE void meet() { asm volatile("bar.sync 2, %0;" ::"n"(THREADS) : "memory"); }

    DEVICE void leave(int cut, int tile, int lane, const float (&sums)[N / 2]) const {
        const uint32_t to = room + cut * CUT + (2 * (lane & 3) * STRIDE + tile * TILE_ROWS + (lane >> 2)) * 4;
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            asm volatile("st.shared.f32 [%0], %1;" ::"r"(to + ((i / 4 * 8 + i % 2) * STRIDE + i % 4 / 2 * 8) * 4), "f"(sums[i]) : "memory");
    }

    // After `meet`: the sums over the cuts, in order, of the rows from the block's `first_row` on, plus the residual in part 0; `thread` of those that multiply.
    // All loads come before the first store, without a branch between them: else each waits for the one before.
    template <bool AS_BF16> DEVICE void send(const GemmParams &p, int part, int first_row, int thread) const {
        constexpr int A_TOKEN = ROWS / 4, TOKENS = THREADS / A_TOKEN, EACH = N / TOKENS;
        static_assert(THREADS % A_TOKEN == 0 && N % TOKENS == 0);
        const int row = first_row + thread % A_TOKEN * 4, token0 = thread / A_TOKEN;
        const uint32_t from = room + (token0 * STRIDE + thread % A_TOKEN * 4) * 4;
        const auto there = [&](int e) { return token0 + e * TOKENS < p.tokens; };
        const auto place = [&](int e) { return static_cast<size_t>(token0 + e * TOKENS) * p.width + row; };
        float4 v[EACH] = {};
#pragma unroll
        for (int e = 0; e < EACH; e++)
#pragma unroll
            for (int cut = 0; cut < CUTS; cut++) {
                const uint4 more = load_shared16(from + cut * CUT + e * TOKENS * STRIDE * 4);
                v[e].x += __uint_as_float(more.x), v[e].y += __uint_as_float(more.y), v[e].z += __uint_as_float(more.z), v[e].w += __uint_as_float(more.w);
            }
        const size_t begin = static_cast<size_t>(part) * p.tokens * p.width;
        if constexpr (AS_BF16) {  // widths are multiples of 4
            uint16_t *const y = reinterpret_cast<uint16_t *>(p.y) + begin;
            if (row >= p.width) return;
#pragma unroll
            for (int e = 0; e < EACH; e++)
                if (there(e)) *reinterpret_cast<uint2 *>(y + place(e)) = make_uint2(pack_bf16(v[e].x, v[e].y), pack_bf16(v[e].z, v[e].w));
            return;
        }
        float *const y = p.y + begin;
        const bool add = p.residual && part == 0;
        if (p.width % 4) {
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                const float of[4] = {v[e].x, v[e].y, v[e].z, v[e].w};
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (there(e) && row + i < p.width) y[place(e) + i] = of[i] + (add ? p.residual[place(e) + i] : 0.f);
            }
            return;
        }
        if (row >= p.width) return;
        if (add) {
            float4 r[EACH];
#pragma unroll
            for (int e = 0; e < EACH; e++) r[e] = there(e) ? *reinterpret_cast<const float4 *>(p.residual + place(e)) : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
            for (int e = 0; e < EACH; e++) v[e].x += r[e].x, v[e].y += r[e].y, v[e].z += r[e].z, v[e].w += r[e].w;
        }
#pragma unroll
        for (int e = 0; e < EACH; e++)
            if (there(e)) *reinterpret_cast<float4 *>(y + place(e)) = v[e];
    }
};

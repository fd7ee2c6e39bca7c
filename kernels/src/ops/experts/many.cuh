// Many rows of many experts: parameters of the sorting and of the two products.
#pragma once
#include "../../cuda/gemm.cuh"
#include "../route/route.cuh"
#include "experts.cuh"

// Sorted rows of one expert, up to 256 (`SortParams::tile_rows`); `first` is a multiple of 8.
struct ExpertTile {
    int expert, first, rows, unused;
};

struct ManyParams {
    Experts experts;
    const ExpertTile *tiles;
    const int *tile_count;
    const uint8_t *plane;  // of the sorted rows: input of gate/up; of the activations: input of down
    uint8_t *acted;        // gate/up: plane of silu(gate) * up
    __nv_bfloat16 *y;      // down: [sorted rows, hidden]
    int blocks;            // of 8 rows, in both planes
};

// Transposes an 8x8 tile of 16-bit values over the warp: lane (g, t) gives (row g, columns 2t, 2t+1) and gets (row of
// the result g = former column, its former rows 2t, 2t+1).
DEVICE uint32_t transpose8(uint32_t v) {
    uint32_t out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(v));
    return out;
}

// Four words of each of four neighbouring lanes: word i of lane t goes to lane i as its word t.
DEVICE void transpose_words(uint32_t (&w)[4], int t) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & bit) continue;
            const bool upper = t & bit;
            const uint32_t got = __shfl_xor_sync(ALL_LANES, upper ? w[i] : w[i | bit], bit);
            if (upper)
                w[i] = got;
            else
                w[i | bit] = got;
        }
}

// silu(gate) * up of two values, with one division for both. Beyond -40 silu is nothing either way.
DEVICE float2 silu_times(float gate0, float gate1, float up0, float up1) {
    const float d0 = 1.f + __expf(fminf(-gate0, 40.f)), d1 = 1.f + __expf(fminf(-gate1, 40.f));
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(d0 * d1));
    return make_float2(gate0 * up0 * (inverse * d1), gate1 * up1 * (inverse * d0));
}

// Sums of up to N rows of one expert for tile `at` of 16 columns, to y.
template <int N> DEVICE void write_down(const ManyParams &p, const ExpertTile &rows, int at, const float *acc, int lane) {
    const int g = lane >> 2, t = lane & 3, column = at * TILE_ROWS + t % 2 * 8;
#pragma unroll
    for (int j = 0; j < N / 8; j += 2) {
        if (8 * j >= rows.rows) break;
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; i++) w[i] = transpose8(pack_bf16(acc[4 * (j + i / 2) + i % 2 * 2], acc[4 * (j + i / 2) + i % 2 * 2 + 1]));
        // Now lanes 0 and 1 have the sixteen columns of one row, 2 and 3 those of the row eight further.
        transpose_words(w, t);
        const int row = 8 * (j + t / 2) + g;
        if (row >= rows.rows || column >= p.experts.hidden) continue;
        __nv_bfloat16 *to = p.y + static_cast<size_t>(rows.first + row) * p.experts.hidden + column;
        if (p.experts.hidden % 8 == 0) {
            *reinterpret_cast<uint4 *>(to) = make_uint4(w[0], w[1], w[2], w[3]);
        } else {
            for (int i = 0; i < 4 && column + 2 * i < p.experts.hidden; i++) *reinterpret_cast<uint32_t *>(to + 2 * i) = w[i];
        }
    }
}

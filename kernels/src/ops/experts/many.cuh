// Many rows of many experts: parameters of the sorting and of the two products.
#pragma once
#include "../../cuda/gemm.cuh"
#include "../route/route.cuh"
#include "experts.cuh"

// Sorted rows of one expert, up to 128 (quantised) or 256 (`SortParams::tile_rows`); `first` is a multiple of 8.
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

// Many rows of many experts: parameters of the sorting and of the two products.
#pragma once
#include "../../cuda/gemm.cuh"
#include "../route/route.cuh"
#include "experts.cuh"

// Up to 128 sorted rows of one expert; `first` is a multiple of 8.
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

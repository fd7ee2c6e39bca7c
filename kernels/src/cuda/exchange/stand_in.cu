// Experts that can be computed by hand, for checking an exchange without a model: y = factor[expert] * x.
#include "../plane.cuh"
#include "../../ops/experts/many.cuh"

constexpr int STAND_IN_THREADS = 256;

struct StandInFew {
    Groups groups;
    const float *x;
    float *y;
    const float *factor;  // of the local experts
    int hidden;
};

extern "C" __global__ void __launch_bounds__(STAND_IN_THREADS) stand_in_few(const __grid_constant__ StandInFew p) {
    wait_for_inputs();
    allow_next_kernel();
    const int count = *p.groups.count;
    for (int g = blockIdx.x; g < count; g += gridDim.x) {
        const Group group = p.groups.group[g];
        for (int i = 0; i < group.rows; i++) {
            const float *from = p.x + static_cast<size_t>(p.groups.row_token[group.first + i]) * p.hidden;
            float *to = p.y + static_cast<size_t>(p.groups.row_slot[group.first + i]) * p.hidden;
            for (int c = threadIdx.x; c < p.hidden; c += STAND_IN_THREADS) to[c] = from[c] * p.factor[group.expert];
        }
    }
}

struct StandInMany {
    const ExpertTile *tiles;
    const int *tile_count;
    const uint8_t *plane;
    __nv_bfloat16 *y;
    const float *factor;
    int hidden, blocks;
};

extern "C" __global__ void __launch_bounds__(STAND_IN_THREADS) stand_in_many(const __grid_constant__ StandInMany p) {
    wait_for_inputs();
    allow_next_kernel();
    const int count = *p.tile_count;
    for (int t = blockIdx.x; t < count; t += gridDim.x) {
        const ExpertTile tile = p.tiles[t];
        for (int i = 0; i < tile.rows; i++) {
            for (int c = 2 * threadIdx.x; c < p.hidden; c += 2 * STAND_IN_THREADS) {
                const uint32_t v = *reinterpret_cast<const uint32_t *>(p.plane + plane_offset(tile.first + i, c, p.blocks));
                const float f = p.factor[tile.expert];
                *reinterpret_cast<uint32_t *>(p.y + static_cast<size_t>(tile.first + i) * p.hidden + c) = pack_bf16(bf16_low(v) * f, bf16_high(v) * f);
            }
        }
    }
}

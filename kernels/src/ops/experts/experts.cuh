// The experts of one layer on the device, and the parameters that the two expert kernels share.
#pragma once
#include "../../cuda/gemv.cuh"
#include "../route/route.cuh"

// Each expert is one block of memory: the streams of gate (w1), up (w3) and down (w2). The intermediate width is padded
// to 128, so gate and up have padded / 16 tiles.
struct Experts {
    const uint8_t *base;
    size_t expert_bytes, up_offset, down_offset;
    int hidden_padded, inter_padded;  // multiples of 128
    int hidden;
    int bf16_scales;
};

// Gate and up: 32 channels a unit, two tiles of each, inputs in four runs. Down: four tiles, inputs in four runs.
constexpr int UP_CHANNELS = 32, DOWN_ROWS = 64, RUNS = 4;

static_assert(GROUP_ROWS * sizeof(float) == IMAGE_TAIL_BYTES && GROUP_ROWS * IMAGE_TAIL_BYTES == BLOCK_TAIL_BYTES, "runs go through steps as through tails");

// Stages of one copy in the kernels of groups.
template <int F> constexpr int GROUPS_SPAN = INT4<F> ? INT4_TOGETHER : TRIOS<F> ? TRIO : Layout<F>::SPAN;

// Slots of a warp's ring in the kernels of groups. A trio is in registers before the next one is asked for: one slot is on its way nearly always.
template <int F> constexpr int GROUPS_DEPTH = TRIOS<F> ? 1 : 2;

struct ExpertParams {
    Experts experts;
    Groups groups;
    const float *x;  // gate/up: [tokens, hidden]; down: [sorted rows, inter_padded]
    float *acted;    // gate/up: silu(gate) * up, [sorted rows, inter_padded]
    float *y;        // down: [token * k + slot, hidden]
    // Up to four tokens, all experts local: every block makes the choice itself, from the gate's logits.
    NormInput input;
    RouteParams route;
    // Down for up to four tokens: the weighted sum over slots, in halves of the slots.
    const float *residual;
    float *halves;  // [2][tokens, hidden]
    int most;       // groups: those that there is room for
    int images;     // groups: rows whose images there is room for, GROUP_ROWS to twice as many
    int heavy;      // groups: time of a unit of more than four rows, in sixteenths of another's; 0: the same
    int unused;
};

// The choice of experts of `one.cu`, by one warp of every block.
#pragma once
#include "one_values.cuh"

// From the gate's logits, once they are there: `ids` and `weights`, best first, the lower expert first among equals. Always
// different experts, even of NaN. A lane has eight neighbouring experts.
DEVICE void choose(OneShared &shared, const float *bias, int layer) {
    static_assert(EXPERTS_PER_LANE == 8 && ONE_TOP_K <= WARP, "two quads a lane");
    const OneParams &p = shared.p;
    const int lane = threadIdx.x & 31, first = lane * EXPERTS_PER_LANE, experts = p.experts;
    const uint32_t turn = (shared.epoch + layer + 1) & 1;
    const bool inside = first < experts;
    float add[EXPERTS_PER_LANE];
#pragma unroll
    for (int i = 0; i < EXPERTS_PER_LANE; i++) add[i] = bias && inside ? __ldg(bias + first + i) : 0.f;
    if (lane == 0) listen(p, GATE, shared.epoch + layer + 1);
    __syncwarp();
    float4 part[2 * GATE_PARTS];
    receive(part, p.logits, turn, 1, [&](int i) { return i / 2 * experts + (inside ? first : 0) + i % 2 * 4; });
    float score[EXPERTS_PER_LANE];
#pragma unroll
    for (int i = 0; i < EXPERTS_PER_LANE; i++) score[i] = 0.f;
#pragma unroll
    for (int i = 0; i < 2 * GATE_PARTS; i++) {
        float *z = score + i % 2 * 4;
        z[0] += part[i].x, z[1] += part[i].y, z[2] += part[i].z, z[3] += part[i].w;
    }
    uint32_t key[EXPERTS_PER_LANE];  // larger is better; 0: not there, or taken
#pragma unroll
    for (int i = 0; i < EXPERTS_PER_LANE; i++) {
        score[i] = __fdividef(1.f, 1.f + expf(-score[i]));
        key[i] = inside ? ordered(score[i] + add[i]) + 1 : 0;
    }
    float mine = 0.f, total = 0.f;
    const int k = p.k;
#pragma unroll 1
    for (int j = 0; j < k; j++) {
        uint32_t best = 0;
#pragma unroll
        for (int i = 0; i < EXPERTS_PER_LANE; i++) best = max(best, key[i]);
        const uint32_t top = __reduce_max_sync(ALL_LANES, best);
        const int winner = __ffs(__ballot_sync(ALL_LANES, best == top)) - 1;
        float s = 0.f;
        int which = 0;
#pragma unroll
        for (int i = EXPERTS_PER_LANE - 1; i >= 0; i--)
            if (key[i] == best) which = i, s = score[i];
        if (lane == winner) {
            shared.ids[j] = first + which;
#pragma unroll
            for (int i = 0; i < EXPERTS_PER_LANE; i++)
                if (i == which) key[i] = 0;
        }
        s = __shfl_sync(ALL_LANES, s, winner);
        if (lane == j) mine = s;
        total += s;
    }
    if (lane < k) shared.weights[lane] = p.renormalize ? mine / total : mine;
    __syncwarp();
}

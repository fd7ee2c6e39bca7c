// The choice of experts of `one.cu`, by the computing warps of every block that reads experts.
#pragma once
#include "one_values.cuh"

// Computing warps and the feeding one: the former go on at once.
DEVICE void experts_are_chosen() { asm volatile("bar.arrive 2, %0;" ::"n"(ONE_THREADS) : "memory"); }
DEVICE void wait_for_choice() { asm volatile("bar.sync 2, %0;" ::"n"(ONE_THREADS) : "memory"); }

// The expert of a computing thread, if it is one. The upper warps have fewer values of the residual stream to receive.
DEVICE int expert_here() { return thread_here() ^ MAX_EXPERTS; }

// From the gate's logits: `ids`, best first, the lower expert first among equals. Always different experts, even of NaN. A
// thread has an expert and finds its rank in the warp; the best of each warp then meet. `z`: the thread's logit, `bias`: its
// expert's.
DEVICE void choose(OneShared &shared, float z, float bias) {
    static_assert(ONE_TOP_K == 8 && MAX_EXPERTS / WARP == 8 && GEMV_THREADS == 64 * 8, "a thread a candidate and eight others");
    const OneParams &p = shared.p;
    const int e = expert_here(), lane = e & 31, warp = e / WARP;
    if (warp < MAX_EXPERTS / WARP) {
        uint32_t key = 0;  // larger is better; 0: no such expert
        const bool inside = e < p.experts;
        const float score = __fdividef(1.f, 1.f + expf(-z));
        if (inside) key = ordered(score + bias) + 1;
        shared.scores[e] = score;
        __syncwarp();
        int better = -1;  // the last round meets itself
#pragma unroll 4
        for (int d = 1; d <= WARP; d++) {
            const uint32_t other = __shfl_sync(ALL_LANES, key, (lane + d) & 31);
            better += other >= key + (lane + d < WARP ? 1 : 0);
        }
        if (better < ONE_TOP_K) shared.best[warp * ONE_TOP_K + better] = key, shared.best_id[warp * ONE_TOP_K + better] = e;
    }
    meet();
    const int mine = e / 8, list = e % 8;
    const uint32_t key = shared.best[mine];
    const uint4 first = *reinterpret_cast<const uint4 *>(&shared.best[list * 8]);
    const uint4 second = *reinterpret_cast<const uint4 *>(&shared.best[list * 8 + 4]);
    const uint32_t other[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
    int better = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) better += other[i] >= key + (list * 8 + i < mine ? 0 : 1);
#pragma unroll
    for (int offset = 1; offset < 8; offset *= 2) better += __shfl_xor_sync(ALL_LANES, better, offset);
    if (list == 0 && better < p.k) shared.ids[better] = shared.best_id[mine];
    experts_are_chosen();
}

// The chosen experts' weights, by one warp, after a meeting.
DEVICE void weigh_experts(OneShared &shared) {
    const int lane = thread_here() & 31, k = shared.p.k;
    const float mine = lane < k ? shared.scores[shared.ids[lane]] : 0.f, total = warp_sum(mine);
    if (lane < k) shared.weights[lane] = shared.p.renormalize ? mine / total : mine;
}

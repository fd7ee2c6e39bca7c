// The choice of experts of `one.cu`, by the computing warps of every block that reads experts.
#pragma once
#include "one_values.cuh"

// The warps that choose, and the feeding one: the former go on at once.
DEVICE void experts_are_chosen() { asm volatile("bar.arrive 2, %0;" ::"n"(MAX_EXPERTS + WARP) : "memory"); }
DEVICE void wait_for_choice() { asm volatile("bar.sync 2, %0;" ::"n"(MAX_EXPERTS + WARP) : "memory"); }
DEVICE void choosers_meet() { asm volatile("bar.sync 3, %0;" ::"n"(MAX_EXPERTS) : "memory"); }

// The expert of a computing thread: the upper warps have them, which have fewer values of the residual stream to receive.
// Negative: none.
DEVICE int expert_here() { return thread_here() - (GEMV_THREADS - MAX_EXPERTS); }

// How many of N keys of a list come before the key that stands at place `mine` of it, or of what lies in front of it or behind it:
// larger ones, and equal ones of lower places.
template <int N> DEVICE int count_better(const uint32_t *list, uint32_t key, int mine) {
    int better = 0;
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        const uint4 v = *reinterpret_cast<const uint4 *>(list + i);
        const uint32_t least = i + 4 <= mine ? key : key + 1;
        better += (v.x >= least) + (v.y >= least);
        better += (v.z >= least) + (v.w >= least);
    }
    // Its own four.
    const bool inside = mine >= 0 && mine < N;
    const int place = inside ? mine % 4 : 0;
    const uint4 v = *reinterpret_cast<const uint4 *>(list + (inside ? mine - place : 0));
    better += (v.x == key && place > 0) + (v.y == key && place > 1) + (v.z == key && place > 2);
    return better;
}

// From the gate's logits: `ids`, best first, the lower expert first among equals. Always different experts, even of NaN. By the
// upper warps: a thread has an expert and finds its rank in the warp; the best of each warp then meet. `z`: the thread's
// logit, `bias`: its expert's.
DEVICE void choose(OneShared &shared, float z, float bias) {
    constexpr int LISTS = MAX_EXPERTS / WARP, CANDIDATES = LISTS * ONE_TOP_K, SHARES = MAX_EXPERTS / CANDIDATES, SHARE = CANDIDATES / SHARES;
    static_assert(SHARES == 4 && SHARE == 16, "four threads a candidate, each with a quarter of the others");
    const OneParams &p = shared.p;
    const int e = expert_here(), lane = e & 31, warp = e / WARP;
    const float score = __fdividef(1.f, 1.f + expf(-z));
    // Larger is better; 0: no such expert.
    const uint32_t own = e < p.experts ? ordered(score + bias) + 1 : 0;
    shared.scores[e] = score, shared.keys[e] = own;
    __syncwarp();
    const int rank = count_better<WARP>(shared.keys + warp * WARP, own, lane);
    if (rank < ONE_TOP_K) shared.best[warp * ONE_TOP_K + rank] = own, shared.best_id[warp * ONE_TOP_K + rank] = e;
    choosers_meet();
    const int mine = e / SHARES, share = e % SHARES;
    int better = count_better<SHARE>(shared.best + share * SHARE, shared.best[mine], mine - share * SHARE);
#pragma unroll
    for (int offset = 1; offset < SHARES; offset *= 2) better += __shfl_xor_sync(ALL_LANES, better, offset);
    if (share == 0 && better < p.k) shared.ids[better] = shared.best_id[mine];
    experts_are_chosen();
}

// The chosen experts' weights, by one warp, after a meeting.
DEVICE void weigh_experts(OneShared &shared) {
    const int lane = thread_here() & 31, k = shared.p.k;
    const float mine = lane < k ? shared.scores[shared.ids[lane]] : 0.f, total = warp_sum(mine);
    if (lane < k) shared.weights[lane] = shared.p.renormalize ? mine / total : mine;
}

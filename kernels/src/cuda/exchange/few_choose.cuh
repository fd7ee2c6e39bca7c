// The choice of a token's experts by the block that sends its row: all threads score, the scout chooses.
#pragma once
#include "../../ops/route/choosing.cuh"
#include "few_parts.cuh"

// With sums of squares for the token's norm.
struct Sent : Choosing {
    float squares[FEW_THREADS / WARP];
};

// By the scout.
DEVICE void choose_candidates(const DispatchFew &d, int token, Choosing &choosing) {
    rank_candidates(choosing, d.route.k, threadIdx.x & 31, WARP);
    __syncwarp();
    finish_choice(d.route, token, choosing, d.ids, d.weights);
}

// Parameters of the kernels that add experts' results to the residual stream.
#pragma once
#include "rows.cuh"

// hidden[t] += sum over j of weights[t, j] * y[t * k + j], in the order of the slots; then, if there is a place for it,
// the norm of the new hidden.
struct CombineRows {
    NormRows norm;      // input.x0: hidden; input.sum_out: hidden; normed and plane null: no norm
    const float *y;     // [tokens * slots, k], or null:
    const __nv_bfloat16 *sorted;  // the same values, row row_of_slot[token * slots + j]
    const uint32_t *row_of_slot;
    const float *weights;
    int slots;
};

// Parameters of the two prefill kernels.
#pragma once
#include "pages.cuh"

struct PrefillBlock {
    int run, first_row;
};

struct PrefillParams {
    Pages pages;
    const PrefillBlock *blocks;  // longest contexts first
    const int *run_first;        // [runs]: first token of the run in q and out
    const int *run_length;
    const int *run_position;     // of the first token
    const float *q;              // [tokens, heads * head_dim]
    float *out;                  // [tokens, heads * head_dim] or null
    uint8_t *plane;              // plane of the tokens or null
    int plane_blocks, heads;
    float scale;
};

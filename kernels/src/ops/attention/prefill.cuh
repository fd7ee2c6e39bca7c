// Parameters of the two prefill kernels.
#pragma once
#include "pages.cuh"

// One unit of work: 128 rows (token, query head of a kv head) of a run.
struct PrefillBlock {
    int run, first_row, last_row;  // rows of the run
    int first_token;               // of the run, in q and the result
    int position;                  // of the run's first token
    int unused[3];
};

struct PrefillParams {
    Pages pages;
    const PrefillBlock *blocks;  // [block_count], longest contexts first
    const float *q;              // [tokens, heads * head_dim], or null:
    const uint16_t *q16;         // the same, times scale: BF16, with FP8 keys F16
    float *out;                  // [tokens, heads * head_dim] or null
    uint8_t *plane;              // plane of the tokens or null
    int plane_blocks, heads, block_count;
    float scale;
};

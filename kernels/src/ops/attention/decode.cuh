// Parameters shared by the attention kernels of few tokens and by the kernel that plans their splits.
#pragma once
#include "pages.cuh"

// One split of one token's context: positions [begin, end), `begin` a multiple of 64.
struct AttentionItem {
    int token, position, run, begin;
    int end, split, splits, first_item;  // the last three: of the token's items
};

constexpr int SPLIT_GRAIN = 64, SPLIT_MIN = 128, HEADS_HELD = 8;
// Work that a block of the kernel looks up at a time: the list of items has room for that of all blocks.
constexpr int LISTED = 32;

struct AttentionParams {
    Pages pages;
    const AttentionItem *items;
    const int *item_count;
    // Queries: normalised and rotated [tokens, heads * head_dim], or, with `qkv`, made here.
    const float *q;
    // q, k and v of one decode step as the projection left them: [tokens, (heads + 2 kv_heads) * head_dim].
    const float *qkv;
    const float *squares;             // [tokens][(heads + 2 kv_heads) * head_dim / 32], or null: no norm
    const float *q_norm, *k_norm;     // over the whole projection
    const double *turns;              // [rotary / 2]: turns per position
    float eps, scale;                 // scale: log2(e) / sqrt(head_dim)
    int heads, rotary;
    // Unfinished splits: [item][head block][8][head_dim], and (maximum, sum) of each row.
    float *partial;
    float2 *partial_sums;
    unsigned *arrived;  // [token][head block], zero between kernels
    // Result: a plane for the next linear, or F32 [tokens, heads * head_dim], or, if splits are left, nothing: the next
    // linear adds them itself.
    uint8_t *plane;
    float *out;
    int plane_blocks, leave_splits;
};

// What the blocks of a row's cluster share: each has a run of neighbouring logits in its shared memory, in order of rank.
#pragma once
#include "../../cuda/cluster.cuh"
#include "sample.cuh"

constexpr int ROW_BLOCKS = 8, ROW_THREADS = 512, ROW_WARPS = ROW_THREADS / WARP, BINS = 1024, CANDIDATES = 1536;

using Mass = unsigned long long;

// The largest value and its lowest index; the first index of a NaN or +infinity.
struct Best {
    float value;
    int index;
    int bad;
};

DEVICE Best nothing() { return {-INFINITY, INT32_MAX, INT32_MAX}; }

DEVICE Best better(Best a, Best b) {
    const bool second = b.value > a.value || (b.value == a.value && b.index < a.index);
    return {second ? b.value : a.value, second ? b.index : a.index, min(a.bad, b.bad)};
}

DEVICE Best warp_best(Best v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        v = better(v, {__shfl_xor_sync(ALL_LANES, v.value, offset), __shfl_xor_sync(ALL_LANES, v.index, offset),
                       __shfl_xor_sync(ALL_LANES, v.bad, offset)});
    return v;
}

template <int WARPS> DEVICE Best block_best(Best v, Best *scratch) {
    v = warp_best(v);
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x / WARP] = v;
    __syncthreads();
    for (int w = 0; w < WARPS; w++) v = better(v, scratch[w]);
    __syncthreads();
    return v;
}

struct RowShared {
    union {
        struct {
            uint32_t low[BINS], high[BINS];  // a histogram: the two words of its sums
        };
        Mass lists[ROW_WARPS][WARP];
        Mass candidates[CANDIDATES];
    };
    Best scratch[ROW_WARPS];
    Mass sums[ROW_WARPS];
    // Of this block, for the others.
    Best best;
    Mass masses[2];
    double exponentials;
    float largest;
    unsigned above, candidate_count;
    // Of the row.
    Mass total, before, threshold;
    int bin;
    uint32_t token;
};

// This block's part of the row.
struct Part {
    float *values;  // in shared memory
    int begin, count;
    uint32_t rank;
    RowShared &shared;
};

template <class T> DEVICE T in_peer(const T &mine, uint32_t rank) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    const uint32_t there = in_block(shared_address(&mine), rank);
    T v;
    if constexpr (sizeof(T) == 4) {
        uint32_t bits;
        asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(bits) : "r"(there) : "memory");
        memcpy(&v, &bits, 4);
    } else {
        uint64_t bits;
        asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(bits) : "r"(there) : "memory");
        memcpy(&v, &bits, 8);
    }
    return v;
}

DEVICE void store_in_peers(uint32_t &mine, uint32_t v) {
    for (uint32_t rank = 0; rank < ROW_BLOCKS; rank++)
        asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(in_block(shared_address(&mine), rank)), "r"(v) : "memory");
}

// Inclusive sum over the block, thread 0 first.
DEVICE Mass scan(Mass v, Mass *scratch) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / WARP;
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
        const Mass other = __shfl_up_sync(ALL_LANES, v, offset);
        if (lane >= offset) v += other;
    }
    __syncthreads();
    if (lane == 31) scratch[warp] = v;
    __syncthreads();
    Mass before = 0;
    for (int w = 0; w < warp; w++) before += scratch[w];
    return before + v;
}

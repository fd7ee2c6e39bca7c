// Log-probabilities of the logits as the model gave them. Every sum has one order: a thread's values, a warp, the warps, the
// blocks.
//
// The best k: the k-th largest of all threads' largest values is a bound that k values reach at least, all of them in k
// threads; what these have above it is sorted.
#pragma once
#include "row.cuh"

// Larger first, then the lower index; 0: none. No two are equal.
DEVICE Mass key_of(float x, uint32_t index) {
    const uint32_t bits = __float_as_uint(x + 0.f);  // -0 is 0
    return static_cast<Mass>(bits >> 31 ? ~bits : bits | 1u << 31) << 32 | ~index;
}
DEVICE uint32_t index_of(Mass key) { return ~static_cast<uint32_t>(key); }

// One key a lane, the largest in lane 0.
DEVICE Mass exchange(Mass key, int distance, bool larger) {
    const Mass other = __shfl_xor_sync(ALL_LANES, key, distance);
    return larger == (other > key) ? other : key;
}
DEVICE Mass sorted(Mass key) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int size = 2; size <= WARP; size *= 2)
#pragma unroll
        for (int distance = size / 2; distance > 0; distance /= 2)
            key = exchange(key, distance, ((lane & distance) == 0) == ((lane & size) == 0));
    return key;
}
// The 32 largest of two sorted lists.
DEVICE Mass merged(Mass a, Mass b) {
    const int lane = threadIdx.x & 31;
    const Mass turned = __shfl_sync(ALL_LANES, b, WARP - 1 - lane);
    Mass key = a > turned ? a : turned;
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) key = exchange(key, distance, (lane & distance) == 0);
    return key;
}

// In every thread of all blocks: the `best`-th largest of the threads' keys, 1 if there are fewer.
DEVICE Mass bound_of(Mass key, int best, RowShared &shared) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / WARP;
    Mass list = sorted(key);
    shared.lists[warp][lane] = list;
#pragma unroll
    for (int half = ROW_WARPS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (warp < half) {
            list = merged(list, shared.lists[warp + half][lane]);
            shared.lists[warp][lane] = list;
        }
    }
    cluster_sync();
    if (warp == 0) {
        list = in_peer(shared.lists[0][lane], 0);
        for (uint32_t rank = 1; rank < ROW_BLOCKS; rank++) list = merged(list, in_peer(shared.lists[0][lane], rank));
        if (lane == best - 1) shared.threshold = list > 0 ? list : 1;
    }
    cluster_sync();
    return shared.threshold;
}

// Of the row whose token is known. Overwrites the values.
DEVICE void log_probabilities(const float *logits, uint32_t token, int best, const Part &part, SampleLogprobs *result) {
    RowShared &shared = part.shared;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / WARP;
    const float own = logits[token];
    float largest = -INFINITY;
    unsigned above = 0;
    Mass key = 0;
#pragma unroll 8
    for (int i = threadIdx.x; i < part.count; i += ROW_THREADS) {
        const float x = logits[part.begin + i];
        part.values[i] = x;
        above += x > own;
        // An equal one comes later.
        if (x > largest) largest = x, key = key_of(x, part.begin + i);
    }
    const Best most = block_best<ROW_WARPS>({largest, 0, 0}, shared.scratch);
    const Mass rank_before = scan(above, shared.sums);
    if (threadIdx.x == ROW_THREADS - 1) shared.largest = most.value, shared.above = static_cast<unsigned>(rank_before), shared.candidate_count = 0;
    cluster_sync();
    largest = -INFINITY;
    for (uint32_t rank = 0; rank < ROW_BLOCKS; rank++) largest = fmaxf(largest, in_peer(shared.largest, rank));
    double sum = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < part.count; i += ROW_THREADS) sum += static_cast<double>(expf(part.values[i] - largest));
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
    double *sums = reinterpret_cast<double *>(shared.sums);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < ROW_WARPS; w++) sum += sums[w];
        shared.exponentials = sum;
    }
    if (best > 0) {
        const Mass bound = bound_of(key, best, shared);
        if (key >= bound)
            for (int i = threadIdx.x; i < part.count; i += ROW_THREADS) {
                const float x = part.values[i];
                const Mass one = x > -INFINITY ? key_of(x, part.begin + i) : 0;
                if (one >= bound) shared.candidates[atomicAdd(&shared.candidate_count, 1u)] = one;
            }
    }
    cluster_sync();
    if (part.rank != 0 || warp != 0) return;
    sum = 0;
    above = 0;
    for (uint32_t rank = 0; rank < ROW_BLOCKS; rank++) sum += in_peer(shared.exponentials, rank), above += in_peer(shared.above, rank);
    const double log_sum = log(sum);
    const auto logprob = [&](float x) { return static_cast<float>(static_cast<double>(x - largest) - log_sum); };
    if (lane == 0) result->logprob = logprob(own), result->rank = above + 1;
    Mass list = 0;
    for (uint32_t rank = 0; rank < ROW_BLOCKS; rank++) {
        const int count = in_peer(shared.candidate_count, rank);
        for (int at = 0; at < count; at += WARP)
            list = merged(list, sorted(at + lane < count ? in_peer(shared.candidates[at + lane], rank) : 0));
    }
    const bool is_one = lane < best && list > 0;
    if (is_one) result->tokens[lane] = index_of(list), result->logprobs[lane] = logprob(logits[index_of(list)]);
    const unsigned ones = __ballot_sync(ALL_LANES, is_one);
    if (lane == 0) result->count = __popc(ones);
}

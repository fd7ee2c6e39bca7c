// Steps 5 and 6 for a row whose adjusted logits lie in its cluster: p = e^((x - max) / temperature) as an integer of 40
// fractional bits, so that every sum is exact whatever its order; top-k, top-p and the draw itself are the same search, three
// passes with a histogram of the bits of p from the largest down.
#pragma once
#include "row.cuh"

// Philox 4x32-10, the first 64 bits, keyed by the seed and counted by the position: uniform in [0, 1) with 53 bits.
DEVICE double uniform(uint64_t seed, uint32_t position) {
    uint32_t c[4] = {position, 0, 0, 0}, k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
    for (int i = 0; i < 10; i++) {
        const uint64_t a = static_cast<uint64_t>(c[0]) * 0xD2511F53u, b = static_cast<uint64_t>(c[2]) * 0xCD9E8D57u;
        const uint32_t n0 = static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, n2 = static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1;
        c[0] = n0, c[1] = static_cast<uint32_t>(b), c[2] = n2, c[3] = static_cast<uint32_t>(a);
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return static_cast<double>((static_cast<uint64_t>(c[0]) << 32 | c[1]) >> 11) * 0x1p-53;
}

DEVICE Mass mass_of(float p) { return static_cast<Mass>(static_cast<double>(p) * 0x1p40); }

// Kept: p above `limit`, and of those equal to it the first `equal` by index.
struct Kept {
    uint32_t limit;
    unsigned equal;
    __device__ bool has_all_equal() const { return equal == UINT32_MAX; }
    // But for those at a limit that only some of have, which are counted by their number.
    __device__ bool surely(float p) const {
        const uint32_t bits = __float_as_uint(p);
        return p >= 0.f && (bits > limit || (bits == limit && has_all_equal()));
    }
    __device__ Mass mass_at_limit() const { return has_all_equal() ? 0 : equal * mass_of(__uint_as_float(limit)); }
};

// 64 bits by two words: shared memory adds words at once, but longer ones only by trying again and again.
DEVICE void add(RowShared &shared, int bin, Mass amount) {
    const uint32_t low = static_cast<uint32_t>(amount);
    uint32_t high = static_cast<uint32_t>(amount >> 32);
    if (low && atomicAdd(&shared.low[bin], low) > UINT32_MAX - low) high++;
    if (high) atomicAdd(&shared.high[bin], high);
}

// Walks from the largest p down until the count (or mass) reaches `goal` >= 1 (or all of it, if it is less). Returns
// the bits of the p where that happens; `goal` becomes what is still missing before the ones equal to it.
template <bool MASS> DEVICE uint32_t descend(const Part &part, const Kept &kept, Mass &goal) {
    static_assert(BINS == 2 * ROW_THREADS);
    RowShared &shared = part.shared;
    uint32_t prefix = 0;
    for (int pass = 0; pass < 3; pass++) {
        const int shift = 20 - 10 * pass, above = shift + 10;
        for (int b = threadIdx.x; b < BINS; b += ROW_THREADS) shared.low[b] = 0, shared.high[b] = 0;
        __syncthreads();
#pragma unroll 4
        for (int i = threadIdx.x; i < part.count; i += ROW_THREADS) {
            const float p = part.values[i];
            const uint32_t bits = __float_as_uint(p);
            if (!kept.surely(p) || (pass > 0 && bits >> above != prefix >> above)) continue;
            add(shared, bits >> shift & (BINS - 1), MASS ? mass_of(p) : 1);
        }
        if (threadIdx.x == 0 && part.rank == 0 && !kept.has_all_equal() && (pass == 0 || kept.limit >> above == prefix >> above))
            add(shared, kept.limit >> shift & (BINS - 1), MASS ? kept.mass_at_limit() : kept.equal);
        cluster_sync();
        const int bin = BINS - 1 - 2 * threadIdx.x;
        Mass upper = 0, lower = 0;
#pragma unroll
        for (uint32_t rank = 0; rank < ROW_BLOCKS; rank++) {
            // Two neighbouring bins: (lower, upper).
            const Mass low = in_peer(*reinterpret_cast<const Mass *>(&shared.low[bin - 1]), rank);
            const Mass high = in_peer(*reinterpret_cast<const Mass *>(&shared.high[bin - 1]), rank);
            lower += (high << 32) + static_cast<uint32_t>(low);
            upper += (high >> 32 << 32) + (low >> 32);
        }
        const Mass sum = scan(upper + lower, shared.sums);
        if (threadIdx.x == ROW_THREADS - 1) shared.total = sum;
        __syncthreads();
        goal = min(goal, shared.total);
        const Mass middle = sum - lower, start = middle - upper;
        if (upper && middle >= goal && start < goal) shared.bin = bin, shared.before = start;
        if (lower && sum >= goal && middle < goal) shared.bin = bin - 1, shared.before = middle;
        // The others have read this block's histogram.
        cluster_sync();
        prefix |= static_cast<uint32_t>(shared.bin) << shift;
        goal -= shared.before;
    }
    return prefix;
}

// The row's sum of the blocks' `own` (of one thread each, sums over the block); `before`: of the blocks before this one.
DEVICE Mass over_blocks(const Part &part, Mass &slot, Mass own_total, bool writes, Mass &before) {
    if (writes) slot = own_total;
    cluster_sync();
    Mass sum = 0;
    before = 0;
#pragma unroll
    for (uint32_t rank = 0; rank < ROW_BLOCKS; rank++) {
        const Mass own = in_peer(slot, rank);
        if (rank < part.rank) before += own;
        sum += own;
    }
    return sum;
}

// The token where a running sum by index passes `goal` (reaches goal + 1), to all blocks; each warp owns a run of
// neighbouring indices.
template <class Amount> DEVICE void find_by_index(const Part &part, Mass goal, const Amount &amount) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / WARP;
    const int each = ceil_div(ceil_div(part.count, WARP), ROW_WARPS) * WARP;
    const int begin = min(warp * each, part.count), end = min(begin + each, part.count);
    Mass own = 0;
    for (int i = begin + lane; i < end; i += WARP) own += amount(part.values[i]);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) own += __shfl_xor_sync(ALL_LANES, own, offset);
    const Mass up_to = scan(lane == 0 ? own : 0, part.shared.sums);
    Mass before;
    over_blocks(part, part.shared.masses[1], up_to, threadIdx.x == ROW_THREADS - 1, before);
    before += __shfl_sync(ALL_LANES, up_to, 0) - own;
    if (before > goal || before + own <= goal) return;
    for (int i = begin; i < end; i += WARP) {
        const Mass mine = i + lane < end ? amount(part.values[i + lane]) : 0;
        Mass sum = mine;
#pragma unroll
        for (int offset = 1; offset < WARP; offset *= 2) {
            const Mass other = __shfl_up_sync(ALL_LANES, sum, offset);
            if (lane >= offset) sum += other;
        }
        if (mine && before + sum > goal && before + sum - mine <= goal) store_in_peers(part.shared.token, part.begin + i + lane);
        before += __shfl_sync(ALL_LANES, sum, 31);
        if (before > goal) return;
    }
}

// Draws a token into `shared.token` of all blocks; it is there after the next cluster_sync. `largest` is above -infinity and
// spec.min_p not above 1, so that one token is likely enough at least. Overwrites the values.
DEVICE void draw(const Part &part, const SampleSpec &spec, uint32_t position, float largest, int vocab) {
    Mass sum = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < part.count; i += ROW_THREADS) {
        const float x = part.values[i], p = x == -INFINITY ? 0.f : expf((x - largest) / spec.temperature);
        const bool likely = x != -INFINITY && !(p < spec.min_p);
        part.values[i] = likely ? p : -1.f;
        if (likely) sum += mass_of(p);
    }
    __syncthreads();
    Kept kept{0, UINT32_MAX};
    const bool top_k = spec.top_k > 0 && spec.top_k < static_cast<uint32_t>(vocab), top_p = spec.top_p < 1.f;
    if (top_k) {
        Mass goal = spec.top_k;
        const uint32_t limit = descend<false>(part, kept, goal);
        kept = {limit, static_cast<unsigned>(goal)};
        sum = 0;
        for (int i = threadIdx.x; i < part.count; i += ROW_THREADS)
            if (kept.surely(part.values[i])) sum += mass_of(part.values[i]);
    }
    Mass before;
    sum = scan(sum, part.shared.sums);
    sum = over_blocks(part, part.shared.masses[0], sum, threadIdx.x == ROW_THREADS - 1, before) + kept.mass_at_limit();
    if (top_p) {
        Mass goal = static_cast<Mass>(static_cast<double>(sum) * spec.top_p);
        if (goal == 0) goal = 1;
        const Mass wanted = goal;
        const uint32_t limit = descend<true>(part, kept, goal);
        const Mass each = mass_of(__uint_as_float(limit));
        const unsigned equal = each ? static_cast<unsigned>((goal + each - 1) / each) : 1;
        sum = wanted - goal + equal * each;
        kept = {limit, equal};
    }
    Mass goal = static_cast<Mass>(uniform(spec.seed, position) * static_cast<double>(sum));
    if (goal >= sum) goal = sum - 1;
    if (top_k || top_p) {
        goal += 1;
        const uint32_t chosen = descend<true>(part, kept, goal);
        const Mass each = mass_of(__uint_as_float(chosen));
        const Mass nth = each ? (goal - 1) / each : 0;
        find_by_index(part, nth, [&](float p) -> Mass { return p >= 0.f && __float_as_uint(p) == chosen; });
    } else {
        find_by_index(part, goal, [&](float p) -> Mass { return p >= 0.f ? mass_of(p) : 0; });
    }
}

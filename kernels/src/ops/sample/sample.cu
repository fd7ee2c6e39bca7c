// Tokens from logits without the host: steps 4 to 6 of sampling (see mod.rs); rows that need more go through the CPU.
//
// `sample_greedy` finds each row's maximum (many blocks a row, the last one to arrive adds up) and ends rows with
// temperature 0. `sample_rest` draws the others, one block a row: p = e^((x - max) / temperature) as an integer of
// 40 fractional bits, so that every sum is exact whatever its order; top-k, top-p and the draw itself are the same
// search, three passes over the row with a histogram of the bits of p from the largest down.
#include "../../cuda/ptx.cuh"

struct SampleSpec {
    float temperature, top_p, min_p;
    uint32_t top_k;
    uint64_t seed;
    uint32_t position;  // of the sampled token
    uint32_t token;     // result goes to tokens[token]
};

struct SampleTokens {
    const float *logits;     // [rows, vocab]
    const SampleSpec *specs; // [rows]
    const int *positions;    // of the step's tokens: position = positions[token_of[row]] + 1; null: the spec's
    const uint32_t *token_of;
    float4 *slices;          // [rows][slices]
    unsigned *arrived;       // [rows], zero between kernels
    float4 *best;            // [rows]: maximum, its index as bits, 1 if a logit is NaN or +inf
    uint32_t *tokens;        // results; a row with a bad logit gets BAD_LOGIT, one without a choice NO_TOKEN
    int rows, vocab, slice_count;
};

constexpr uint32_t BAD_LOGIT = 0xffffffffu, NO_TOKEN = 0xfffffffeu;
constexpr int GREEDY_THREADS = 256, SAMPLE_THREADS = 1024, BINS = 1024;

struct Best {
    float value;
    int index;
    int bad;
};

DEVICE Best better(Best a, Best b) {
    const bool second = b.value > a.value || (b.value == a.value && b.index < a.index);
    return {second ? b.value : a.value, second ? b.index : a.index, a.bad | b.bad};
}

DEVICE Best block_best(Best v, Best *scratch) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        v = better(v, {__shfl_xor_sync(ALL_LANES, v.value, offset), __shfl_xor_sync(ALL_LANES, v.index, offset),
                       __shfl_xor_sync(ALL_LANES, v.bad, offset)});
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x / WARP] = v;
    __syncthreads();
    for (int w = 0; w < GREEDY_THREADS / WARP; w++) v = better(v, scratch[w]);
    __syncthreads();
    return v;
}

extern "C" __global__ void __launch_bounds__(GREEDY_THREADS) sample_greedy(const __grid_constant__ SampleTokens p) {
    __shared__ Best scratch[GREEDY_THREADS / WARP];
    __shared__ int last;
    wait_for_inputs();
    allow_next_kernel();
    const int row = blockIdx.y, each = ceil_div(ceil_div(p.vocab, 4), p.slice_count) * 4;
    const float *logits = p.logits + static_cast<size_t>(row) * p.vocab;
    const int begin = blockIdx.x * each, end = min(begin + each, p.vocab);
    Best best{-INFINITY, INT32_MAX, 0};
    for (int i = begin + threadIdx.x; i < end; i += GREEDY_THREADS) {
        const float x = logits[i];
        best = better(best, {x, i, !(x < INFINITY)});
    }
    best = block_best(best, scratch);
    if (threadIdx.x == 0) {
        p.slices[row * p.slice_count + blockIdx.x] = make_float4(best.value, __int_as_float(best.index), best.bad, 0.f);
        __threadfence();
        last = atomicAdd(&p.arrived[row], 1u) == static_cast<unsigned>(p.slice_count - 1);
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    best = {-INFINITY, INT32_MAX, 0};
    for (int i = threadIdx.x; i < p.slice_count; i += GREEDY_THREADS) {
        const float4 v = __ldcg(&p.slices[row * p.slice_count + i]);
        best = better(best, {v.x, __float_as_int(v.y), v.z != 0.f});
    }
    best = block_best(best, scratch);
    if (threadIdx.x == 0) {
        p.arrived[row] = 0;
        p.best[row] = make_float4(best.value, __int_as_float(best.index), best.bad, 0.f);
        uint32_t token = best.index;
        if (best.bad)
            token = BAD_LOGIT;
        else if (best.value == -INFINITY)
            token = NO_TOKEN;
        if (p.specs[row].temperature == 0.f || token >= NO_TOKEN) p.tokens[p.specs[row].token] = token;
    }
}

// ---- the draw --------------------------------------------------------------------------------------------------

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

struct Row {
    const float *logits;
    int vocab;
    float largest, temperature, min_p;
    // Kept: p above `limit`, and of those equal to it the first `equal` by index.
    uint32_t limit;
    unsigned equal;
    __device__ float probability(int i) const {
        const float x = logits[i];
        const float p = x == -INFINITY ? 0.f : expf((x - largest) / temperature);
        return x == -INFINITY || p < min_p ? -1.f : p;
    }
};

DEVICE unsigned long long mass_of(float p) { return static_cast<unsigned long long>(static_cast<double>(p) * 0x1p40); }

struct SampleShared {
    unsigned long long bins[BINS];
    unsigned long long scratch[SAMPLE_THREADS / WARP];
    unsigned long long before;
    int bin;
};

// Inclusive sum over the block, thread 0 first.
DEVICE unsigned long long scan(unsigned long long v, unsigned long long *scratch) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / WARP;
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
        const unsigned long long other = __shfl_up_sync(ALL_LANES, v, offset);
        if (lane >= offset) v += other;
    }
    __syncthreads();
    if (lane == 31) scratch[warp] = v;
    __syncthreads();
    unsigned long long before = 0;
    for (int w = 0; w < warp; w++) before += scratch[w];
    return before + v;
}

// Walks from the largest p down until the count (or mass) reaches `goal` >= 1 (or all of it, if it is less). Returns
// the bits of the p where that happens; `goal` becomes what is still missing before the ones equal to it.
template <bool MASS> DEVICE uint32_t descend(const Row &row, unsigned long long &goal, SampleShared &shared) {
    uint32_t prefix = 0;
    for (int pass = 0; pass < 3; pass++) {
        const int shift = 20 - 10 * pass, above = shift + 10;
        shared.bins[threadIdx.x] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < row.vocab; i += SAMPLE_THREADS) {
            const float p = row.probability(i);
            if (p < 0.f) continue;
            const uint32_t bits = __float_as_uint(p);
            if (bits < row.limit || (bits == row.limit && row.equal != UINT32_MAX)) continue;
            if (pass > 0 && bits >> above != prefix >> above) continue;
            const unsigned long long amount = MASS ? mass_of(p) : 1;
            if (amount) atomicAdd(&shared.bins[bits >> shift & (BINS - 1)], amount);
        }
        if (threadIdx.x == 0 && row.equal != UINT32_MAX && (pass == 0 || row.limit >> above == prefix >> above))
            atomicAdd(&shared.bins[row.limit >> shift & (BINS - 1)],
                      row.equal * (MASS ? mass_of(__uint_as_float(row.limit)) : 1ull));
        __syncthreads();
        const int bin = BINS - 1 - threadIdx.x;
        const unsigned long long own = shared.bins[bin], sum = scan(own, shared.scratch);
        if (threadIdx.x == SAMPLE_THREADS - 1) shared.before = sum;
        __syncthreads();
        if (shared.before < goal) goal = shared.before;
        __syncthreads();
        if (own && sum >= goal && sum - own < goal) shared.bin = bin, shared.before = sum - own;
        __syncthreads();
        prefix |= static_cast<uint32_t>(shared.bin) << shift;
        goal -= shared.before;
        __syncthreads();
    }
    return prefix;
}

// The index where a running sum by index passes `goal` (reaches goal + 1); each warp owns a run of neighbouring indices.
template <class Amount> DEVICE void find_by_index(int vocab, unsigned long long goal, SampleShared &shared, const Amount &amount, uint32_t *token) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / WARP, warps = SAMPLE_THREADS / WARP;
    const int each = ceil_div(ceil_div(vocab, WARP), warps) * WARP, begin = min(warp * each, vocab), end = min(begin + each, vocab);
    unsigned long long own = 0;
    for (int i = begin + lane; i < end; i += WARP) own += amount(i);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) own += __shfl_xor_sync(ALL_LANES, own, offset);
    __syncthreads();
    if (lane == 0) shared.scratch[warp] = own;
    __syncthreads();
    unsigned long long before = 0;
    for (int w = 0; w < warp; w++) before += shared.scratch[w];
    if (before > goal || before + own <= goal) return;
    for (int i = begin; i < end; i += WARP) {
        const unsigned long long mine = i + lane < end ? amount(i + lane) : 0;
        unsigned long long sum = mine;
#pragma unroll
        for (int offset = 1; offset < WARP; offset *= 2) {
            const unsigned long long other = __shfl_up_sync(ALL_LANES, sum, offset);
            if (lane >= offset) sum += other;
        }
        if (mine && before + sum > goal && before + sum - mine <= goal) *token = i + lane;
        before += __shfl_sync(ALL_LANES, sum, 31);
        if (before > goal) return;
    }
}

extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS) sample_rest(const __grid_constant__ SampleTokens p) {
    __shared__ SampleShared shared;
    wait_for_inputs();
    allow_next_kernel();
    const SampleSpec spec = p.specs[blockIdx.x];
    const float4 best = p.best[blockIdx.x];
    if (spec.temperature == 0.f || best.z != 0.f || best.x == -INFINITY) return;
    uint32_t *token = p.tokens + spec.token;
    const uint32_t position = p.positions ? p.positions[p.token_of[blockIdx.x]] + 1 : spec.position;
    Row row{p.logits + static_cast<size_t>(blockIdx.x) * p.vocab, p.vocab, best.x, spec.temperature, spec.min_p, 0, UINT32_MAX};
    if (threadIdx.x == 0) *token = NO_TOKEN;
    const bool top_k = spec.top_k > 0 && spec.top_k < static_cast<uint32_t>(p.vocab), top_p = spec.top_p < 1.f;
    if (top_k) {
        unsigned long long goal = spec.top_k;
        const uint32_t limit = descend<false>(row, goal, shared);
        row.limit = limit, row.equal = static_cast<unsigned>(goal);
    }
    // The mass of what is kept.
    unsigned long long sum = 0;
    for (int i = threadIdx.x; i < p.vocab; i += SAMPLE_THREADS) {
        const float q = row.probability(i);
        const uint32_t bits = __float_as_uint(q);
        if (q >= 0.f && (bits > row.limit || (bits == row.limit && row.equal == UINT32_MAX))) sum += mass_of(q);
    }
    sum = scan(sum, shared.scratch);
    if (threadIdx.x == SAMPLE_THREADS - 1)
        shared.before = sum + (row.equal == UINT32_MAX ? 0 : row.equal * mass_of(__uint_as_float(row.limit)));
    __syncthreads();
    sum = shared.before;
    __syncthreads();
    if (sum == 0) return;
    if (top_p) {
        unsigned long long goal = static_cast<unsigned long long>(static_cast<double>(sum) * spec.top_p);
        if (goal == 0) goal = 1;
        const unsigned long long wanted = goal;
        const uint32_t limit = descend<true>(row, goal, shared);
        const unsigned long long each = mass_of(__uint_as_float(limit));
        const unsigned equal = each ? static_cast<unsigned>((goal + each - 1) / each) : 1;
        sum = wanted - goal + equal * each;
        row.limit = limit, row.equal = equal;
    }
    unsigned long long goal = static_cast<unsigned long long>(uniform(spec.seed, position) * static_cast<double>(sum));
    if (goal >= sum) goal = sum - 1;
    if (top_k || top_p) {
        goal += 1;
        const uint32_t chosen = descend<true>(row, goal, shared);
        const unsigned long long each = mass_of(__uint_as_float(chosen));
        const unsigned long long nth = each ? (goal - 1) / each : 0;
        find_by_index(p.vocab, nth, shared, [&](int i) -> unsigned long long { const float q = row.probability(i); return q >= 0.f && __float_as_uint(q) == chosen; }, token);
    } else {
        find_by_index(p.vocab, goal, shared, [&](int i) -> unsigned long long { const float q = row.probability(i); return q >= 0.f ? mass_of(q) : 0; }, token);
    }
}

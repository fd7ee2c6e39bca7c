// Rows that take the largest logit as it is: some blocks a row, so many that all rows' occupy the device once; the last one to
// arrive tells the token. Few registers, for eight blocks a multiprocessor; what is loaded is on its way all at once.
#include "sample.cuh"

constexpr int GREEDY_THREADS = 256, GREEDY_BLOCKS = 8, AHEAD = 4;

// A logit as an integer of the same order; above all of them a row's first bad one, NaN or +infinity.
struct Top {
    uint32_t key, index;
};

constexpr uint32_t BAD = 0xffffffffu, OF_MINUS_INFINITY = 0x007fffffu;

// Both zeros are equal.
DEVICE uint32_t key_of(float x) {
    const uint32_t bits = __float_as_uint(x + 0.f);
    return bits >> 31 ? ~bits : bits | 1u << 31;
}

// NaN if one of them is.
DEVICE float max_or_nan(float a, float b) {
    float m;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
    return m;
}

// The lowest index of the largest key.
DEVICE Top warp_top(Top t) {
    const uint32_t key = __reduce_max_sync(ALL_LANES, t.key);
    return {key, __reduce_min_sync(ALL_LANES, t.key == key ? t.index : UINT32_MAX)};
}

// To the first warp.
DEVICE Top block_top(Top t) {
    __shared__ Top tops[GREEDY_THREADS / WARP];
    t = warp_top(t);
    if ((threadIdx.x & 31) == 0) tops[threadIdx.x / WARP] = t;
    __syncthreads();
    if (threadIdx.x >= WARP) return t;
    return warp_top(threadIdx.x < GREEDY_THREADS / WARP ? tops[threadIdx.x] : Top{0, UINT32_MAX});
}

// Logits 4 * quad and behind; past the end -infinity. Rows that do not begin at a multiple of 16 bytes are read word by word.
template <bool ALIGNED> DEVICE float4 load(const float *logits, int quad, int vocab) {
    const auto one = [&](int i) { return i < vocab ? logits[i] : -INFINITY; };
    if constexpr (ALIGNED)
        return 4 * quad < vocab ? reinterpret_cast<const float4 *>(logits)[quad] : make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
    return {one(4 * quad), one(4 * quad + 1), one(4 * quad + 2), one(4 * quad + 3)};
}

// Of this thread's quads among those from `begin` to `end`.
template <bool ALIGNED> DEVICE Top survey(const float *logits, int begin, int end, int vocab) {
    float best = -INFINITY, most = -INFINITY;
    int index = INT32_MAX;
    for (int quad = begin + threadIdx.x; quad < end; quad += AHEAD * GREEDY_THREADS) {
        float4 v[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            const int at = quad + k * GREEDY_THREADS;
            v[k] = load<ALIGNED>(logits, at < end ? at : vocab, vocab);
        }
        int place = -1;
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            const auto take = [&](float x, int c) {
                const bool more = x > best;
                best = more ? x : best;
                place = more ? 4 * k * GREEDY_THREADS + c : place;
                most = max_or_nan(most, x);
            };
            take(v[k].x, 0), take(v[k].y, 1), take(v[k].z, 2), take(v[k].w, 3);
        }
        if (place >= 0) index = 4 * quad + place;
    }
    if (most < INFINITY) return {key_of(best), static_cast<uint32_t>(index)};
    for (int quad = begin + threadIdx.x; quad < end; quad += GREEDY_THREADS)
        for (int i = 4 * quad; i < min(4 * quad + 4, vocab); i++)
            if (!(logits[i] < INFINITY)) return {BAD, static_cast<uint32_t>(i)};
    return {BAD, UINT32_MAX};
}

extern "C" __global__ void __launch_bounds__(GREEDY_THREADS, GREEDY_BLOCKS) sample_greedy(const __grid_constant__ SampleTokens p) {
    wait_for_inputs();
    allow_next_kernel();
    const int row = blockIdx.y, blocks = gridDim.x;
    // A question to memory in front of all loads, so only if some row is another kernel's.
    if (p.mixed && !is_plain(p.specs[row])) return;
    const uint32_t place = p.specs[row].token;
    const float *logits = p.logits + static_cast<size_t>(row) * p.vocab;
    const int quads = ceil_div(p.vocab, 4), each = ceil_div(quads, blocks);
    const int begin = min(static_cast<int>(blockIdx.x) * each, quads), end = min(begin + each, quads);
    Top t = p.vocab % 4 == 0 ? survey<true>(logits, begin, end, p.vocab) : survey<false>(logits, begin, end, p.vocab);
    t = block_top(t);
    if (threadIdx.x > 0) return;
    if (blocks > 1) {
        // Both words of a row are zero between kernels.
        atomicMax(&p.tops[row], static_cast<unsigned long long>(t.key) << 32 | ~t.index);
        unsigned before;
        asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(&p.arrived[row]) : "memory");
        if (before != static_cast<unsigned>(blocks - 1)) return;
        const unsigned long long top = atomicExch(&p.tops[row], 0ull);
        p.arrived[row] = 0;
        t = {static_cast<uint32_t>(top >> 32), ~static_cast<uint32_t>(top)};
    }
    uint32_t token = t.index;
    if (t.key == BAD)
        token = bad_logit(logits, t.index);
    else if (t.key == OF_MINUS_INFINITY)
        token = NONE_ALLOWED;
    p.tokens[place] = token;
}

// a[p] = silu(w1 x) * w3 x for every sorted row p, x = input[row_token[p]], with the weights of the row's expert.
//
// A unit is 32 channels of one group of rows (at most eight, so their images stay in shared memory); blocks take equal
// contiguous ranges of units, so a block meets few groups. Result: images, the input of `down`.
// Bytes: 2/3 of the chosen experts' streams; every distinct expert is read once (once per eight rows).
#include "experts.cuh"

template <int F> struct GateUpRuns {
    const Experts *experts;
    const Group *groups;  // in shared memory
    int unit, end, units_per_group, r, first, count;
    __device__ bool operator()(Run &run) {
        if (unit >= end) return false;
        const int group = unit / units_per_group, c = unit % units_per_group;
        unit++;
        const int stages = experts->hidden_padded / Layout<F>::K;
        const uint8_t *stream = experts->base + groups[group].expert * experts->expert_bytes +
                                (r < 2 ? 0 : experts->up_offset);
        run.from = stream + (static_cast<size_t>(c * 2 + (r & 1)) * stages + first) * Layout<F>::BYTES;
        run.stages = count;
        return true;
    }
};

// Multiplies one unit and writes its activations.
template <int F, int NT, class Queue>
DEVICE void gate_up_unit(const ExpertParams &p, Queue &queue, const Group &group, int c, uint32_t x, uint32_t sums,
                         uint32_t token_bytes, int first, int count, float *partial) {
    constexpr int HELD = 4 * NT;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31;
    float acc[NT][4];
    multiply_run<F, NT>(queue, x, sums, token_bytes, first, count, lane, p.experts.bf16_scales, acc);
    store_partials<NT>(partial, warp, lane, acc);
    __syncthreads();
    if (warp < group.rows) {
        const int tile = lane / TILE_ROWS, row = lane % TILE_ROWS;
        const float gate = sum_partials(partial, HELD, tile, RUNS, warp, row);
        const float up = sum_partials(partial, HELD, 2 + tile, RUNS, warp, row);
        const float a = gate / (1.f + __expf(-gate)) * up;
        const int padded = p.experts.inter_padded, k = c * UP_CHANNELS + lane;
        uint8_t *image = p.acted + static_cast<size_t>(group.first + warp) * image_bytes(padded);
        const __nv_bfloat16 high = __float2bfloat16_rn(a), low = __float2bfloat16_rn(a - __bfloat162float(high));
        *reinterpret_cast<__nv_bfloat16 *>(image + image_high(k & ~1) + (k & 1) * 2) = high;
        *reinterpret_cast<__nv_bfloat16 *>(image + image_low(k & ~1) + (k & 1) * 2) = low;
        const float sum = warp_sum(__bfloat162float(high) + __bfloat162float(low));
        if (lane == 0) *reinterpret_cast<float *>(image + image_sum(padded, c)) = sum;
    }
}

// TOKENS: 1, 2 or 4 with norm and choice here; 8: rows of groups.
template <int F, int TOKENS, int DEPTH> DEVICE void gate_up(const ExpertParams &p) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ uint64_t ring_barriers[GEMV_WARPS * DEPTH];
    __shared__ uint64_t image_barrier;
    __shared__ float scratch[GEMV_WARPS];
    constexpr bool INLINE = TOKENS <= INLINE_TOKENS;
    constexpr int NT_MAX = INLINE ? 1 : 2;
    __shared__ Group groups[INLINE ? INLINE_TOKENS * MAX_TOP_K : 1];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31;
    const int padded = p.experts.hidden_padded, stages = padded / Layout<F>::K;
    const int r = warp / RUNS, s = warp % RUNS;
    const uint32_t bytes = image_bytes(padded);

    uint8_t *ring = shared + warp * DEPTH * Layout<F>::BYTES;
    uint8_t *image = shared + GEMV_WARPS * DEPTH * Layout<F>::BYTES;
    float *partial = reinterpret_cast<float *>(image + TOKENS * bytes);
    Group *listed = INLINE ? groups : reinterpret_cast<Group *>(partial + 2 * PARTIAL_FLOATS<NT_MAX>);

    if (threadIdx.x == 0) {
        barrier_init(&image_barrier, 1);
        barrier_init_fence();
    }
    int count;
    InlineNorm<INLINE ? TOKENS : 1> norm;
    if constexpr (INLINE) {
        norm.load_weights(p.input);
        wait_for_inputs();
        allow_next_kernel();
        norm.load(p.input, p.route.tokens, false);
        BlockRoute &route = *reinterpret_cast<BlockRoute *>(partial);  // free until the first unit ends
        score_experts_by_block(p.route, route);
        // Warp t chooses for token t; each (token, slot) is a group of one row.
        if (warp < p.route.tokens) {
            int id;
            float weight;
            choose_experts(p.route, route.score[warp], route.choice[warp], lane, id, weight);
            const int at = warp * p.route.k + lane;
            if (lane < p.route.k) groups[at] = {id, at, 1, warp};
        }
        count = p.route.tokens * p.route.k;
    } else {
        wait_for_inputs();
        allow_next_kernel();
        count = *p.groups.count;
        for (int i = threadIdx.x; i < count; i += GEMV_THREADS) listed[i] = p.groups.group[i];
    }
    __syncthreads();

    const int units_per_group = p.experts.inter_padded / UP_CHANNELS;
    const unsigned units = count * units_per_group;  // times the blocks: far from 2^32
    const int begin = units * blockIdx.x / gridDim.x, end = units * (blockIdx.x + 1) / gridDim.x;
    int first, run;
    split_stages(stages, RUNS, s, first, run);
    GateUpRuns<F> runs{&p.experts, listed, begin, end, units_per_group, r, first, run};
    StageQueue<F, DEPTH, GateUpRuns<F>> queue(runs, ring, ring_barriers + warp * DEPTH, lane);
    queue.fill();
    if constexpr (INLINE) norm.store(p.input, p.route.tokens, 0, padded, image, bytes, scratch);

    const uint32_t x = shared_address(image);
    int loaded = -1, buffer = 0;
    uint32_t parity = 0;
    for (int unit = begin; unit < end; unit++) {
        const int g = unit / units_per_group, c = unit % units_per_group;
        const Group group = listed[g];
        float *sums_of_unit = partial + buffer * PARTIAL_FLOATS<NT_MAX>;
        if constexpr (INLINE) {
            const uint32_t mine = x + group.token * bytes;  // the token's image serves every column
            gate_up_unit<F, 1>(p, queue, group, c, mine, mine + padded * 4, 0, first, run, sums_of_unit);
        } else {
            if (g != loaded) {  // every warp is past the barrier of the unit before: nobody reads the old images
                if (threadIdx.x == 0) {
                    barrier_expect(&image_barrier, group.rows * bytes);
                    for (int i = 0; i < group.rows; i++)
                        bulk_copy(image + i * bytes,
                                  p.images + static_cast<size_t>(p.groups.row_token[group.first + i]) * bytes, bytes,
                                  &image_barrier);
                }
                barrier_wait(&image_barrier, parity);
                parity ^= 1;
                loaded = g;
            }
            if (group.rows <= 4)
                gate_up_unit<F, 1>(p, queue, group, c, x, x + padded * 4, group.rows == 1 ? 0 : bytes, first, run,
                                   sums_of_unit);
            else
                gate_up_unit<F, NT_MAX>(p, queue, group, c, x, x + padded * 4, bytes, first, run, sums_of_unit);
        }
        buffer ^= 1;
    }
}

#define GATE_UP(NAME, FORMAT, DEPTH)                                                                                   \
    extern "C" __global__ void __launch_bounds__(GEMV_THREADS, 2)                                                      \
        gate_up_##NAME##_1(const __grid_constant__ ExpertParams p) { gate_up<FORMAT, 1, DEPTH>(p); }                   \
    extern "C" __global__ void __launch_bounds__(GEMV_THREADS, 2)                                                      \
        gate_up_##NAME##_2(const __grid_constant__ ExpertParams p) { gate_up<FORMAT, 2, DEPTH>(p); }                   \
    extern "C" __global__ void __launch_bounds__(GEMV_THREADS, 2)                                                      \
        gate_up_##NAME##_4(const __grid_constant__ ExpertParams p) { gate_up<FORMAT, 4, DEPTH>(p); }                   \
    extern "C" __global__ void __launch_bounds__(GEMV_THREADS, 1)                                                      \
        gate_up_##NAME##_groups(const __grid_constant__ ExpertParams p) { gate_up<FORMAT, 8, DEPTH>(p); }

GATE_UP(int4_g128, INT4_G128, 4)
GATE_UP(int4_g32, INT4_G32, 3)
GATE_UP(fp8, FP8, 2)
GATE_UP(bf16, BF16, 2)

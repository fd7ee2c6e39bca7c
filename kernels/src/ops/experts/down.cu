// y[row_slot[p]] = w2 a[p] for every sorted row p, and, for up to four tokens, the weighted sum over the slots at once.
//
// Grouped: a unit is 64 rows of y for one group. Few tokens: a unit is 16 rows of one token for half of its slots, each
// slot by four warps; the two halves are two arrays that the next norm adds (slots in order within each).
#include "group_images.cuh"
#include "share.cuh"

template <int F> struct DownRuns {
    const Experts *experts;
    const Group *groups;
    int group, c, left, units_per_group, r, first, count;
    const uint8_t *at;  // where the next run begins, if it is of the same group as the one before
    __device__ __forceinline__ bool operator()(Run &run) {
        if (left == 0) return false;
        left--;
        constexpr int TILES = DOWN_ROWS / TILE_ROWS;
        const int tile = c * TILES + r;
        const size_t bytes = tile_bytes<F>(experts->inter_padded / Layout<F>::K);
        if (!at) at = experts->base + groups[group].expert * experts->expert_bytes + experts->down_offset + tile * bytes + stage_offset<F>(first);
        run.from = at;
        run.stages = tile * TILE_ROWS < experts->hidden ? count : 0;
        at += TILES * bytes;
        if (++c == units_per_group) c = 0, group++, at = nullptr;
        return true;
    }
};

template <int F, int NT, class Queue, class Meanwhile>
DEVICE void down_unit(const ExpertParams &p, Queue &queue, const Group &group, int c, int r, uint32_t x, uint32_t tails,
                      uint32_t token_bytes, int first, int count, float *partial, const Meanwhile &meanwhile) {
    constexpr int HELD = 4 * NT;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31;
    const bool mine = (c * (DOWN_ROWS / TILE_ROWS) + r) * TILE_ROWS < p.experts.hidden;
    float acc[NT][4];
    multiply_run<F, NT>(queue, x, tails, token_bytes, first, mine ? count : 0, lane, p.experts.bf16_scales, acc);
    store_partials<NT>(partial, warp, lane, acc);
    meanwhile();
    __syncthreads();
#pragma unroll 1
    for (int e = threadIdx.x; e < group.rows * DOWN_ROWS; e += GEMV_THREADS) {
        const int row = e % DOWN_ROWS, i = e / DOWN_ROWS, column = c * DOWN_ROWS + row;
        if (column < p.experts.hidden)
            p.y[static_cast<size_t>(p.groups.row_slot[group.first + i]) * p.experts.hidden + column] =
                sum_partials(partial, HELD, row / TILE_ROWS, RUNS, i, row % TILE_ROWS);
    }
}

// The next group's rows: all of eight rows of 2,048 values.
using DownAhead = RowsAhead<2, 4>;

template <int F> DEVICE void down_groups(const ExpertParams &p) {
    extern __shared__ __align__(128) uint8_t shared[];
    constexpr int NT_MAX = 2, DEPTH = GROUPS_DEPTH<F>, SLOTS = DEPTH * SLOT_BYTES<F, GROUPS_SPAN<F>>;
    __shared__ uint64_t ring_barriers[GEMV_WARPS * DEPTH];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31;
    const int padded = p.experts.inter_padded, stages = padded / Layout<F>::K;
    const int r = warp / RUNS, s = warp % RUNS;
    uint8_t *ring = shared + warp * SLOTS, *image = shared + GEMV_WARPS * SLOTS;
    GroupImages<F, false> images{image, nullptr, padded, p.images, 0};
    float *partial = reinterpret_cast<float *>(image + p.images * images.bytes());
    images.tails = reinterpret_cast<uint8_t *>(partial + 2 * PARTIAL_FLOATS<NT_MAX>);
    Group *listed = reinterpret_cast<Group *>(images.tails + 2 * images.held());  // the block's own, by their numbers
    // The groups come from the kernel before last, which has ended (ptx.cuh): the first weights are on their way while
    // the last one's tail still runs.
    __shared__ ShareMemory memory;
    const int units_per_group = ceil_div(p.experts.hidden, DOWN_ROWS);
    Share share;
    share.take(p, memory, units_per_group, listed);
    const int begin = share.begin, end = share.end, last = share.last;
    int first, run, g = share.group, c = share.unit;
    split_runs<F>(stages, RUNS, s, first, run);
    DownRuns<F> runs{&p.experts, listed, g, c, end - begin, units_per_group, r, first, run, nullptr};
    StageQueue<F, DEPTH, DownRuns<F>, GROUPS_SPAN<F>> queue(runs, ring, ring_barriers + warp * DEPTH, lane);
    queue.fill();
    wait_for_inputs();
    allow_next_kernel();

    int loaded = -1, buffer = 0, parts = 0;
#pragma unroll 1
    for (int unit = begin; unit < end; unit++) {
        const Group group = listed[g];
        float *sums_of_unit = partial + buffer * PARTIAL_FLOATS<NT_MAX>;
        const auto row_of = [&](int of) {
            return [from = p.x + static_cast<size_t>(listed[of].first) * padded, padded](int i) { return from + static_cast<size_t>(i) * padded; };
        };
        if (g != loaded) images.fill(row_of(g), group.rows, padded), loaded = g;
        DownAhead ahead;
        const bool turns = c + ahead.PARTS == units_per_group + parts && g < last && ahead.fits(images, group.rows, listed[g + 1].rows);
        if (turns) ahead.load(parts, row_of(g + 1), listed[g + 1].rows, padded, padded);
        const auto store = [&] {
            if (turns) ahead.store(images, listed[g + 1].rows);
        };
        const uint32_t x = images.images_of(group.rows), tails = images.tails_of();
        if (group.rows <= 4)
            down_unit<F, 1>(p, queue, group, c, r, x, tails, group.rows == 1 ? 0 : images.bytes(), first, run, sums_of_unit, store);
        else
            down_unit<F, NT_MAX>(p, queue, group, c, r, x, tails, images.bytes(), first, run, sums_of_unit, store);
        if (turns && ++parts == ahead.PARTS) parts = 0, images.place ^= 1, loaded = g + 1;
        buffer ^= 1;
        if (++c == units_per_group) c = 0, g++;
    }
}

// Units of one half: token-major, one tile each.
template <int F> struct DownSumRuns {
    const ExpertParams *p;
    const uint32_t *ids;  // in shared memory
    int unit, step, units, tiles, slot, first, count;
    __device__ __forceinline__ bool operator()(Run &run) {
        if (unit >= units) return false;
        const int token = unit / tiles, tile = unit % tiles;
        unit += step;
        run.stages = 0;
        if (slot >= 0 && count > 0) {
            const Experts &experts = p->experts;
            const int stages = experts.inter_padded / Layout<F>::K;
            run.from = experts.base + ids[token * p->route.k + slot] * experts.expert_bytes + experts.down_offset + tile * tile_bytes<F>(stages) +
                       stage_offset<F>(first);
            run.stages = count;
        }
        return true;
    }
};

constexpr int HALF_SLOTS = GEMV_WARPS / RUNS;

template <int F, int DEPTH> DEVICE void down_sum(const ExpertParams &p) {
    extern __shared__ __align__(128) uint8_t shared[];
    constexpr bool BYTES = INT4<F>;
    __shared__ uint64_t ring_barriers[GEMV_WARPS * DEPTH];
    __shared__ uint32_t ids[INLINE_TOKENS * 2 * HALF_SLOTS];
    __shared__ float weights[INLINE_TOKENS * 2 * HALF_SLOTS];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, k = p.route.k;
    const int padded = p.experts.inter_padded, stages = padded / Layout<F>::K;
    const int half = blockIdx.x & 1, slots = half ? k / 2 : k - k / 2, slot0 = half ? k - k / 2 : 0;
    const int in_half = warp / RUNS, slot = in_half < slots ? slot0 + in_half : -1, s = warp % RUNS;
    const uint32_t bytes = image_bytes<BYTES>(padded);
    constexpr int SLOTS = DEPTH * SLOT_BYTES<F>;
    uint8_t *ring = shared + warp * SLOTS, *image = shared + GEMV_WARPS * SLOTS;  // one image a slot
    float *partial = reinterpret_cast<float *>(image + HALF_SLOTS * bytes);
    // The logits come from the kernel before last: the choice is made again, and the first weights requested, while
    // the last one still runs.
    BlockRoute &route = *reinterpret_cast<BlockRoute *>(partial);  // free until the first unit ends
    score_experts_by_block(p.route, route);
    if (warp < p.route.tokens) {
        int id;
        float weight;
        choose_experts(p.route, route.score[warp], route.choice[warp], lane, id, weight);
        if (lane < k) ids[warp * k + lane] = id, weights[warp * k + lane] = weight;
    }
    __syncthreads();

    const int tiles = ceil_div(p.experts.hidden, TILE_ROWS), units = p.route.tokens * tiles;
    int first, run;
    split_runs<F>(stages, RUNS, s, first, run);
    DownSumRuns<F> runs{&p, ids, static_cast<int>(blockIdx.x / 2), static_cast<int>(gridDim.x / 2), units, tiles,
                        slot, first, run};
    StageQueue<F, DEPTH, DownSumRuns<F>> queue(runs, ring, ring_barriers + warp * DEPTH, lane);
    queue.fill();
    wait_for_inputs();
    allow_next_kernel();

    const uint32_t x = shared_address(image) + in_half * bytes;
    float *out = p.halves + static_cast<size_t>(half) * p.route.tokens * p.experts.hidden;
    int loaded = -1, buffer = 0;
#pragma unroll 1
    for (int unit = blockIdx.x / 2; unit < units; unit += gridDim.x / 2) {
        const int token = unit / tiles, tile = unit % tiles;
        if (token != loaded && slots > 0) {
            const float *from = p.x + static_cast<size_t>(token * k + slot0) * padded;
            fill_images<BYTES>([&](int i) { return from + static_cast<size_t>(i) * padded; }, slots, padded, 0, padded, image, bytes);
            loaded = token;
        }
        float acc[1][4];
        multiply_run<F, 1>(queue, x, x + padded * 2, 0, first, slot >= 0 ? run : 0, lane, p.experts.bf16_scales, acc);
        float *sums_of_unit = partial + buffer * PARTIAL_FLOATS<1>;
        store_partials<1>(sums_of_unit, warp, lane, acc);
        __syncthreads();
        const int column = tile * TILE_ROWS + threadIdx.x;
        if (threadIdx.x < TILE_ROWS && column < p.experts.hidden) {
            const size_t at = static_cast<size_t>(token) * p.experts.hidden + column;
            float sum = half ? 0.f : p.residual[at];
            for (int j = 0; j < slots; j++)
                sum += weights[token * k + slot0 + j] * sum_partials(sums_of_unit, 4, j, RUNS, 0, threadIdx.x);
            out[at] = sum;
        }
        buffer ^= 1;
    }
}

#define DOWN(NAME, FORMAT, DEPTH)                                                                                      \
    extern "C" __global__ void __launch_bounds__(GEMV_THREADS, 2)                                                      \
        down_##NAME##_sum(const __grid_constant__ ExpertParams p) { down_sum<FORMAT, DEPTH>(p); }                      \
    extern "C" __global__ void __launch_bounds__(GEMV_THREADS, 1)                                                      \
        down_##NAME##_groups(const __grid_constant__ ExpertParams p) { down_groups<FORMAT>(p); }

DOWN(int4_g128, INT4_G128, 2)
DOWN(int4_g32, INT4_G32, 2)
DOWN(fp8, FP8_EXPERTS, 2)
DOWN(bf16, BF16, 2)

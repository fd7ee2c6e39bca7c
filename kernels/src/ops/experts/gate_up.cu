// a[p] = silu(w1 x) * w3 x for every sorted row p, x = input[row_token[p]], with the weights of the row's expert.
//
// A unit is 32 channels of one group of rows (at most eight, so their images stay in shared memory); blocks take equal
// contiguous ranges of units, so a block meets few groups.
// Bytes: 2/3 of the chosen experts' streams; every distinct expert is read once (once per eight rows).
#include "group_images.cuh"
#include "share.cuh"

template <int F> struct GateUpRuns {
    const Experts *experts;
    const Group *groups;  // in shared memory
    int group, c, left, units_per_group, r, first, count;
    const uint8_t *at;  // where the next run begins, if it is of the same group as the one before
    __device__ __forceinline__ bool operator()(Run &run) {
        if (left == 0) return false;
        left--;
        const size_t tile = tile_bytes<F>(experts->hidden_padded / Layout<F>::K);
        if (!at) at = experts->base + groups[group].expert * experts->expert_bytes + (r < 2 ? 0 : experts->up_offset) + (c * 2 + (r & 1)) * tile + stage_offset<F>(first);
        run.from = at;
        run.stages = count;
        at += 2 * tile;
        if (++c == units_per_group) c = 0, group++, at = nullptr;
        return true;
    }
};

// Multiplies one unit, does `meanwhile`, and writes its activations; of up to 4 * NT rows, or, ROWS, of eight whose values are BF16.
template <int F, int NT, bool ROWS, class Queue, class Meanwhile>
DEVICE void gate_up_unit(const ExpertParams &p, Queue &queue, const Group &group, int c, uint32_t x, uint32_t tails,
                         uint32_t token_bytes, int first, int count, float *partial, const Meanwhile &meanwhile) {
    constexpr int HELD = ROWS ? 8 : 4 * NT;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31;
    if constexpr (ROWS) {
        float acc[1][4];
        multiply_rows_run<F>(queue, x, tails, token_bytes, first, count, lane, acc);
        store_row_partials(partial, warp, lane, acc);
    } else {
        float acc[NT][4];
        multiply_run<F, NT>(queue, x, tails, token_bytes, first, count, lane, p.experts.bf16_scales, acc);
        store_partials<NT>(partial, warp, lane, acc);
    }
    meanwhile();
    __syncthreads();
    if (warp < group.rows) {
        const int tile = lane / TILE_ROWS, row = lane % TILE_ROWS;
        const float gate = sum_partials(partial, HELD, tile, RUNS, warp, row);
        const float up = sum_partials(partial, HELD, 2 + tile, RUNS, warp, row);
        p.acted[static_cast<size_t>(group.first + warp) * p.experts.inter_padded + c * UP_CHANNELS + lane] =
            gate / (1.f + __expf(-gate)) * up;
    }
}

// The next group's rows: all of eight rows of 3,072 values. INT4 gained nothing by having them early, and has no registers for them.
template <int F> constexpr bool LOOKS_AHEAD = !INT4<F>;
using UpAhead = RowsAhead<3, 4>;

// Which rows the groups are of, for the first few groups of a block.
constexpr int ROWS_LISTED = 16;
using RowLists = uint32_t[ROWS_LISTED][GROUP_ROWS];

DEVICE const uint32_t *listed_rows(const ExpertParams &p, const Group *groups, const RowLists &rows, int first, int group) {
    return group - first < ROWS_LISTED ? rows[group - first] : p.groups.row_token + groups[group].first;
}

// TOKENS: 1, 2 or 4 with norm and choice here; 8: rows of groups. ROWS: all their values are BF16, as after an exchange of such rows.
template <int F, int TOKENS, int DEPTH, bool ROWS = false> DEVICE void gate_up(const ExpertParams &p) {
    extern __shared__ __align__(128) uint8_t shared[];
    constexpr bool INLINE = TOKENS <= INLINE_TOKENS, BYTES = INT4<F>;
    constexpr int NT_MAX = INLINE ? 1 : 2;
    __shared__ uint64_t ring_barriers[GEMV_WARPS * DEPTH];
    __shared__ float scratch[GEMV_WARPS];
    __shared__ Group groups[INLINE ? INLINE_TOKENS * MAX_TOP_K : 1];
    __shared__ RowLists rows;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31;
    const int padded = p.experts.hidden_padded, stages = padded / Layout<F>::K;
    const int r = warp / RUNS, s = warp % RUNS;
    constexpr int SPAN = INLINE ? Layout<F>::SPAN : GROUPS_SPAN<F>;
    constexpr int SLOTS = DEPTH * SLOT_BYTES<F, SPAN>;
    uint8_t *ring = shared + warp * SLOTS, *image = shared + GEMV_WARPS * SLOTS;
    GroupImages<F, ROWS> images{image, nullptr, padded, p.images, 0};
    const uint32_t bytes = INLINE ? image_bytes<BYTES>(padded) : images.bytes();
    float *partial = reinterpret_cast<float *>(image + (INLINE ? TOKENS : p.images) * bytes);
    images.tails = reinterpret_cast<uint8_t *>(partial + 2 * PARTIAL_FLOATS<NT_MAX>);
    Group *listed = INLINE ? groups : reinterpret_cast<Group *>(images.tails + 2 * images.held());  // the block's own, by their numbers

    Share share;
    InlineNorm<BYTES, INLINE ? TOKENS : 1> norm;
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
        __syncthreads();
        share.split(p.route.tokens * p.route.k, p.experts.inter_padded / UP_CHANNELS);
    } else {
        __shared__ ShareMemory memory;
        wait_for_inputs();
        allow_next_kernel();
        share.take(p, memory, p.experts.inter_padded / UP_CHANNELS, listed);
    }

    const int units_per_group = p.experts.inter_padded / UP_CHANNELS, begin = share.begin, end = share.end, last = share.last;
    int first, run, g = share.group, c = share.unit;
    split_runs<F>(stages, RUNS, s, first, run);
    GateUpRuns<F> runs{&p.experts, listed, g, c, end - begin, units_per_group, r, first, run, nullptr};
    StageQueue<F, DEPTH, GateUpRuns<F>, SPAN> queue(runs, ring, ring_barriers + warp * DEPTH, lane);
    queue.fill();
    const int g0 = g;
    if constexpr (!INLINE) {
        const int of = threadIdx.x / GROUP_ROWS, row = threadIdx.x % GROUP_ROWS;
        if (of < ROWS_LISTED && g0 + of <= last && row < listed[g0 + of].rows) rows[of][row] = __ldcg(p.groups.row_token + listed[g0 + of].first + row);
        __syncthreads();
    }
    if constexpr (INLINE) norm.store(p.input, p.route.tokens, 0, padded, image, bytes, scratch);

    int loaded = -1, buffer = 0, parts = 0;
#pragma unroll 1
    for (int unit = begin; unit < end; unit++) {
        const Group group = listed[g];
        float *sums_of_unit = partial + buffer * PARTIAL_FLOATS<NT_MAX>;
        if constexpr (INLINE) {
            const uint32_t mine = shared_address(image) + group.token * bytes;  // the token's image serves every column
            gate_up_unit<F, 1, false>(p, queue, group, c, mine, mine + padded * 2, 0, first, run, sums_of_unit, [] {});
        } else {
            const auto row_of = [&](int of) {
                return [&p, tokens = listed_rows(p, listed, rows, g0, of)](int i) { return p.x + static_cast<size_t>(tokens[i]) * p.experts.hidden; };
            };
            // Every warp is past the barrier of the unit before: nobody reads the old images.
            if (g != loaded) images.fill(row_of(g), group.rows, p.experts.hidden), loaded = g;
            UpAhead ahead;
            const bool turns = LOOKS_AHEAD<F> && c + ahead.PARTS == units_per_group + parts && g < last && ahead.fits(images, group.rows, listed[g + 1].rows);
            if (turns) ahead.load(parts, row_of(g + 1), listed[g + 1].rows, p.experts.hidden, padded);
            const auto store = [&] {
                if (turns) ahead.store(images, listed[g + 1].rows);
            };
            const uint32_t x = images.images_of(group.rows), tails = images.tails_of();
            if (ROWS || group.rows <= 4)
                gate_up_unit<F, 1, ROWS>(p, queue, group, c, x, tails, group.rows == 1 ? 0 : bytes, first, run, sums_of_unit, store);
            else
                gate_up_unit<F, NT_MAX, false>(p, queue, group, c, x, tails, bytes, first, run, sums_of_unit, store);
            if (turns && ++parts == ahead.PARTS) parts = 0, images.place ^= 1, loaded = g + 1;
        }
        buffer ^= 1;
        if (++c == units_per_group) c = 0, g++;
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
        gate_up_##NAME##_groups(const __grid_constant__ ExpertParams p) { gate_up<FORMAT, 8, GROUPS_DEPTH<FORMAT>>(p); }

#define GATE_UP_ROWS(NAME, FORMAT)                                                                                     \
    extern "C" __global__ void __launch_bounds__(GEMV_THREADS, 1)                                                      \
        gate_up_##NAME##_rows(const __grid_constant__ ExpertParams p) { gate_up<FORMAT, 8, GROUPS_DEPTH<FORMAT>, true>(p); }

GATE_UP(int4_g128, INT4_G128, 2)
GATE_UP(int4_g32, INT4_G32, 2)
GATE_UP(fp8, FP8_EXPERTS, 2)
GATE_UP(bf16, BF16, 2)
GATE_UP_ROWS(fp8, FP8_EXPERTS)
GATE_UP_ROWS(bf16, BF16)

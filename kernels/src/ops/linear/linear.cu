// y[t, o] = sum over i of x[t, i] w[o, i], for up to TOKENS (1, 2, 4 or 8) tokens a pass; weights are read once a pass.
//
// The inputs can be cut into `parts` over blocks: part p writes its own y, and the reader of y adds them in order.
// A residual is added to part 0. Every block makes the images of its inputs itself, while its first weights are on their
// way: from F32 rows, from the norm of a residual stream (up to four tokens of at most 3072 values; of more where the sums of its squares
// are known), or from the splits that a decode step's attention left.
// Bytes: the weight's stream; floor = bytes / bandwidth.
#include "../../cuda/gemv.cuh"

constexpr int LINEAR_SEGMENTS = 3, HEADS_HELD = 8, MOST_DEPTH = 4;

// Attention's result as unfinished splits: the weighted sum over a token's splits is the input.
struct SplitInput {
    const float *partial;     // [item][head block][8][head_dim], or null
    const float2 *sums;       // [item][head block][8]: maximum (base 2) and sum
    const int2 *splits_of;    // [tokens]: first item and their number
    int per_kv, blocks_per_kv, head_blocks, head_dim;
};

struct LinearParams {
    Weight segments[LINEAR_SEGMENTS];  // q, k, v of one projection lie end to end in y; unused ones have 0 tiles
    NormInput input;                   // x0 null: one of the next two is the input
    SplitInput splits;
    const float *x;                    // [tokens, inputs]
    float *y;                          // [parts][tokens, width]
    const float *residual;             // [tokens, width] or null
    float *squares;                    // [tokens][units]: sums of squares of each unit's outputs, or null
    const float *squared;              // or, kernels of eight tokens: [tokens][inputs / 32]: sums of squares of input.x0, whose norm is the input
    int tokens, inputs, width;
    int tiles, tiles_log2, parts;  // tiles a unit: 1, 2 or 4
    int depth;                     // slots of a warp's ring, at most MOST_DEPTH
};

template <int F> struct LinearRuns {
    const LinearParams *p;
    int unit, step, units, r, first, count;
    __device__ __forceinline__ bool operator()(Run &run) {
        if (unit >= units) return false;
        int tile = (unit << p->tiles_log2) + r;
        unit += step;
        run.stages = 0;
        if (tile < p->tiles && count > 0) {
            const Weight &w = segment_of(p->segments, tile);
            run.from = w.stream + tile * tile_bytes<F>(w.stages) + stage_offset<F>(first);
            run.stages = count;
        }
        return true;
    }
};

// The place of (item, head) among the splits' rows.
DEVICE size_t split_row(const SplitInput &in, int item, int head) {
    const int in_kv = head % in.per_kv, block = head / in.per_kv * in.blocks_per_kv + in_kv / HEADS_HELD;
    return (static_cast<size_t>(item) * in.head_blocks + block) * HEADS_HELD + in_kv % HEADS_HELD;
}

// A slice's heads, and the splits of the tokens that a thread meets first. They come from the plan at the step's start: read
// before the splits themselves are there.
struct SplitPlan {
    int first_head, heads;
    int2 of_stat, of_task;
};

DEVICE SplitPlan plan_splits(const SplitInput &in, int tokens, int k, int begin, int end) {
    SplitPlan plan;
    plan.first_head = begin / in.head_dim, plan.heads = (min(end, k) + in.head_dim - 1) / in.head_dim - plan.first_head;
    plan.of_stat = __ldcg(in.splits_of + min(static_cast<int>(threadIdx.x) / max(plan.heads, 1), tokens - 1));
    plan.of_task = __ldcg(in.splits_of + min(static_cast<int>(threadIdx.x) / WARP / max((end - begin) / IMAGE_BLOCK, 1), tokens - 1));
    return plan;
}

// The images of a slice from splits. `stats`: room for (maximum, 1 / sum) of every head of every token.
template <bool BYTES>
DEVICE void fill_from_splits(const SplitInput &in, const SplitPlan &plan, int tokens, int k, int begin, int end, uint8_t *image,
                             uint32_t token_bytes, float2 *stats) {
    const int first_head = plan.first_head, heads = plan.heads;
    const size_t stride = static_cast<size_t>(in.head_blocks) * HEADS_HELD;
#pragma unroll 1
    for (int i = threadIdx.x; i < tokens * heads; i += GEMV_THREADS) {
        const int2 splits = i == threadIdx.x ? plan.of_stat : __ldcg(in.splits_of + i / heads);
        const float2 *from = in.sums + split_row(in, splits.x, first_head + i % heads);
        float top = -INFINITY, total = 0.f;
#pragma unroll 1
        for (int s0 = 0; s0 < splits.y; s0 += 8) {
            float2 sums[8];
#pragma unroll
            for (int s = 0; s < 8; s++) sums[s] = s0 + s < splits.y ? from[(s0 + s) * stride] : make_float2(-INFINITY, 0.f);
            float higher = top;
#pragma unroll
            for (int s = 0; s < 8; s++) higher = fmaxf(higher, sums[s].x);
            total *= exp2f(top - higher);
            top = higher;
#pragma unroll
            for (int s = 0; s < 8; s++) total += exp2f(sums[s].x - top) * sums[s].y;
        }
        stats[i] = make_float2(top, 1.f / total);
    }
    __syncthreads();
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, blocks = (end - begin) / IMAGE_BLOCK;
#pragma unroll 1
    for (int task = warp; task < tokens * blocks; task += GEMV_WARPS) {
        const int token = task / blocks, at = begin + task % blocks * IMAGE_BLOCK + 4 * lane;
        float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
        if (at < k) {
            const int head = at / in.head_dim;
            const int2 splits = task == warp ? plan.of_task : __ldcg(in.splits_of + token);
            const float2 stat = stats[token * heads + head - first_head];
            const size_t row = split_row(in, splits.x, head);
            const float *from = in.partial + row * in.head_dim + at % in.head_dim;
            const float2 *sums = in.sums + row;
#pragma unroll 4
            for (int s = 0; s < splits.y; s++) {
                const float4 part = *reinterpret_cast<const float4 *>(from + s * stride * in.head_dim);
                const float weight = exp2f(sums[s * stride].x - stat.x) * stat.y;
                v.x += weight * part.x, v.y += weight * part.y, v.z += weight * part.z, v.w += weight * part.w;
            }
        }
        image_store_block<BYTES>(image + token * token_bytes, end - begin, task % blocks, v, lane);
    }
    __syncthreads();
}

// The images of a slice from the norm of rows whose sums of squares are known; `writer`: the slice of the norm goes to sum_out as well. `scratch`: a float
// a token.
template <bool BYTES>
DEVICE void fill_normed_images(const NormInput &in, const float *squared, int token0, int tokens, int begin, int end, uint8_t *image, uint32_t token_bytes,
                               float *scratch, bool writer) {
    constexpr int AHEAD = 4;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, blocks = (end - begin) / IMAGE_BLOCK, sums = in.k / WARP;
    const auto place = [&](int task) { return begin + task % blocks * IMAGE_BLOCK + 4 * lane; };
    const auto row = [&](int task) { return static_cast<size_t>(token0 + task / blocks) * in.k; };
    float4 w[AHEAD], v[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        const int task = warp + i * GEMV_WARPS;
        w[i] = load_quad(in.weight + place(task), task < tokens * blocks && place(task) < in.k);
    }
    wait_for_inputs();
#pragma unroll 1
    for (int first = warp, round = 0; round * AHEAD * GEMV_WARPS < tokens * blocks; first += AHEAD * GEMV_WARPS, round++) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int task = first + i * GEMV_WARPS;
            const bool there = task < tokens * blocks && place(task) < in.k;
            v[i] = load_quad(in.x0 + row(task) + place(task), there);
            if (round) w[i] = load_quad(in.weight + place(task), there);
        }
        if (round == 0) {
            if (warp < tokens) {
                float sum = 0.f;
#pragma unroll 4
                for (int i = lane; i < sums; i += WARP) sum += squared[static_cast<size_t>(token0 + warp) * sums + i];
                sum = warp_sum(sum);
                if (lane == 0) scratch[warp] = rsqrtf(sum / in.k + in.eps);
            }
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int task = first + i * GEMV_WARPS;
            if (task >= tokens * blocks) continue;
            const float inverse = scratch[task / blocks];
            const float4 y = make_float4(v[i].x * inverse * w[i].x, v[i].y * inverse * w[i].y, v[i].z * inverse * w[i].z, v[i].w * inverse * w[i].w);
            image_store_block<BYTES>(image + task / blocks * token_bytes, end - begin, task % blocks, y, lane);
            if (writer && place(task) < in.k) *reinterpret_cast<float4 *>(in.sum_out + row(task) + place(task)) = y;
        }
    }
    __syncthreads();
}

template <int F, int TOKENS> DEVICE void linear(const LinearParams &p) {
    extern __shared__ __align__(128) uint8_t shared[];
    constexpr int NT = TOKENS > 4 ? 2 : 1, HELD = 4 * NT;
    constexpr bool BYTES = INT4<F>;
    __shared__ uint64_t ring_barriers[GEMV_WARPS * MOST_DEPTH];
    __shared__ float scratch[GEMV_WARPS];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31;
    const int splits = GEMV_WARPS >> p.tiles_log2, r = warp >> (4 - p.tiles_log2), s = warp & (splits - 1);
    const int part = blockIdx.x % p.parts, units = (p.tiles + (1 << p.tiles_log2) - 1) >> p.tiles_log2;
    const int token0 = blockIdx.y * TOKENS, tokens = min(TOKENS, p.tokens - token0);

    // This part's slice of the inputs, in whole blocks of 128.
    const int blocks128 = ceil_div(p.inputs, 128), each = ceil_div(blocks128, p.parts);
    const int begin = min(part * each, blocks128) * 128, end = min((part + 1) * each, blocks128) * 128;
    int first, count;
    split_stages((end - begin) / Layout<F>::K, splits, s, first, count);

    const int slots = p.depth * SLOT_BYTES<F>;
    uint8_t *ring = shared + warp * slots, *image = shared + GEMV_WARPS * slots;
    const uint32_t slice = image_bytes<BYTES>(end - begin);
    constexpr int IMAGES = TOKENS == 1 ? 1 : HELD;  // a lone token's image serves every column
    float *partial = reinterpret_cast<float *>(image + IMAGES * slice);

    LinearRuns<F> runs{&p, static_cast<int>(blockIdx.x) / p.parts, static_cast<int>(gridDim.x) / p.parts, units, r,
                       begin / Layout<F>::K + first, count};
    StageQueue<F, MOST_DEPTH, LinearRuns<F>> queue(runs, ring, ring_barriers + warp * MOST_DEPTH, lane, p.depth);
    queue.fill();
    bool done = false;
    if constexpr (TOKENS <= INLINE_TOKENS) {
        if (p.input.x0) {
            InlineNorm<BYTES, TOKENS> norm;
            norm.load_weights(p.input);
            wait_for_inputs();
            norm.load(p.input, tokens, blockIdx.x == 0);
            norm.store(p.input, tokens, begin, end, image, slice, scratch);
            done = true;
        } else if (p.splits.partial) {
            const SplitPlan plan = plan_splits(p.splits, tokens, p.inputs, begin, end);
            wait_for_inputs();
            fill_from_splits<BYTES>(p.splits, plan, tokens, p.inputs, begin, end, image, slice, reinterpret_cast<float2 *>(partial));
            done = true;
        }
    }
    if constexpr (TOKENS > INLINE_TOKENS) {
        if (p.squared) {
            const bool writer = p.input.sum_out && blockIdx.x < static_cast<unsigned>(p.parts);
            fill_normed_images<BYTES>(p.input, p.squared, token0, tokens, begin, end, image, slice, scratch, writer);
            done = true;
        }
    }
    if (!done) {
        wait_for_inputs();
        const float *x = p.x + static_cast<size_t>(token0) * p.inputs;
        fill_images<BYTES>([&](int i) { return x + static_cast<size_t>(i) * p.inputs; }, tokens, p.inputs, begin, end, image, slice);
    }
    allow_next_kernel();

    const uint32_t x = shared_address(image), tails = x + (end - begin) * 2;
    const uint32_t token_bytes = TOKENS == 1 ? 0 : slice;
    float *y = p.y + static_cast<size_t>(part) * p.tokens * p.width;
    int buffer = 0;
#pragma unroll 1
    for (int unit = blockIdx.x / p.parts; unit < units; unit += gridDim.x / p.parts) {
        int tile = (unit << p.tiles_log2) + r;
        const bool mine = tile < p.tiles;
        const Weight &w = segment_of(p.segments, tile);
        float acc[NT][4];
        multiply_run<F, NT>(queue, x, tails, token_bytes, first, mine ? count : 0, lane, w.bf16_scales, acc);
        float *sums_of_unit = partial + buffer * PARTIAL_FLOATS<NT>;
        store_partials<NT>(sums_of_unit, warp, lane, acc);
        __syncthreads();
        const int rows_log2 = p.tiles_log2 + 4, unit_rows = 1 << rows_log2;
#pragma unroll 1
        for (int e = threadIdx.x; e < unit_rows * TOKENS; e += GEMV_THREADS) {
            const int row = e & (unit_rows - 1), token = e >> rows_log2;
            int out_tile = (unit << p.tiles_log2) + row / TILE_ROWS;
            float v = 0.f;
            if (token < tokens && out_tile < p.tiles) {
                const int column = unit * unit_rows + row;  // all segments but the last have whole tiles
                const Weight &segment = segment_of(p.segments, out_tile);
                if (out_tile * TILE_ROWS + row % TILE_ROWS < segment.rows) {
                    v = sum_partials(sums_of_unit, HELD, row / TILE_ROWS, splits, token, row % TILE_ROWS);
                    const size_t at = static_cast<size_t>(token0 + token) * p.width + column;
                    if (p.residual && part == 0) v += p.residual[at];
                    y[at] = v;
                }
            }
            if (p.squares) {  // a unit is 32 rows here: a warp holds one token
                const float square = warp_sum(v * v);
                if (lane == 0 && token < tokens)
                    p.squares[static_cast<size_t>(token0 + token) * units + unit] = square;
            }
        }
        buffer ^= 1;
    }
}

// Up to four tokens fit twice on a multiprocessor, so the next kernel's weights are on their way before this one ends.
#define LINEAR(NAME, FORMAT)                                                                                           \
    extern "C" __global__ void __launch_bounds__(GEMV_THREADS, 2)                                                      \
        linear_##NAME##_1(const __grid_constant__ LinearParams p) { linear<FORMAT, 1>(p); }                            \
    extern "C" __global__ void __launch_bounds__(GEMV_THREADS, 2)                                                      \
        linear_##NAME##_2(const __grid_constant__ LinearParams p) { linear<FORMAT, 2>(p); }                            \
    extern "C" __global__ void __launch_bounds__(GEMV_THREADS, 2)                                                      \
        linear_##NAME##_4(const __grid_constant__ LinearParams p) { linear<FORMAT, 4>(p); }                            \
    extern "C" __global__ void __launch_bounds__(GEMV_THREADS, 1)                                                      \
        linear_##NAME##_8(const __grid_constant__ LinearParams p) { linear<FORMAT, 8>(p); }

LINEAR(int4_g128, INT4_G128)
LINEAR(int4_g32, INT4_G32)
LINEAR(fp8, FP8)
LINEAR(bf16, BF16)
LINEAR(f16, F16)
LINEAR(f32, F32)

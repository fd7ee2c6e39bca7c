// y[t, o] = sum over i of x[t, i] w[o, i], for up to TOKENS (1, 2, 4 or 8) tokens a pass; weights are read once a pass.
//
// The inputs can be cut into `parts` over blocks: part p writes its own y, and the reader of y adds them in order.
// A residual is added to part 0. x comes as images, or is the rmsnorm of a residual stream, done here by every block
// while its first weights are on their way (up to four tokens of at most 3072 values).
// Bytes: the weight's stream; floor = bytes / bandwidth.
#include "../../cuda/gemv.cuh"

constexpr int LINEAR_SEGMENTS = 3;

struct LinearParams {
    Weight segments[LINEAR_SEGMENTS];  // q, k, v of one projection lie end to end in y; unused ones have 0 tiles
    NormInput input;                   // x0 null: `images` is the input
    const uint8_t *images;             // [tokens][image_bytes(padded)]
    float *y;                          // [parts][tokens, width]
    const float *residual;             // [tokens, width] or null
    float *squares;                    // [tokens][units]: sums of squares of each unit's outputs, or null
    int tokens, padded, width;
    int tiles, tiles_log2, parts;  // tiles a unit: 1, 2 or 4
};

// The tile's segment and the tile within it.
DEVICE const Weight &segment_of(const LinearParams &p, int &tile) {
    if (tile < p.segments[0].tiles) return p.segments[0];
    tile -= p.segments[0].tiles;
    if (tile < p.segments[1].tiles) return p.segments[1];
    tile -= p.segments[1].tiles;
    return p.segments[2];
}

template <int F> struct LinearRuns {
    const LinearParams *p;
    int unit, step, units, r, first, count;
    __device__ bool operator()(Run &run) {
        if (unit >= units) return false;
        int tile = (unit << p->tiles_log2) + r;
        unit += step;
        run.stages = 0;
        if (tile < p->tiles && count > 0) {
            const Weight &w = segment_of(*p, tile);
            run.from = w.stream + (static_cast<size_t>(tile) * w.stages + first) * Layout<F>::BYTES;
            run.stages = count;
        }
        return true;
    }
};

template <int F, int TOKENS, int DEPTH> DEVICE void linear(const LinearParams &p) {
    extern __shared__ __align__(128) uint8_t shared[];
    constexpr int NT = TOKENS > 4 ? 2 : 1, HELD = 4 * NT;
    __shared__ uint64_t ring_barriers[GEMV_WARPS * DEPTH];
    __shared__ uint64_t image_barrier;
    __shared__ float scratch[GEMV_WARPS];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31;
    const int splits = GEMV_WARPS >> p.tiles_log2, r = warp >> (4 - p.tiles_log2), s = warp & (splits - 1);
    const int part = blockIdx.x % p.parts, units = (p.tiles + (1 << p.tiles_log2) - 1) >> p.tiles_log2;
    const int token0 = blockIdx.y * TOKENS, tokens = min(TOKENS, p.tokens - token0);

    // This part's slice of the inputs, in whole steps of 128.
    const int blocks128 = p.padded / 128, each = ceil_div(blocks128, p.parts);
    const int begin = min(part * each, blocks128) * 128, end = min((part + 1) * each, blocks128) * 128;
    const int part_stages = (end - begin) / Layout<F>::K;
    int first, count;
    split_stages(part_stages, splits, s, first, count);

    uint8_t *ring = shared + warp * DEPTH * Layout<F>::BYTES;
    uint8_t *image = shared + GEMV_WARPS * DEPTH * Layout<F>::BYTES;
    const uint32_t slice = image_bytes(end - begin);
    constexpr int IMAGES = TOKENS == 1 ? 1 : HELD;  // a lone token's image serves every column
    float *partial = reinterpret_cast<float *>(image + IMAGES * slice);

    if (threadIdx.x == 0) {
        barrier_init(&image_barrier, 1);
        barrier_init_fence();
    }
    LinearRuns<F> runs{&p, static_cast<int>(blockIdx.x) / p.parts, static_cast<int>(gridDim.x) / p.parts, units, r,
                       begin / Layout<F>::K + first, count};
    StageQueue<F, DEPTH, LinearRuns<F>> queue(runs, ring, ring_barriers + warp * DEPTH, lane);
    queue.fill();
    __syncthreads();
    bool normed = false;
    if constexpr (TOKENS <= INLINE_TOKENS) {
        normed = p.input.x0 != nullptr;
        if (normed) {
            InlineNorm<TOKENS> norm;
            norm.load_weights(p.input);
            wait_for_inputs();
            norm.load(p.input, tokens, blockIdx.x == 0);
            norm.store(p.input, tokens, begin, end, image, slice, scratch);
        }
    }
    if (!normed) wait_for_inputs();
    allow_next_kernel();
    if (!normed && end > begin) {  // more parts than inputs: the last ones are zeros
        if (threadIdx.x == 0)
            request_images(p.images + static_cast<size_t>(token0) * image_bytes(p.padded), p.padded, tokens, begin,
                           end, image, slice, &image_barrier);
        barrier_wait(&image_barrier, 0);
    }

    const uint32_t x = shared_address(image), sums = x + (end - begin) * 4;
    const uint32_t token_bytes = TOKENS == 1 ? 0 : slice;
    float *y = p.y + static_cast<size_t>(part) * p.tokens * p.width;
    int buffer = 0;
    for (int unit = blockIdx.x / p.parts; unit < units; unit += gridDim.x / p.parts) {
        int tile = (unit << p.tiles_log2) + r;
        const bool mine = tile < p.tiles;
        const Weight &w = segment_of(p, tile);
        float acc[NT][4];
        multiply_run<F, NT>(queue, x, sums, token_bytes, first, mine ? count : 0, lane, w.bf16_scales, acc);
        float *sums_of_unit = partial + buffer * PARTIAL_FLOATS<NT>;
        store_partials<NT>(sums_of_unit, warp, lane, acc);
        __syncthreads();
        const int rows_log2 = p.tiles_log2 + 4, unit_rows = 1 << rows_log2;
        for (int e = threadIdx.x; e < unit_rows * TOKENS; e += GEMV_THREADS) {
            const int row = e & (unit_rows - 1), token = e >> rows_log2;
            int out_tile = (unit << p.tiles_log2) + row / TILE_ROWS;
            float v = 0.f;
            if (token < tokens && out_tile < p.tiles) {
                const int column = unit * unit_rows + row;  // all segments but the last have whole tiles
                const Weight &segment = segment_of(p, out_tile);
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
#define LINEAR(NAME, FORMAT, DEPTH)                                                                                    \
    extern "C" __global__ void __launch_bounds__(GEMV_THREADS, 2)                                                      \
        linear_##NAME##_1(const __grid_constant__ LinearParams p) { linear<FORMAT, 1, DEPTH>(p); }                     \
    extern "C" __global__ void __launch_bounds__(GEMV_THREADS, 2)                                                      \
        linear_##NAME##_2(const __grid_constant__ LinearParams p) { linear<FORMAT, 2, DEPTH>(p); }                     \
    extern "C" __global__ void __launch_bounds__(GEMV_THREADS, 2)                                                      \
        linear_##NAME##_4(const __grid_constant__ LinearParams p) { linear<FORMAT, 4, DEPTH>(p); }                     \
    extern "C" __global__ void __launch_bounds__(GEMV_THREADS, 1)                                                      \
        linear_##NAME##_8(const __grid_constant__ LinearParams p) { linear<FORMAT, 8, DEPTH>(p); }

LINEAR(int4_g128, INT4_G128, 4)
LINEAR(int4_g32, INT4_G32, 3)
LINEAR(fp8, FP8, 2)
LINEAR(bf16, BF16, 2)
LINEAR(f16, F16, 2)
LINEAR(f32, F32, 1)

// y[t, o] = sum over i of x[t, i] w[o, i] (+ residual) for many tokens; x is a plane. See gemm.cuh.
//
// For few tokens the inputs can be cut into `parts`, so that a weight of few rows still occupies the device: part p
// writes its own y, the reader adds them in order; the residual is added to part 0.
#include "products.cuh"

// Tile m (256 rows) of column block n. A set of 64 rows lies within one segment: rows of all but the last are
// multiples of 64.
template <int F> DEVICE GemmTile tile_of(const GemmParams &p, int m, int n, int part) {
    GemmTile tile;
    const int each = ceil_div(p.steps, p.parts), first = min(part * each, p.steps);
#pragma unroll
    for (int s = 0; s < SETS * GEMM_CONSUMERS; s++) {
        int at = (m * SETS * GEMM_CONSUMERS + s) * 4;
        tile.sets_tiles[s] = max(0, min(4, p.tiles - at));
        const Weight &w = segment_of(p.segments, at);
        tile.set[s] = w.stream + at * tile_bytes<F>(w.stages) + stage_offset<F>(first * STEP_STAGES<F>);
    }
    tile.chunk_bytes = static_cast<size_t>(p.blocks) * PLANE_BLOCK;
    tile.plane = p.plane + static_cast<size_t>(n) * (GEMM_COLUMNS / PLANE_ROWS) * PLANE_BLOCK + first * STEP_CHUNKS * tile.chunk_bytes;
    tile.tile_steps = p.steps;
    tile.steps = min(each, p.steps - first);
    tile.columns = product_columns(p.tokens - n * GEMM_COLUMNS);
    return tile;
}

template <int F, int N>
DEVICE void consume_linear(const GemmParams &p, const GemmTile &tile, GemmRing &ring, float *staged, int m, int n, int part, int warpgroup, int warp, int lane) {
    float acc[SETS][N / 2];
    consume<F, N>(tile, ring, warpgroup, warp, lane, p.segments[0].bf16_scales, acc);
    float *y = p.y + static_cast<size_t>(part) * p.tokens * p.width;
    const float *residual = part == 0 ? p.residual : nullptr;
#pragma unroll
    for (int h = 0; h < SETS; h++) {
        const int at = (m * SETS * GEMM_CONSUMERS + warpgroup * SETS + h) * 4 + warp;
        if (at < p.tiles)
            write_tile<N, false>(p, y, residual, at, n * GEMM_COLUMNS, p.tokens, acc[h], staged + (warpgroup * 4 + warp) * OUT_FLOATS, lane);
    }
}

template <int F> DEVICE void linear_gemm(const GemmParams &p) {
    extern __shared__ uint8_t shared[];
    GemmRing ring = ring_in<F>(shared);
    float *staged = reinterpret_cast<float *>(ring.empty + GEMM_DEPTH<F>);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, warpgroup = warp / 4;
    const int m_tiles = ceil_div(p.tiles, GEMM_TILES), columns = ceil_div(p.tokens, GEMM_COLUMNS);
    const int tiles = m_tiles * columns, work = tiles * p.parts;
    if (warpgroup == GEMM_CONSUMERS) {
        give_registers();
        const auto tile = [&](int w) { return tile_of<F>(p, w % m_tiles, w % tiles / m_tiles, w / tiles); };
        int ready = 0;
        if (warp % 4 == 0 && static_cast<int>(blockIdx.x) < work) ready = produce_weights<F>(tile(blockIdx.x), ring, lane);
        wait_for_inputs();
        allow_next_kernel();
        if (warp % 4 == 0)
            for (int w = blockIdx.x; w < work; w += gridDim.x, ready = 0) produce<F>(tile(w), ring, lane, ready);
    } else {
        take_registers();
        wait_for_inputs();
        allow_next_kernel();
        for (int w = blockIdx.x; w < work; w += gridDim.x) {
            const int m = w % m_tiles, n = w % tiles / m_tiles, part = w / tiles;
            const GemmTile tile = tile_of<F>(p, m, n, part);
            switch (tile.columns) {
                case 32: consume_linear<F, 32>(p, tile, ring, staged, m, n, part, warpgroup, warp % 4, lane); break;
                case 64: consume_linear<F, 64>(p, tile, ring, staged, m, n, part, warpgroup, warp % 4, lane); break;
                case 96: consume_linear<F, 96>(p, tile, ring, staged, m, n, part, warpgroup, warp % 4, lane); break;
                default: consume_linear<F, 128>(p, tile, ring, staged, m, n, part, warpgroup, warp % 4, lane); break;
            }
        }
    }
}

#define GEMM(NAME, FORMAT)                                                                                             \
    extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1)                                                      \
        linear_gemm_##NAME(const __grid_constant__ GemmParams p) { linear_gemm<FORMAT>(p); }
GEMM(int4_g128, INT4_G128)
GEMM(int4_g32, INT4_G32)
GEMM(fp8, FP8)
GEMM(bf16, BF16)
GEMM(f16, F16)
GEMM(f32, F32)

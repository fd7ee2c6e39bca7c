// The two products of many rows of many experts for quantised activations, each all experts in one launch. See gemm.cuh and sort.cu; for
// others: wide.cu.
//
// Gate and up: a tile of work is 128 channels (the gate's rows in one set of a warpgroup, the same channels' up rows in
// the other) x one expert's up to 128 rows; silu(gate) * up happens in registers and is quantised. Down: 256 columns of y.
// Operations: 6 * hidden * inter per (token, slot); bytes: each expert's stream once per 128 of its rows.
#include "../../cuda/quantised.cuh"
#include "many.cuh"

// What the warps tell each other of a tile's activations before these are quantised: largest values, then scales.
struct ActedScales {
    float largest[GEMM_CONSUMERS * 4][GEMM_COLUMNS];
    float scale[GEMM_COLUMNS];
};

DEVICE void consumers_sync() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

// A tile's 128 channels of one row are one chunk of the down projection's plane.
template <int N>
DEVICE void consume_gate_up(const ManyParams &p, const ExpertTile &rows, const GemmTile &tile, GemmRing &ring, ActedScales &shared, int m, int warpgroup,
                            int warp, int lane) {
    float acc[2][N / 2];
    consume<FP8_EXPERTS_ACT, N>(tile, ring, warpgroup, warp, lane, p.experts.bf16_scales, acc);
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
#pragma unroll
        for (int e = 4 * j; e < 4 * j + 4; e += 2) {
            const float2 acted = silu_times(acc[0][e], acc[0][e + 1], acc[1][e], acc[1][e + 1]);
            acc[0][e] = acted.x, acc[0][e + 1] = acted.y;
        }
        // Of rows 8j + 2t and 8j + 2t + 1, over this warp's sixteen channels.
        float2 most = make_float2(fmaxf(fabsf(acc[0][4 * j]), fabsf(acc[0][4 * j + 2])), fmaxf(fabsf(acc[0][4 * j + 1]), fabsf(acc[0][4 * j + 3])));
#pragma unroll
        for (int offset = 4; offset < WARP; offset *= 2) {
            most.x = fmaxf(most.x, __shfl_xor_sync(ALL_LANES, most.x, offset));
            most.y = fmaxf(most.y, __shfl_xor_sync(ALL_LANES, most.y, offset));
        }
        if (g == 0) *reinterpret_cast<float2 *>(&shared.largest[warpgroup * 4 + warp][8 * j + 2 * t]) = most;
    }
    consumers_sync();
    const int inputs = p.experts.inter_padded, thread = (warpgroup * 4 + warp) * WARP + lane;
    if (thread < N) {
        float largest = 0.f;
#pragma unroll
        for (int w = 0; w < GEMM_CONSUMERS * 4; w++) largest = fmaxf(largest, shared.largest[w][thread]);
        const QuantisedScale scale(largest);
        shared.scale[thread] = scale.scale;
        if (thread < rows.rows) *reinterpret_cast<float *>(p.acted + quantised_scale(rows.first + thread, m, inputs / 128, p.blocks)) = scale.scale;
    }
    consumers_sync();
    const int channel = m * 128 + warpgroup * 64 + warp * TILE_ROWS;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        const float2 scale = *reinterpret_cast<const float2 *>(&shared.scale[8 * j + 2 * t]);
        // Two bytes, channels g and g + 8, of each of two rows; after the exchange of one row: channels 2t and 2t + 8, 2t + 1 and 2t + 9.
        const uint32_t pairs = transpose8(quantise_pair(acc[0][4 * j], acc[0][4 * j + 2], scale.x) |
                                          quantise_pair(acc[0][4 * j + 1], acc[0][4 * j + 3], scale.y) << 16);
        const uint32_t sorted = __byte_perm(pairs, 0, 0x3120), got = __shfl_xor_sync(ALL_LANES, sorted, 1);
        // An even lane writes channels 2t to 2t + 3, an odd one those eight further.
        const uint32_t out = t % 2 ? __byte_perm(got, sorted, 0x7632) : __byte_perm(sorted, got, 0x5410);
        const int row = 8 * j + g;
        if (row < rows.rows)
            *reinterpret_cast<uint32_t *>(p.acted + quantised_offset(rows.first + row, channel + t / 2 * 4 + t % 2 * 8, p.blocks)) = out;
    }
}

template <int N>
DEVICE void consume_down(const ManyParams &p, const ExpertTile &rows, const GemmTile &tile, GemmRing &ring, int m, int warpgroup, int warp, int lane) {
    float acc[2][N / 2];
    consume<FP8_EXPERTS_ACT, N>(tile, ring, warpgroup, warp, lane, p.experts.bf16_scales, acc);
#pragma unroll
    for (int h = 0; h < 2; h++) write_down<N>(p, rows, ((m * GEMM_CONSUMERS + warpgroup) * 2 + h) * 4 + warp, acc[h], lane);
}

template <bool UP> DEVICE GemmTile expert_tile(const ManyParams &p, const ExpertTile &rows, int m) {
    const Experts &experts = p.experts;
    const uint8_t *base = experts.base + rows.expert * experts.expert_bytes;
    const int inputs = UP ? experts.hidden_padded : experts.inter_padded;
    GemmTile tile;
#pragma unroll
    for (int s = 0; s < 2 * GEMM_CONSUMERS; s++) {
        const int at = UP ? (m * GEMM_CONSUMERS + s / 2) * 4 : (m * 2 * GEMM_CONSUMERS + s) * 4;
        const int tiles = UP ? experts.inter_padded / TILE_ROWS : ceil_div(experts.hidden, TILE_ROWS);
        tile.sets_tiles[s] = max(0, min(4, tiles - at));
        tile.set[s] = base + (UP ? (s % 2 ? experts.up_offset : 0) : experts.down_offset) + at * tile_bytes<FP8_EXPERTS_ACT>(inputs / STEP_INPUTS);
    }
    tile.plane = p.plane + static_cast<size_t>(rows.first / PLANE_ROWS) * PLANE_BLOCK;
    tile.chunk_bytes = static_cast<size_t>(p.blocks) * PLANE_BLOCK;
    tile.steps = tile.tile_steps = inputs / STEP_INPUTS;
    tile.scales = p.plane + tile.steps * tile.chunk_bytes + static_cast<size_t>(rows.first) * 4;
    tile.columns = product_columns(rows.rows);
    return tile;
}

template <bool UP> DEVICE void many(const ManyParams &p) {
    extern __shared__ uint8_t shared[];
    GemmRing ring = ring_in<FP8_EXPERTS_ACT>(shared);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, warpgroup = warp / 4;
    wait_for_inputs();
    allow_next_kernel();
    const int m_tiles = UP ? ceil_div(p.experts.inter_padded, GEMM_ROWS / 2) : ceil_div(p.experts.hidden, GEMM_ROWS);
    const int work = *p.tile_count * m_tiles;
    if (warpgroup == GEMM_CONSUMERS) {
        give_registers();
        if (warp % 4 == 0)
            for (int w = blockIdx.x; w < work; w += gridDim.x)
                produce<FP8_EXPERTS_ACT>(expert_tile<UP>(p, p.tiles[w / m_tiles], w % m_tiles), ring, lane);
    } else {
        take_registers();
        for (int w = blockIdx.x; w < work; w += gridDim.x) {
            const int m = w % m_tiles;
            const ExpertTile rows = p.tiles[w / m_tiles];
            const GemmTile tile = expert_tile<UP>(p, rows, m);
            const auto run = [&](auto columns) {
                constexpr int N = decltype(columns)::value;
                if constexpr (UP)
                    consume_gate_up<N>(p, rows, tile, ring, *reinterpret_cast<ActedScales *>(ring.empty + GEMM_DEPTH<FP8_EXPERTS_ACT>), m, warpgroup, warp % 4,
                                       lane);
                else
                    consume_down<N>(p, rows, tile, ring, m, warpgroup, warp % 4, lane);
            };
            switch (tile.columns) {
                case 32: run(Columns<32>()); break;
                case 64: run(Columns<64>()); break;
                case 96: run(Columns<96>()); break;
                default: run(Columns<128>()); break;
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1) many_gate_up_fp8_act(const __grid_constant__ ManyParams p) { many<true>(p); }
extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1) many_down_fp8_act(const __grid_constant__ ManyParams p) { many<false>(p); }

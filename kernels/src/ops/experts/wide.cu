// The two products of many rows of many experts, each all experts in one launch, up to 256 rows of an expert at a time. See wide.cuh and sort.cu.
//
// Gate and up: a block has 64 channels, a warp eight of them: their gate rows are the upper half of its 16 rows, the same channels' up rows
// the lower half, so silu(gate) * up happens in registers. Down: 128 columns of y a block.
// Operations: 6 * hidden * inter per (token, slot); bytes: each expert's stream once per 256 of its rows.
#include "../../cuda/wide.cuh"
#include "many.cuh"

// A warpgroup's 32 channels of the activations on their way out: 64 bytes a row, its four units permuted by the row.
constexpr int ACTED_BYTES = WIDE_COLUMNS * 64;

DEVICE void warpgroup_sync(int warpgroup) { asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory"); }

// `channel`: the block's first of 64, a chunk of the plane.
DEVICE void write_acted(const ManyParams &p, const ExpertTile &rows, int channel, const float (&acc)[WIDE_SUMS], uint8_t *staged, int warp, int lane) {
    const int g = lane >> 2, t = lane & 3, warpgroup = warp / 4, thread = threadIdx.x % 128;
    staged += warpgroup * ACTED_BYTES;
    // A unit's four words, one of each warp, are turned by a quarter of the row: the warp's 32 words lie in 32 banks.
    uint8_t *mine = staged + g * 64 + t * 16 + (warp + g / 2) % 4 * 4;
    warpgroup_sync(warpgroup);  // the tile before is out
#pragma unroll
    for (int j = 0; j < WIDE_COLUMNS / 8; j++) {
        if (8 * j >= rows.rows) break;
        // Two neighbouring channels of one row: units of a row are channels 2t, 2t + 1 of each eight.
        const float2 acted = silu_times(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
        *reinterpret_cast<uint32_t *>(mine + j * 512) = transpose8(pack_bf16(acted.x, acted.y));
    }
    warpgroup_sync(warpgroup);
    // A thread has the same unit of every 32nd row.
    const int row = thread / 4, r = row % PLANE_ROWS, turned = r / 2;
    uint8_t *to = p.acted + (static_cast<size_t>(channel / 64) * p.blocks + rows.first / PLANE_ROWS + row / PLANE_ROWS) * PLANE_BLOCK + r * 128 +
                  ((4 * warpgroup + thread % 4) ^ r) * 16;
    const uint8_t *from = staged + thread * 16;
#pragma unroll
    for (int i = 0; i < WIDE_COLUMNS / 32; i++) {
        if (row + 32 * i >= rows.rows) break;
        uint4 v = *reinterpret_cast<const uint4 *>(from + i * 32 * 64);
        if (turned & 1) v = make_uint4(v.y, v.z, v.w, v.x);
        if (turned & 2) v = make_uint4(v.z, v.w, v.x, v.y);
        *reinterpret_cast<uint4 *>(to + i * 4 * PLANE_BLOCK) = v;
    }
}

// What a consumer warp multiplies: of its block's four gate and four up tiles one half each, or one tile.
template <int F, bool UP> struct ConsumerSource : OneTile<F> {
    __device__ __forceinline__ ConsumerSource(int warp, int lane, int bf16_scales) : OneTile<F>(warp * WideRing<F>::BYTES, WideRing<F>::SCALES + warp / 4 * SCALE_BLOCK, lane, bf16_scales) {}
};
template <int F> struct ConsumerSource<F, true> : TwoHalves<F> {
    static constexpr int BYTES = WideRing<F>::BYTES;
    __device__ __forceinline__ ConsumerSource(int warp, int lane, int bf16_scales)
        : TwoHalves<F>(warp / 2 * BYTES, WIDE_TILES / 2 * BYTES, WideRing<F>::SCALES, warp % 2, lane, bf16_scales) {}
};

template <int F, bool UP> DEVICE void wide_experts(const ManyParams &p) {
    extern __shared__ uint8_t shared[];
    const WideShared<F> s(shared);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, rank = cluster_rank();
    const Experts &experts = p.experts;
    const int inputs = UP ? experts.hidden_padded : experts.inter_padded, steps = inputs / 128;
    // Pairs of blocks' shares: 2 * 64 channels, or 2 * 128 columns.
    const int tiles = UP ? experts.inter_padded / TILE_ROWS : ceil_div(experts.hidden, TILE_ROWS);
    const int each = UP ? WIDE_TILES / 2 : WIDE_TILES, pairs = ceil_div(tiles, WIDE_BLOCKS * each);
    const int begin = blockIdx.x / WIDE_BLOCKS, stride = gridDim.x / WIDE_BLOCKS;
    const auto first_tile = [&](int w) { return (w % pairs * WIDE_BLOCKS + rank) * each; };
    if (warp >= WIDE_CONSUMERS) {
        give_registers();
        wait_for_inputs();
        allow_next_kernel();
        const int work = *p.tile_count * pairs;
        Turn turn;
        if (warp == WIDE_WEIGHTS_WARP) {
            for (int w = begin; w < work; w += stride) {
                // Lanes behind the tiles': scale blocks of four tiles.
                const int of = TRIOS<F> && lane >= WIDE_TILES ? lane % WIDE_TILES * 4 : lane, at = first_tile(w) + of % each;
                const uint8_t *expert = experts.base + p.tiles[w / pairs].expert * experts.expert_bytes;
                const uint8_t *from = expert + (UP ? (of < each ? 0 : experts.up_offset) : experts.down_offset) + at * tile_bytes<F>(inputs / Layout<F>::K);
                wide_weights<F>(s, turn, from, lane < WIDE_TILES + (TRIOS<F> ? WIDE_TILES / 4 : 0) && at < tiles, steps, lane);
            }
        } else if (warp == WIDE_PLANE_WARP) {
            for (int w = begin; w < work; w += stride) {
                const ExpertTile rows = p.tiles[w / pairs];
                const uint8_t *from = p.plane + static_cast<size_t>(rows.first / PLANE_ROWS) * PLANE_BLOCK;
                wide_planes<F>(s, turn, from, static_cast<size_t>(p.blocks) * PLANE_BLOCK, ceil_div(rows.rows, PLANE_ROWS) * PLANE_ROWS, steps, lane);
            }
        }
    } else {
        take_registers();
        wait_for_inputs();
        allow_next_kernel();
        const int work = *p.tile_count * pairs;
        Turn weight, plane;
        ConsumerSource<F, UP> source(warp, lane, experts.bf16_scales);
        // A tile's rows are known before the products of the one before are made.
        ExpertTile next = p.tiles[min(begin, work - 1) / pairs];
        for (int w = begin; w < work; w += stride) {
            const ExpertTile rows = next;
            next = p.tiles[min(w + stride, work - 1) / pairs];
            float acc[WIDE_SUMS];
            wide_products_of<F>(ceil_div(rows.rows, 32) * 32, s, weight, plane, source, steps, lane, acc);
            if constexpr (UP) {
                if (first_tile(w) < tiles) write_acted(p, rows, first_tile(w) * TILE_ROWS, acc, s.rest, warp, lane);
            } else {
                if (first_tile(w) + warp < tiles) write_down<WIDE_COLUMNS>(p, rows, first_tile(w) + warp, acc, lane);
            }
        }
    }
    // Nobody leaves while the other block may still write to it.
    cluster_sync();
}

#define WIDE(NAME, FORMAT)                                                                                             \
    extern "C" __global__ void __cluster_dims__(WIDE_BLOCKS, 1, 1) __launch_bounds__(WIDE_THREADS, 1)                  \
        wide_gate_up_##NAME(const __grid_constant__ ManyParams p) { wide_experts<FORMAT, true>(p); }                   \
    extern "C" __global__ void __cluster_dims__(WIDE_BLOCKS, 1, 1) __launch_bounds__(WIDE_THREADS, 1)                  \
        wide_down_##NAME(const __grid_constant__ ManyParams p) { wide_experts<FORMAT, false>(p); }
WIDE(int4_g128, INT4_G128)
WIDE(int4_g32, INT4_G32)
WIDE(fp8, FP8_EXPERTS)
WIDE(bf16, BF16)

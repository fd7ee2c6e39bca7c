// The two products of many rows of many experts for FP8 weights and quantised activations, each all experts in one launch, up to 256 rows of an
// expert at a time. See quantised_wide.cuh and sort.cu; for others: wide.cu.
//
// Gate and up: a block has 64 channels, their gate rows and the same channels' up rows; silu(gate) * up happens in registers and is quantised, for
// which the cluster's two blocks, which have the 128 channels of a chunk, tell each other each row's largest value. Down: 128 columns of y a block.
// Operations: 6 * hidden * inter per (token, slot); bytes: each expert's stream once per 256 of its rows.
#include "../../cuda/quantised.cuh"
#include "../../cuda/quantised_wide.cuh"
#include "../linear/leaving.cuh"
#include "many.cuh"

// A tile's rows lie in sets of 64: the first warpgroup has half of them, rounded up.
struct RowsOf {
    int first, sets;  // a warpgroup's first row, and its sets
    __device__ __forceinline__ RowsOf(int rows, int group) {
        const int all = ceil_div(rows, 64), of_first = (all + 1) / 2;
        first = group ? of_first * 64 : 0, sets = group ? all - of_first : of_first;
    }
};

// Steps of the ring; beside that of down there are results.
template <bool UP> constexpr int DEPTH = UP ? 4 : 3;
template <bool UP> using Shared = QuantisedShared<DEPTH<UP>>;

// What a warp's rows, sixteen of each set, have as largest values in the other block: a place for each of the last tiles that may be on their way.
// The other block is ahead by no more tiles than the ring has steps.
struct Largest {
    static constexpr int PLACES = DEPTH<true> + 1, BYTES = PLACES * QUANTISED_CONSUMERS * (32 * 4 + 8);
    uint32_t values, there;  // of this warp: [place][32], a barrier of each place
    uint32_t their_values, their_there;
    Turn turn;

    __device__ __forceinline__ Largest(uint32_t rest, int warp) {
        there = rest + warp * PLACES * 8, values = rest + PLACES * QUANTISED_CONSUMERS * 8 + warp * PLACES * 128;
        their_values = in_block(values, cluster_rank() ^ 1), their_there = in_block(there, cluster_rank() ^ 1);
    }

    DEVICE static void init(uint32_t rest) {
        for (int i = 0; i < PLACES * QUANTISED_CONSUMERS; i++) barrier_init(rest + i * 8, 1);
        barrier_init_fence();
    }

    // `most`: of rows g and g + 8 of each set, in all four lanes that have them; it becomes that of both blocks.
    template <int SETS> DEVICE void join(float (&most)[2][2], int lane) {
        const uint32_t place = turn.slot * 128 + lane / 4 * 4, barrier = turn.slot * 8;
        if (lane == 0) barrier_expect(there + barrier, SETS * 16 * 4);
        if (lane % 4 == 0) {
#pragma unroll
            for (int h = 0; h < SETS; h++)
#pragma unroll
                for (int half = 0; half < 2; half++) store_counted_in(their_values + place + h * 64 + half * 32, most[h][half], their_there + barrier);
        }
        barrier_wait(there + barrier, turn.parity);
#pragma unroll
        for (int h = 0; h < SETS; h++)
#pragma unroll
            for (int half = 0; half < 2; half++) most[h][half] = fmaxf(most[h][half], load_shared_f32(values + place + h * 64 + half * 32));
        turn.advance<PLACES>();
    }
};

// Division of many values by one, correctly rounded as one by one: the quotient by the reciprocal, and what is left of it.
struct Quotients {
    float divisor, reciprocal;
    __device__ __forceinline__ explicit Quotients(float divisor) : divisor(divisor), reciprocal(__frcp_rn(divisor)) {}
    DEVICE float of(float v) const {
        const float q = v * reciprocal;
        return fmaf(fmaf(-q, divisor, v), reciprocal, q);
    }
    // Two as two bytes, the first one lowest.
    DEVICE uint32_t pair(float a, float b) const { return __nv_cvt_float2_to_fp8x2(make_float2(of(a), of(b)), __NV_SATFINITE, __NV_E4M3); }
};

// Gate sums in the first half of a thread's, up sums in the other: channels 8j + 2t and the next one of rows g and g + 8. `chunk`: of 128 channels, of which
// the block has one half.
template <int SETS>
DEVICE void write_acted(const ManyParams &p, const ExpertTile &rows, int chunk, float (&acc)[2][QUANTISED_SUMS], Largest &largest, int first, int warp, int lane) {
    constexpr int HALF = QUANTISED_SUMS / 2;
    const int g = lane / 4, t = lane % 4, odd = t % 2, rank = cluster_rank();
    float most[2][2];
#pragma unroll
    for (int h = 0; h < SETS; h++) {
        most[h][0] = most[h][1] = 0.f;
#pragma unroll
        for (int i = 0; i < HALF; i += 2) {
            const float2 acted = silu_times(acc[h][i], acc[h][i + 1], acc[h][HALF + i], acc[h][HALF + i + 1]);
            acc[h][i] = acted.x, acc[h][i + 1] = acted.y;
            most[h][i % 4 / 2] = fmaxf(most[h][i % 4 / 2], fmaxf(fabsf(acted.x), fabsf(acted.y)));
        }
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int offset = 1; offset <= 2; offset *= 2) most[h][half] = fmaxf(most[h][half], __shfl_xor_sync(ALL_LANES, most[h][half], offset));
    }
    largest.join<SETS>(most, lane);
#pragma unroll
    for (int h = 0; h < SETS; h++) {
        const Quotients upper(QuantisedScale(most[h][0]).scale), lower(QuantisedScale(most[h][1]).scale);
        // Of a pair of lanes the even one writes row g, the other one row g + 8.
        const int row = first + h * 64 + warp % 4 * 16 + g + odd * 8;
        const bool real = row < rows.rows;
        if (real && rank == 0 && t < 2)
            *reinterpret_cast<float *>(p.acted + quantised_scale(rows.first + row, chunk, p.experts.inter_padded / 128, p.blocks)) = odd ? lower.divisor : upper.divisor;
        uint8_t *const to = p.acted + (static_cast<size_t>(chunk) * p.blocks + (rows.first + row) / PLANE_ROWS) * PLANE_BLOCK + g * 128;
#pragma unroll
        for (int j = 0; j < HALF / 4; j += 4) {
            uint32_t own[2][2];  // row g's and g + 8's channels of four products, two bytes of each
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                const float *a = acc[h] + 4 * (j + i);
                own[0][i / 2] = upper.pair(a[0], a[1]) | upper.pair(a[4], a[5]) << 16;
                own[1][i / 2] = lower.pair(a[2], a[3]) | lower.pair(a[6], a[7]) << 16;
            }
            uint32_t unit[4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t keep = odd ? own[1][i] : own[0][i], got = __shfl_xor_sync(ALL_LANES, odd ? own[0][i] : own[1][i], 1);
                const uint32_t even_lane = odd ? got : keep, odd_lane = odd ? keep : got;
                unit[2 * i] = __byte_perm(even_lane, odd_lane, 0x5140), unit[2 * i + 1] = __byte_perm(even_lane, odd_lane, 0x7362);
            }
            if (real) *reinterpret_cast<uint4 *>(to + ((4 * rank + j / 2 + t / 2) ^ g) * 16) = make_uint4(unit[0], unit[1], unit[2], unit[3]);
        }
    }
}

// A warpgroup's rows of 128 columns as BF16 on their way out: a row's and 16 bytes, so that eight rows' words lie in all banks.
constexpr int DOWN_STRIDE = 272, DOWN_ROOM = 128 * DOWN_STRIDE;

template <bool UP> struct ExpertShares {
    const ManyParams &p;
    int steps, tiles, pairs, begin, stride, work;
    __device__ __forceinline__ explicit ExpertShares(const ManyParams &p) : p(p) {
        const Experts &experts = p.experts;
        steps = (UP ? experts.hidden_padded : experts.inter_padded) / 128;
        tiles = UP ? experts.inter_padded / TILE_ROWS : ceil_div(experts.hidden, TILE_ROWS);
        pairs = ceil_div(tiles, QUANTISED_BLOCKS * (UP ? QUANTISED_TILES / 2 : QUANTISED_TILES));
        begin = blockIdx.x / QUANTISED_BLOCKS, stride = gridDim.x / QUANTISED_BLOCKS, work = *p.tile_count * pairs;
    }
    // This block's first tile of 16 channels or columns.
    DEVICE int first_tile(int w) const { return (w % pairs * QUANTISED_BLOCKS + static_cast<int>(cluster_rank())) * (UP ? QUANTISED_TILES / 2 : QUANTISED_TILES); }
    // Past the last share that of the last one.
    DEVICE ExpertTile rows(int w) const { return p.tiles[min(w, work - 1) / pairs]; }
};

// A share's rows are known before the one before is done.
template <bool UP> DEVICE void bring_weights(const ManyParams &p, const Shared<UP> &s, int lane) {
    const ExpertShares<UP> shares(p);
    const Experts &experts = p.experts;
    constexpr int EACH = UP ? QUANTISED_TILES / 2 : QUANTISED_TILES;
    // Lanes behind the tiles': scales of four tiles.
    const int tile = lane < QUANTISED_TILES ? lane : lane % QUANTISED_TILES * 4;
    const size_t offset = UP ? (tile < EACH ? 0 : experts.up_offset) : experts.down_offset;
    ExpertTile next = shares.rows(shares.begin);
    Turn turn;
    for (int w = shares.begin; w < shares.work; w += shares.stride) {
        const ExpertTile rows = next;
        next = shares.rows(w + shares.stride);
        const int at = shares.first_tile(w) + tile % EACH;
        const uint8_t *from = experts.base + rows.expert * experts.expert_bytes + offset + at * tile_bytes<FP8_EXPERTS>(shares.steps);
        quantised_weights<FP8_EXPERTS>(s, turn, from, lane < QUANTISED_TILES + 2 && at < shares.tiles, shares.steps, lane);
    }
}

template <bool UP> DEVICE void bring_rows(const ManyParams &p, const Shared<UP> &s, int lane) {
    const ExpertShares<UP> shares(p);
    const size_t chunk_bytes = static_cast<size_t>(p.blocks) * PLANE_BLOCK;
    const uint8_t *const scales = p.plane + shares.steps * chunk_bytes;
    ExpertTile next = shares.rows(shares.begin);
    Turn turn;
    for (int w = shares.begin; w < shares.work; w += shares.stride) {
        const ExpertTile rows = next;
        next = shares.rows(w + shares.stride);
        quantised_tokens(s, turn, p.plane + static_cast<size_t>(rows.first / PLANE_ROWS) * PLANE_BLOCK, scales + static_cast<size_t>(rows.first) * 4, chunk_bytes,
                         ceil_div(rows.rows, PLANE_ROWS) * PLANE_ROWS, shares.steps, lane);
    }
}

// A number of sets as a type.
template <int N> struct Sets {
    static constexpr int value = N;
};

template <bool UP> DEVICE void multiply(const ManyParams &p, const Shared<UP> &s, int warp, int lane) {
    const ExpertShares<UP> shares(p);
    const int group = warp / 4;
    Turn turn;
    Leaving leaving(s.rest(), group, false);
    Largest largest(s.rest(), warp);
    const uint32_t room = s.rest() + Leaving::BARRIERS + group * DOWN_ROOM + warp % 4 * 16 * DOWN_STRIDE;
    ExpertTile next = shares.rows(shares.begin);
    for (int w = shares.begin; w < shares.work; w += shares.stride) {
        const ExpertTile rows = next;
        next = shares.rows(w + shares.stride);
        const RowsOf mine(rows.rows, group);
        float acc[2][QUANTISED_SUMS];
        const auto run = [&](auto count) {
            constexpr int SETS = decltype(count)::value;
            if constexpr (SETS > 0)
                quantised_products<SETS>(s, turn, shares.steps, mine.first, warp, lane, acc);
            else
                quantised_nothing(s, turn, shares.steps, lane);
            if constexpr (UP) {
                if constexpr (SETS > 0) write_acted<SETS>(p, rows, w % shares.pairs, acc, largest, mine.first, warp, lane);
            } else {
                leaving.begin();
#pragma unroll
                for (int h = 0; h < SETS; h++) {
                    const uint32_t to = room + h * 64 * DOWN_STRIDE + lane % 16 * DOWN_STRIDE + lane / 16 * 16;
#pragma unroll
                    for (int j = 0; j < QUANTISED_SUMS / 4; j += 2) {
                        const float *a = acc[h] + 4 * j;
                        store_matrix4(to + j * 16, pack_bf16(a[0], a[1]), pack_bf16(a[2], a[3]), pack_bf16(a[4], a[5]), pack_bf16(a[6], a[7]));
                    }
                }
                leaving.end(lane);
            }
        };
        switch (mine.sets) {
            case 0: run(Sets<0>()); break;
            case 1: run(Sets<1>()); break;
            default: run(Sets<2>()); break;
        }
    }
}

// Down's results.
DEVICE void send(const ManyParams &p, const Shared<false> &s, int group, int lane) {
    const ExpertShares<false> shares(p);
    Leaving leaving(s.rest(), group, true);
    const int hidden = p.experts.hidden;
    for (int w = shares.begin; w < shares.work; w += shares.stride) {
        const ExpertTile rows = shares.rows(w);
        const RowsOf mine(rows.rows, group);
        const int column = shares.first_tile(w) * TILE_ROWS, columns = min(QUANTISED_ROWS, hidden - column);
        const uint32_t room = s.rest() + Leaving::BARRIERS + group * DOWN_ROOM;
        const int tokens = min(mine.sets * 64, rows.rows - mine.first);
        uint8_t *const to = reinterpret_cast<uint8_t *>(p.y + static_cast<size_t>(rows.first + mine.first) * hidden + column);
        leaving.send(lane, [&] {
            if (hidden % 8 == 0)
                send_tokens<QUANTISED_ROWS * 2, DOWN_STRIDE>(room, tokens, columns * 2, lane, [&](int token, int byte, uint4 v) {
                    *reinterpret_cast<uint4 *>(to + static_cast<size_t>(token) * hidden * 2 + byte) = v;
                });
            else
                for (int token = 0; token < tokens; token++)
                    for (int i = lane; i < columns; i += WARP)
                        reinterpret_cast<uint16_t *>(to)[static_cast<size_t>(token) * hidden + i] = load_shared_u16(room + token * DOWN_STRIDE + i * 2);
        });
    }
}

template <bool UP> DEVICE void quantised_experts(const ManyParams &p) {
    extern __shared__ uint8_t shared[];
    const Shared<UP> s(shared);
    const auto init = [&] {
        s.init();
        if (UP)
            Largest::init(s.rest());
        else
            Leaving::init(s.rest());
    };
    quantised_roles(init, [&](int warp, int lane) { multiply<UP>(p, s, warp, lane); }, [&](int warp, int lane) {
        wait_for_inputs();
        allow_next_kernel();
        if (warp == QUANTISED_WEIGHTS_WARP)
            bring_weights<UP>(p, s, lane);
        else if (warp == QUANTISED_TOKENS_WARP)
            bring_rows<UP>(p, s, lane);
        else if constexpr (!UP)
            send(p, s, warp - QUANTISED_SENDERS, lane);
    });
}

extern "C" __global__ void __cluster_dims__(QUANTISED_BLOCKS, 1, 1) __launch_bounds__(QUANTISED_THREADS, 1)
    quantised_gate_up(const __grid_constant__ ManyParams p) { quantised_experts<true>(p); }
extern "C" __global__ void __cluster_dims__(QUANTISED_BLOCKS, 1, 1) __launch_bounds__(QUANTISED_THREADS, 1)
    quantised_down(const __grid_constant__ ManyParams p) { quantised_experts<false>(p); }

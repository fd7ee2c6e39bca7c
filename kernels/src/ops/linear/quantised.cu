// y[t, o] = sum over i of x[t, i] w[o, i] for FP8 weights and quantised activations; x is a quantised plane. See quantised_wide.cuh.
//
// Results leave beside the next products (leaving.cuh): as BF16 a warpgroup's 128 tokens together, as F32 one set of 64 after the other, and then y may
// be the residual, to which they are added.
#include "../../cuda/quantised_wide.cuh"
#include "leaving.cuh"
#include "products.cuh"

using Shared = QuantisedShared<3>;

// How results lie in a warpgroup's room, in pieces of SETS of 64 tokens.
struct AsBf16 {
    // A token's outputs and 16 bytes, so that eight tokens' words lie in all banks.
    static constexpr int STRIDE = 272, SETS = 2;
    // A warp's sixteen tokens from `to` on.
    DEVICE static void stage(uint32_t to, const float (&acc)[QUANTISED_SUMS], int lane) {
        to += lane % 16 * STRIDE + lane / 16 * 16;
#pragma unroll
        for (int j = 0; j < QUANTISED_SUMS / 4; j += 2) {
            const float *a = acc + 4 * j;
            store_matrix4(to + j * 16, pack_bf16(a[0], a[1]), pack_bf16(a[2], a[3]), pack_bf16(a[4], a[5]), pack_bf16(a[6], a[7]));
        }
    }
    // A piece's tokens, of `rows` outputs each, to `at`, counted in outputs. Widths are multiples of 8.
    DEVICE static void send(const GemmParams &p, size_t at, int tokens, int rows, uint32_t room, int lane) {
        send_tokens<QUANTISED_ROWS * 2, STRIDE>(room, tokens, rows * 2, lane, [&](int token, int byte, uint4 v) {
            *reinterpret_cast<uint4 *>(reinterpret_cast<uint8_t *>(p.y) + (at + static_cast<size_t>(token) * p.width) * 2 + byte) = v;
        });
    }
};

struct AsF32 {
    // 32 bytes more: the pairs of four tokens lie in all banks.
    static constexpr int STRIDE = 544, SETS = 1;
    DEVICE static void stage(uint32_t to, const float (&acc)[QUANTISED_SUMS], int lane) {
        to += lane / 4 * STRIDE + lane % 4 * 8;
#pragma unroll
        for (int j = 0; j < QUANTISED_SUMS / 4; j++) {
            store_shared8(to + j * 32, acc[4 * j], acc[4 * j + 1]);
            store_shared8(to + 8 * STRIDE + j * 32, acc[4 * j + 2], acc[4 * j + 3]);
        }
    }
    DEVICE static void send(const GemmParams &p, size_t at, int tokens, int rows, uint32_t room, int lane) {
        if (p.width % 4) {
            for (int token = 0; token < tokens; token++, at += p.width)
                for (int i = lane; i < rows; i += WARP) p.y[at + i] = load_shared_f32(room + token * STRIDE + i * 4) + (p.residual ? p.y[at + i] : 0.f);
            return;
        }
        const auto place = [&](int token, int byte) { return p.y + at + static_cast<size_t>(token) * p.width + byte / 4; };
        if (p.residual)
            send_tokens<QUANTISED_ROWS * 4, STRIDE>(room, tokens, rows * 4, lane, [&](int token, int byte, uint4 v) { add_results(place(token, byte), v); });
        else
            send_tokens<QUANTISED_ROWS * 4, STRIDE>(room, tokens, rows * 4, lane,
                                                    [&](int token, int byte, uint4 v) { *reinterpret_cast<uint4 *>(place(token, byte)) = v; });
    }
};

template <class As> DEVICE uint32_t room_of(const Shared &s, int group) { return s.rest() + Leaving::BARRIERS + group * As::SETS * 64 * As::STRIDE; }

// A share of work: the pair of 128 rows w % pairs, the tokens from w / pairs * 256 on.
struct Shares {
    int pairs, work, begin, stride;
    __device__ __forceinline__ explicit Shares(const GemmParams &p)
        : pairs(ceil_div(p.tiles, QUANTISED_BLOCKS * QUANTISED_TILES)), work(pairs * ceil_div(p.tokens, QUANTISED_TOKENS)), begin(blockIdx.x / QUANTISED_BLOCKS),
          stride(gridDim.x / QUANTISED_BLOCKS) {}
    DEVICE int first_tile(int w) const { return (w % pairs * QUANTISED_BLOCKS + static_cast<int>(cluster_rank())) * QUANTISED_TILES; }
    DEVICE int first_token(int w) const { return w / pairs * QUANTISED_TOKENS; }
};

template <class As> DEVICE void multiply(const GemmParams &p, const Shared &s, int warp, int lane) {
    const Shares shares(p);
    const int group = warp / 4;
    const uint32_t room = room_of<As>(s, group) + warp % 4 * 16 * As::STRIDE;
    Leaving leaving(s.rest(), group, false);
    Turn turn;
    for (int w = shares.begin; w < shares.work; w += shares.stride) {
        float acc[2][QUANTISED_SUMS];
        quantised_products<2>(s, turn, p.steps, group * (QUANTISED_TOKENS / 2), warp, lane, acc);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if (h % As::SETS == 0) leaving.begin();
            As::stage(room + h % As::SETS * 64 * As::STRIDE, acc[h], lane);
            if (h % As::SETS == As::SETS - 1) leaving.end(lane);
        }
    }
}

DEVICE void bring_weights(const GemmParams &p, const Shared &s, int lane) {
    const Shares shares(p);
    Turn turn;
    for (int w = shares.begin; w < shares.work; w += shares.stride) {
        // Lanes behind the tiles': scales of four tiles.
        int at = shares.first_tile(w) + (lane < QUANTISED_TILES ? lane : lane % QUANTISED_TILES * 4);
        const bool has = lane < QUANTISED_TILES + 2 && at < p.tiles;
        const Weight &weight = segment_of(p.segments, at);
        quantised_weights<FP8>(s, turn, weight.stream + at * tile_bytes<FP8>(weight.stages), has, p.steps, lane);
    }
}

DEVICE void bring_tokens(const GemmParams &p, const Shared &s, int lane) {
    const Shares shares(p);
    const size_t chunk_bytes = static_cast<size_t>(p.blocks) * PLANE_BLOCK;
    const uint8_t *const scales = p.plane + p.steps * chunk_bytes;
    Turn turn;
    for (int w = shares.begin; w < shares.work; w += shares.stride) {
        const int first = shares.first_token(w), columns = min(QUANTISED_TOKENS, ceil_div(p.tokens - first, PLANE_ROWS) * PLANE_ROWS);
        quantised_tokens(s, turn, p.plane + static_cast<size_t>(first / PLANE_ROWS) * PLANE_BLOCK, scales + static_cast<size_t>(first) * 4, chunk_bytes, columns,
                         p.steps, lane);
    }
}

template <class As> DEVICE void send(const GemmParams &p, const Shared &s, int group, int lane) {
    const Shares shares(p);
    Leaving leaving(s.rest(), group, true);
    const uint32_t room = room_of<As>(s, group);
    for (int w = shares.begin; w < shares.work; w += shares.stride) {
        const int row = shares.first_tile(w) * TILE_ROWS, rows = min(QUANTISED_ROWS, p.width - row);
        for (int h = 0; h < 2; h += As::SETS) {
            const int first = shares.first_token(w) + group * (QUANTISED_TOKENS / 2) + h * 64;
            leaving.send(lane, [&] {
                if (rows > 0) As::send(p, static_cast<size_t>(first) * p.width + row, min(As::SETS * 64, p.tokens - first), rows, room, lane);
            });
        }
    }
}

template <class As> DEVICE void linear_quantised(const GemmParams &p) {
    extern __shared__ uint8_t shared[];
    const Shared s(shared);
    const auto init = [&] { s.init(), Leaving::init(s.rest()); };
    quantised_roles(init, [&](int warp, int lane) { multiply<As>(p, s, warp, lane); }, [&](int warp, int lane) {
        // Weights do not wait for the kernel before.
        if (warp == QUANTISED_WEIGHTS_WARP) bring_weights(p, s, lane);
        wait_for_inputs();
        allow_next_kernel();
        if (warp == QUANTISED_TOKENS_WARP) bring_tokens(p, s, lane);
        if (warp >= QUANTISED_SENDERS) send<As>(p, s, warp - QUANTISED_SENDERS, lane);
    });
}

#define LINEAR_QUANTISED(NAME, AS)                                                                                     \
    extern "C" __global__ void __cluster_dims__(QUANTISED_BLOCKS, 1, 1) __launch_bounds__(QUANTISED_THREADS, 1)        \
        linear_quantised_##NAME(const __grid_constant__ GemmParams p) { linear_quantised<AS>(p); }
LINEAR_QUANTISED(f32, AsF32)
LINEAR_QUANTISED(bf16, AsBf16)

// The same as wide.cu with results that leave beside the next products (leaving.cuh), a warpgroup's 64 outputs of a token together: as BF16 (BF16 weights
// leave room for 128 tokens), or as F32 that is added to the residual y, 128 tokens after the other 128. The rings are shorter for it. Widths are multiples of 8.
#define WIDE_STAGED
#include "wide_tiles.cuh"
#include "leaving.cuh"

// T: tokens of a piece.
template <int T> struct AsBf16 {
    // Bytes from one token to the next, so that eight of them lie in all banks: the other warpgroup's outputs stand beside these.
    static constexpr int TOKENS = T, STRIDE = 272, BETWEEN_GROUPS = 128;
    // A warp's 16 outputs of N tokens from `to` on. A matrix store turns eight by eight of them.
    template <int N> DEVICE static void stage(uint32_t to, const float *acc, int lane) {
        to += (lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 16;
#pragma unroll
        for (int j = 0; j < N / 8; j += 2) {
            const float *a = acc + 4 * j;
            store_matrix4_transposed(to + j * 8 * STRIDE, pack_bf16(a[0], a[1]), pack_bf16(a[2], a[3]), pack_bf16(a[4], a[5]), pack_bf16(a[6], a[7]));
        }
    }
    static constexpr int OUTPUT_BYTES = 2;
    // `tokens` of `rows` outputs each to `at`, counted in outputs.
    DEVICE static void send(const GemmParams &p, size_t at, int tokens, int rows, uint32_t room, int lane) {
        send_tokens<WIDE_TILES / 2 * TILE_ROWS * 2, STRIDE>(room, tokens, rows * 2, lane, [&](int token, int byte, uint4 v) {
            *reinterpret_cast<uint4 *>(reinterpret_cast<uint8_t *>(p.y) + (at + static_cast<size_t>(token) * p.width) * 2 + byte) = v;
        });
    }
};

struct AddF32 {
    // The words of two tokens' eight outputs, and of those four tokens further, lie in all banks.
    static constexpr int TOKENS = 128, STRIDE = 272, BETWEEN_GROUPS = TOKENS * STRIDE;
    template <int N> DEVICE static void stage(uint32_t to, const float *acc, int lane) {
        to += lane % 4 * 2 * STRIDE + lane / 4 * 4;
#pragma unroll
        for (int j = 0; j < N / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                asm volatile("st.shared.f32 [%0], %1;" ::"r"(to + (8 * j + e % 2) * STRIDE + e / 2 * 32), "f"(acc[4 * j + e]) : "memory");
    }
    static constexpr int OUTPUT_BYTES = 4;
    DEVICE static void send(const GemmParams &p, size_t at, int tokens, int rows, uint32_t room, int lane) {
        send_tokens<WIDE_TILES / 2 * TILE_ROWS * 4, STRIDE>(room, tokens, rows * 4, lane, [&](int token, int byte, uint4 v) {
            add_results(p.y + at + static_cast<size_t>(token) * p.width + byte / 4, v);
        });
    }
};

template <class As> struct LeaveStaged {
    static constexpr bool STAGED = true;
    Leaving leaving;
    uint32_t room;
    int lane;

    // For a warp that multiplies, of warpgroup `group` and the `warp`th there, or for the one that sends that group's.
    __device__ __forceinline__ LeaveStaged(uint32_t rest, int group, int warp, int lane, bool sends)
        : leaving(rest, group, sends), room(rest + Leaving::BARRIERS + group * As::BETWEEN_GROUPS + warp * TILE_ROWS * As::OUTPUT_BYTES), lane(lane) {}

    DEVICE static void init(uint32_t rest) { Leaving::init(rest); }

    template <int N> DEVICE void sums(const GemmParams &, int, int, const float *acc) {
#pragma unroll
        for (int begin = 0; begin < N; begin += As::TOKENS) {
            leaving.begin();
            As::template stage<(N < As::TOKENS ? N : As::TOKENS)>(room, acc + begin / 2, lane);
            leaving.end(lane);
        }
    }

    // Outputs from `row` on, of the tokens from `first` on.
    DEVICE void send(const GemmParams &p, int row, int first) {
        const int rows = min(WIDE_TILES / 2 * TILE_ROWS, p.width - row), end = min(WIDE_COLUMNS, p.tokens - first);
        for (int begin = 0; begin < end; begin += As::TOKENS) {
            leaving.send(lane, [&] {
                if (rows > 0) As::send(p, static_cast<size_t>(first + begin) * p.width + row, min(As::TOKENS, end - begin), rows, room, lane);
            });
        }
    }
};

#define STAGED(NAME, FORMAT, AS)                                                                                       \
    extern "C" __global__ void __cluster_dims__(WIDE_BLOCKS, 1, 1) __launch_bounds__(WIDE_THREADS, 1)                  \
        linear_##NAME(const __grid_constant__ GemmParams p) { linear_wide<FORMAT, LeaveStaged<AS>>(p); }
STAGED(wide16_int4_g128, INT4_G128, AsBf16<256>)
STAGED(wide16_int4_g32, INT4_G32, AsBf16<256>)
STAGED(wide16_fp8, FP8, AsBf16<256>)
STAGED(wide16_bf16, BF16, AsBf16<128>)
STAGED(wide_add_int4_g128, INT4_G128, AddF32)
STAGED(wide_add_int4_g32, INT4_G32, AddF32)
STAGED(wide_add_fp8, FP8, AddF32)

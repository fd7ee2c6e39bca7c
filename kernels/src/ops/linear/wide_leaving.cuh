// How the sums of a share of wide_shares.cuh leave beside the next products (leaving.cuh): a warpgroup's 64 outputs of a token together, as BF16, or as F32 that is
// added to y. Widths are multiples of 8.
//
// In a room a token has 256 bytes, whose 16-byte units change places with the token, so that what a warp stores or loads at once lies in all banks.
#pragma once
#include "leaving.cuh"
#include "wide_shares.cuh"

constexpr int LEAVING_ROW = 256, LEAVING_OUTPUTS = 64;

// T: tokens of a piece. Both warpgroups' outputs of a token stand side by side.
template <int T> struct AsBf16 {
    static constexpr int TOKENS = T, OUTPUT_BYTES = 2, BETWEEN_GROUPS = 0, ROOM = T * LEAVING_ROW;
    DEVICE static int unit_of(int group, int unit, int token) { return (group * 8 + unit) ^ (token & 7); }
    // A warp's 16 outputs of the piece. A matrix store turns eight by eight of them.
    DEVICE static void stage(uint32_t room, const float *acc, int group, int warp, int lane) {
        const int token = lane / 16 * 8 + lane % 8;
        const uint32_t to = room + token * LEAVING_ROW + unit_of(group, warp * 2 + lane / 8 % 2, token) * 16;
#pragma unroll
        for (int j = 0; j < T / 8; j += 2) {
            const float *a = acc + 4 * j;
            store_matrix4_transposed(to + j * 8 * LEAVING_ROW, pack_bf16(a[0], a[1]), pack_bf16(a[2], a[3]), pack_bf16(a[4], a[5]), pack_bf16(a[6], a[7]));
        }
    }
    DEVICE static void leave(const GemmParams &p, size_t at, uint4 v) { *reinterpret_cast<uint4 *>(reinterpret_cast<uint8_t *>(p.y) + at * 2) = v; }
};

template <int T> struct AddF32 {
    static constexpr int TOKENS = T, OUTPUT_BYTES = 4, BETWEEN_GROUPS = T * LEAVING_ROW, ROOM = 2 * T * LEAVING_ROW;
    DEVICE static int unit_of(int, int unit, int token) { return unit ^ (token & 6); }
    DEVICE static void stage(uint32_t room, const float *acc, int, int warp, int lane) {
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t to = room + 2 * t * LEAVING_ROW + unit_of(0, warp * 4 + half * 2 + g / 4, 2 * t) * 16 + g % 4 * 4;
#pragma unroll
            for (int j = 0; j < T / 8; j++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    asm volatile("st.shared.f32 [%0], %1;" ::"r"(to + (8 * j + e) * LEAVING_ROW), "f"(acc[4 * j + half * 2 + e]) : "memory");
        }
    }
    DEVICE static void leave(const GemmParams &p, size_t at, uint4 v) { add_results(p.y + at, v); }
};

// For a warp that multiplies, of warpgroup `group` and the `warp`th there, or for the one that sends that group's.
template <class As, int ROOMS> struct WideLeaving {
    static constexpr bool STAGED = true;
    using Rooms = LeavingRooms<ROOMS>;
    Rooms leaving;
    uint32_t rooms;
    int group, warp, lane;

    __device__ __forceinline__ WideLeaving(uint32_t rest, int group, int warp, int lane, bool sends)
        : leaving(rest, group, sends), rooms(rest + Rooms::BARRIERS + group * As::BETWEEN_GROUPS), group(group), warp(warp), lane(lane) {}

    DEVICE static void init(uint32_t rest) { Rooms::init(rest); }
    DEVICE uint32_t room() const { return rooms + leaving.room * As::ROOM; }

    // Of N tokens.
    template <int N> DEVICE void sums(const float *acc) {
#pragma unroll
        for (int begin = 0; begin < N; begin += As::TOKENS) {
            leaving.begin();
            As::stage(room(), acc + begin / 2, group, warp, lane);
            leaving.end(lane);
        }
    }

    // The same pieces, of the outputs from `row` on.
    DEVICE void send(const GemmParams &p, int row, const WideShare &share) {
        const int rows = min(LEAVING_OUTPUTS, p.width - row), pieces = share.columns > 128 ? WIDE_COLUMNS : 128;
        for (int begin = 0; begin < pieces; begin += As::TOKENS)
            leaving.send(lane, [&] { send_piece(p, static_cast<size_t>(share.first + begin) * p.width + row, min(As::TOKENS, share.columns - begin), rows); });
    }

private:
    // A piece's tokens, of `rows` outputs each, to `at`, counted in outputs.
    DEVICE void send_piece(const GemmParams &p, size_t at, int tokens, int rows) {
        constexpr int LANES = LEAVING_OUTPUTS * As::OUTPUT_BYTES / 16, AT_ONCE = WARP / LANES, TURNS = 4;
        const int unit = lane % LANES, output = unit * (16 / As::OUTPUT_BYTES);
        if (output >= rows) return;
#pragma unroll 1
        for (int first = lane / LANES; first < tokens; first += TURNS * AT_ONCE) {
            uint4 v[TURNS];
#pragma unroll
            for (int i = 0; i < TURNS; i++) {
                const int token = first + i * AT_ONCE;
                v[i] = load_shared16(room() + token * LEAVING_ROW + As::unit_of(group, unit, token) * 16);
            }
#pragma unroll
            for (int i = 0; i < TURNS; i++)
                if (first + i * AT_ONCE < tokens) As::leave(p, at + static_cast<size_t>(first + i * AT_ONCE) * p.width + output, v[i]);
        }
    }
};

// Results that leave while the next ones are made: a warpgroup stages a piece in its room in shared memory, token by token, and a warp that does
// not multiply sends it off. (A block's stores go out at 23 bytes a cycle; without this the tensor cores wait. As a bulk copy a token's outputs, 256 or 512
// bytes, took 75 cycles each, and the copies that bring operands waited behind them.)
#pragma once
#include "../../cuda/ptx.cuh"

// ROOMS: that each warpgroup has, used in turn.
template <int ROOMS> struct LeavingRooms {
    // In front of the rooms: for each of two warpgroups and each of its rooms that a piece is there, and that it has left.
    static constexpr int BARRIERS = 32 * ROOMS;
    uint32_t places, room, parity;

    // By one thread, before a barrier of the block. `rest`: shared memory behind the rings.
    DEVICE static void init(uint32_t rest) {
        for (int i = 0; i < 2 * ROOMS; i++) barrier_init(rest + i * 16, 4), barrier_init(rest + i * 16 + 8, 1);
        barrier_init_fence();
    }

    // `sends`: for the warp that sends.
    __device__ __forceinline__ LeavingRooms(uint32_t rest, int group, bool sends) : places(rest + group * ROOMS * 16), room(0), parity(!sends) {}

    // A warp stages its part of a piece in `room` between these two.
    DEVICE void begin() { barrier_wait(places + room * 16 + 8, parity); }
    DEVICE void end(int lane) {
        __syncwarp();
        if (lane == 0) barrier_arrive(places + room * 16);
        turn();
    }

    // The warp that sends: a piece.
    template <class Send> DEVICE void send(int lane, const Send &send) {
        barrier_wait(places + room * 16, parity);
        send();
        __syncwarp();
        if (lane == 0) barrier_arrive(places + room * 16 + 8);
        turn();
    }

private:
    DEVICE void turn() {
        if (ROOMS == 1 || ++room == ROOMS) room = 0, parity ^= 1;
    }
};
using Leaving = LeavingRooms<1>;

// A piece's tokens, which lie STRIDE bytes apart and have `bytes` of BYTES each, by a warp: 16 bytes a lane go to store(token, first byte, value). The
// room has whole turns of the loop.
template <int BYTES, int STRIDE, class Store> DEVICE void send_tokens(uint32_t room, int tokens, int bytes, int lane, const Store &store) {
    constexpr int LANES = BYTES / 16, AT_ONCE = WARP / LANES, TURNS = 4;
    const int byte = lane % LANES * 16;
    if (byte >= bytes) return;
#pragma unroll 1
    for (int first = lane / LANES; first < tokens; first += TURNS * AT_ONCE) {
        uint4 v[TURNS];
#pragma unroll
        for (int i = 0; i < TURNS; i++) v[i] = load_shared16(room + (first + i * AT_ONCE) * STRIDE + byte);
#pragma unroll
        for (int i = 0; i < TURNS; i++)
            if (first + i * AT_ONCE < tokens) store(first + i * AT_ONCE, byte, v[i]);
    }
}

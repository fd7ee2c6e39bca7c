// Results that leave while the next ones are made: a warpgroup stages a piece in its room in shared memory, token by token, and a warp that does
// not multiply sends it off. (A block's stores go out at 23 bytes a cycle; without this the tensor cores wait. As a bulk copy a token's outputs, 256 or 512
// bytes, took 75 cycles each, and the copies that bring operands waited behind them.)
#pragma once
#include "../../cuda/ptx.cuh"

struct Leaving {
    // In front of the rooms: for each of two warpgroups that a piece is there, and that it has left.
    static constexpr int BARRIERS = 32;
    uint32_t staged, sent, parity;

    // By one thread, before a barrier of the block. `rest`: shared memory behind the rings.
    DEVICE static void init(uint32_t rest) {
        for (int group = 0; group < 2; group++) barrier_init(rest + group * 16, 4), barrier_init(rest + group * 16 + 8, 1);
        barrier_init_fence();
    }

    // `sends`: for the warp that sends.
    __device__ __forceinline__ Leaving(uint32_t rest, int group, bool sends) : staged(rest + group * 16), sent(staged + 8), parity(!sends) {}

    // A warp stages its part of a piece between these two.
    DEVICE void begin() { barrier_wait(sent, parity), parity ^= 1; }
    DEVICE void end(int lane) {
        __syncwarp();
        if (lane == 0) barrier_arrive(staged);
    }

    // The warp that sends: a piece.
    template <class Send> DEVICE void send(int lane, const Send &send) {
        barrier_wait(staged, parity), parity ^= 1;
        send();
        __syncwarp();
        if (lane == 0) barrier_arrive(sent);
    }
};

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

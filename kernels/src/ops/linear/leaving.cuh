// Results that leave while the next ones are made: a warpgroup stages a piece in its room in shared memory, token by token, and a warp that does
// not multiply sends each token's outputs off by a bulk copy. (A block's stores go out at 23 bytes a cycle; without this the tensor cores wait.)
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
        fence_async_proxy();
        __syncwarp();
        if (lane == 0) barrier_arrive(staged);
    }

    // The warp that sends: one `copy` after the other for a piece's `tokens`.
    template <class Copy> DEVICE void send(int tokens, int lane, const Copy &copy) {
        barrier_wait(staged, parity), parity ^= 1;
        for (int i = 0; i < tokens; i++) copy();
        bulk_commit();
        bulk_wait_read();
        __syncwarp();
        if (lane == 0) barrier_arrive(sent);
    }
};

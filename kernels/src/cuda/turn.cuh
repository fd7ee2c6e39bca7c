// A place of a ring, and in which round.
#pragma once
#include "ptx.cuh"

struct Turn {
    uint32_t slot = 0, parity = 0;
    template <int DEPTH> DEVICE void advance() {
        if (++slot == DEPTH) slot = 0, parity ^= 1;
    }
};

// The computing warps' weights: a ring of bulk copies for each, in the order of the ops and across layers. One warp asks for
// all of them, lane w for warp w; only the experts' weights wait, for the choice, which this warp makes as well.
#pragma once
#include "one_choice.cuh"

DEVICE void wait_phase(uint64_t *barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile(
            "{\n"
            ".reg .pred done;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
            "selp.u32 %0, 1, 0, done;\n"
            "}\n"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    } while (!done);
}

// Where copies lie: one behind the other, at the ring's start where the rest of it is too short.
DEVICE int copy_place(int place, int bytes) { return place + bytes > WARP_RING ? 0 : place; }

// What a computing warp reads, in the order in which it was asked for.
struct OneStream {
    uint32_t ring, full, empty;
    uint32_t parity;
    int place, copy;

    __device__ __forceinline__ void start(OneShared &shared, uint8_t *rings) {
        const int warp = threadIdx.x / WARP;
        ring = shared_address(rings + warp * WARP_RING);
        full = shared_address(shared.full[warp]), empty = shared_address(shared.empty[warp]);
        parity = 0, place = 0, copy = 0;
    }

    // Address of the next copy, once it has arrived.
    __device__ __forceinline__ uint32_t front(int bytes) {
        asm volatile(
            "{\n"
            ".reg .pred done;\n"
            "again:\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
            "@!done bra again;\n"
            "}\n" ::"r"(full + copy * 8),
            "r"(parity)
            : "memory");
        place = copy_place(place, bytes);
        return ring + place;
    }

    // Every lane has read it: its place is free.
    __device__ __forceinline__ void pop(int bytes) {
        __syncwarp();
        if ((threadIdx.x & 31) == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty + copy * 8) : "memory");
        place += bytes;
        if (++copy == COPIES) copy = 0, parity ^= 1;
    }
};

// The other end, of lane's warp.
struct OneFeeder {
    OneShared *shared;
    uint32_t ring;
    int warp, place, copy, oldest, free, held;
    uint32_t parity;  // of the oldest copy's barrier `empty`

    // Asks for `bytes` from `from` as soon as there is room.
    __device__ __forceinline__ void ask(const uint8_t *from, int bytes) {
        const int at = copy_place(place, bytes), needed = bytes + (at < place ? WARP_RING - place : 0);
        while (free < needed || held == COPIES) {
            wait_phase(&shared->empty[warp][oldest], parity);
            free += shared->held[warp][oldest], held--;
            if (++oldest == COPIES) oldest = 0, parity ^= 1;
        }
        shared->held[warp][copy] = static_cast<uint16_t>(needed);
        free -= needed, held++, place = at + bytes;
        const uint32_t full = shared_address(&shared->full[warp][copy]);
        if (++copy == COPIES) copy = 0;
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full), "r"(bytes) : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                         ring + at),
                     "l"(from), "r"(bytes), "r"(full), "l"(READ_ONCE)
                     : "memory");
    }
};

// The feeding warp's step.
template <int KV> DEVICE void feed(OneShared &shared, uint8_t *rings) {
    const OneParams &p = shared.p;
    const int lane = threadIdx.x & 31, layers = p.layers, entries = shared.entries;
    const bool serves = lane < GEMV_WARPS;
    const int warp = lane % GEMV_WARPS;
    const uint32_t expert_size = static_cast<uint32_t>(p.expert_bytes / 16);
    OneFeeder feeder{&shared, shared_address(rings + warp * WARP_RING), warp, 0, 0, 0, WARP_RING, 0, 0};
    const uint8_t *ahead = lane < 8 ? p.layer[0].stream[lane] : nullptr;
#pragma unroll 1
    for (int layer = 0; layer < layers; layer++) {
        __syncwarp();
        if (lane < 8) shared.feeding[lane] = ahead;
        if (lane < 8 && layer + 1 < layers) ahead = p.layer[layer + 1].stream[lane];
        __syncwarp();
        bool chosen = false;
#pragma unroll 1
        for (int at = 0; at < entries; at++) {
            const uint2 entry = *reinterpret_cast<const uint2 *>(&shared.program[warp][at]);  // in one load
            const int which = entry.y >> 24, stream = which % ENTRY_SLOT;
            const int size = (entry.y & 0xffff) * 16, most = (entry.y >> 16 & 0xff) * 16;
            // The op of an entry is the same for all warps.
            if (stream == STREAM_KEYS) {
#pragma unroll 1
                for (int tile = shared.tile0 + warp; serves && tile < shared.tile1; tile += GEMV_WARPS) {
                    const size_t offset = static_cast<size_t>(shared.tile[tile - shared.tile0]) * 16;
                    feeder.ask(shared.feeding[STREAM_KEYS] + offset, KEY_BYTES<KV>);
                    feeder.ask(shared.feeding[STREAM_VALUES] + offset, KEY_BYTES<KV>);
                }
                __syncwarp();
                continue;
            }
            size_t offset = entry.x;
            if (stream == STREAM_EXPERTS) {
                if (!chosen) choose(shared, p.layer[layer].bias, layer), chosen = true;
                offset += static_cast<size_t>(shared.ids[which / ENTRY_SLOT]) * expert_size;
            }
            const uint8_t *from = shared.feeding[stream] + offset * 16;
#pragma unroll 1
            for (int left = serves ? size : 0; left > 0; left -= most, from += most) feeder.ask(from, min(left, most));
            __syncwarp();
        }
    }
}

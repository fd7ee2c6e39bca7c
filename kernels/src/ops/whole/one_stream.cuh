// The computing warps' weights: a ring of bulk copies for each, in the order of the ops and across layers. One warp asks for
// all of them, lane w for warp w; only the experts' weights wait, for the choice.
//
// It never stands still for one of them: each round every lane looks whether it can go on.
#pragma once
#include "one_choice.cuh"

// Copies of dense weights that may be on their way to a warp. INT4 is there early enough with one, and fewer in front of the memory let
// blocks read each other's values sooner.
template <int DENSE> constexpr int DENSE_COPIES = DENSE == INT4_G128 ? 1 : COPIES;

// Where copies lie: one behind the other, at the ring's start where the rest of it is too short. `bytes`: with those that must
// lie right behind the copy. A tile's values must lie behind its keys: otherwise there is not always room for both, and the values
// are asked for when the scores are made.
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

    // Address of the next copy, once it has arrived. `together`: its bytes and those of the copies right behind it.
    __device__ __forceinline__ uint32_t front(int together) {
        asm volatile(
            "{\n"
            ".reg .pred done;\n"
            "again:\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
            "@!done bra again;\n"
            "}\n" ::"r"(full + copy * 8),
            "r"(parity)
            : "memory");
        place = copy_place(place, together);
        return ring + place;
    }

    // Every lane has read it: its place is free.
    __device__ __forceinline__ void pop(int bytes) {
        __syncwarp();
        if ((thread_here() & 31) == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty + copy * 8) : "memory");
        place += bytes;
        if (++copy == COPIES) copy = 0, parity ^= 1;
    }
};

DEVICE bool phase_done(uint64_t *barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return done;
}

// The other end, of lane's warp.
struct OneFeeder {
    OneShared &shared;
    uint32_t ring;
    int warp;
    // What to ask for next.
    int layer = 0, at = 0;       // entry of the layer's program
    int piece, pieces;           // keys and values of the block's tiles in turns, while `piece` < `pieces`
    const uint8_t *from = nullptr;
    int left = 0, most = 0;      // bytes of the entry, and of one copy
    int behind = 0;              // bytes that must lie right behind this copy
    int of = -1;                 // FP8 of experts: the next stage in its trio
    bool waits = false;          // for the choice of `layer`, or at the layer's end for all lanes
    // The ring: its copies from `oldest` on have not been read.
    int place = 0, copy = 0, oldest = 0, free = WARP_RING, held = 0;
    uint32_t parity = 0;         // of the oldest copy's barrier `empty`
    uint32_t phase = 0;          // of the next copy's barrier `full`
    int most_flying = COPIES;    // copies of this kind that have not arrived

    // `chosen`: the last layer whose experts are known.
    template <int KV, int DENSE, int EXPERT> __device__ __forceinline__ void find_next(int chosen, uint32_t expert_size) {
        const uint8_t *const *streams = shared.feeding[layer & 1];
        if (piece < pieces) {
            const int tile = warp + (piece >> 1) * GEMV_WARPS;
            from = streams[STREAM_KEYS + (piece & 1)] + static_cast<size_t>(shared.tile[tile]) * 16;
            left = most = KEY_BYTES<KV>, behind = piece & 1 ? 0 : TOGETHER<KV> - KEY_BYTES<KV>, most_flying = COPIES,
            piece++, of = -1;
            return;
        }
        if (at == shared.entries) {
            waits = chosen < layer;
            if (!waits) at = 0, layer++;
            return;
        }
        const uint2 entry = *reinterpret_cast<const uint2 *>(&shared.program[warp][at]);  // in one load
        const int which = entry.y >> 24, stream = which % ENTRY_SLOT;
        waits = stream == STREAM_EXPERTS && chosen < layer;
        if (waits) return;
        // Other blocks still wait for gate and up.
        if (at >= shared.first_down && *const_cast<const volatile int *>(&shared.released) <= layer) return;
        if (stream == STREAM_KEYS) {
            piece = 0, at++;
            return;
        }
        most_flying = stream == STREAM_EXPERTS ? COPIES : DENSE_COPIES<DENSE>;
        size_t offset = entry.x;
        if (stream == STREAM_EXPERTS) offset += static_cast<size_t>(shared.ids[which / ENTRY_SLOT]) * expert_size;
        from = streams[stream] + offset * 16;
        left = (entry.y & 0xffff) * 16, most = (entry.y >> 16 & 0xff) * 16 + 16, behind = 0, at++;
        if constexpr (TRIOS<EXPERT>) {
            of = -1;
            if (most == COPY_TRIOS * 16 + 16) of = 0, most = Layout<EXPERT>::BYTES;
        }
    }

    // What has been read.
    __device__ __forceinline__ void look() {
        if (!held || !phase_done(&shared.empty[warp][oldest], parity)) return;
        free += shared.held[warp][oldest], held--;
        if (++oldest == COPIES) oldest = 0, parity ^= 1;
    }

    __device__ __forceinline__ int next_bytes() const { return min(left, most) + (of == 0 ? SCALE_BLOCK : 0); }
    __device__ __forceinline__ int next_place() const { return copy_place(place, next_bytes() + behind); }
    // The ring's rest, where that is too short, is the copy's before: it is free with it.
    __device__ __forceinline__ int rest() const { return held && next_place() < place ? WARP_RING - place : 0; }
    __device__ __forceinline__ bool ready() const {
        if (!(left > 0 && free >= next_bytes() + rest() && held < COPIES)) return false;
        // The copy before those that may be on their way has arrived.
        if (most_flying == COPIES) return true;
        const int before = copy - most_flying;
        return phase_done(&shared.full[warp][before & (COPIES - 1)], before < 0 ? phase ^ 1 : phase);
    }

    __device__ __forceinline__ void ask() {
        const int bytes = next_bytes(), put = next_place(), wasted = rest();
        if (wasted) shared.held[warp][(copy + COPIES - 1) % COPIES] += static_cast<uint16_t>(wasted);
        shared.held[warp][copy] = static_cast<uint16_t>(bytes);
        const uint32_t full = shared_address(&shared.full[warp][copy]);
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full), "r"(bytes) : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                         ring + put),
                     "l"(from), "r"(bytes), "r"(full), "l"(READ_ONCE)
                     : "memory");
        free -= bytes + wasted, held++, place = put + bytes, left -= bytes, from += bytes;
        // Past the next trio's line, but for its scale block.
        if (of >= 0 && ++of == TRIO) of = 0, from += Layout<FP8_EXPERTS>::LINE - SCALE_BLOCK;
        if (++copy == COPIES) copy = 0, phase ^= 1;
    }
};

// The feeding warp's step.
template <int KV, int DENSE, int EXPERT> DEVICE void feed(OneShared &shared, uint8_t *rings) {
    const OneParams &p = shared.p;
    const int lane = threadIdx.x & 31, layers = p.layers, warp = lane % GEMV_WARPS;
    const bool serves = lane < GEMV_WARPS;
    const uint32_t expert_size = static_cast<uint32_t>(p.expert_bytes / 16);
    const int pieces = serves && shared.tile0 + warp < shared.tile1 ? 2 * ceil_div(shared.tile1 - shared.tile0 - warp, GEMV_WARPS) : 0;
    OneFeeder feeder{shared, shared_address(rings + warp * WARP_RING), warp};
    feeder.piece = feeder.pieces = pieces;
    if (lane < STREAMS) shared.feeding[0][lane] = p.layer[0].stream[lane];
    const uint8_t *ahead = lane < STREAMS && layers > 1 ? p.layer[1].stream[lane] : nullptr;
    __syncwarp();
    int chosen = -1;
#pragma unroll 1
    while (true) {
        if (serves && feeder.layer < layers && feeder.left == 0 && !feeder.waits) feeder.find_next<KV, DENSE, EXPERT>(chosen, expert_size);
        feeder.look();
        const bool asks = feeder.ready();
        if (asks) feeder.ask();
        if (__any_sync(ALL_LANES, asks)) continue;
        const bool more = serves && feeder.layer < layers;
        if (__any_sync(ALL_LANES, more && !feeder.waits)) continue;
        if (!__any_sync(ALL_LANES, more)) break;
        // All wait for the choice of the layer behind `chosen`: nobody reads the streams of the one before any more.
        chosen++;
        if (lane < STREAMS) shared.feeding[(chosen + 1) & 1][lane] = ahead;
        if (lane < STREAMS && chosen + 2 < layers) ahead = p.layer[chosen + 2].stream[lane];
        __syncwarp();
        if (shared.chooses) wait_for_choice();
        feeder.waits = false;
    }
}

// What all kernels of the exchange share: where things lie in a rank's area, stamps, polls that end, and the choice of
// the ranks that a token goes to. The protocol and why one set of buffers is enough: mod.rs.
#pragma once
#include "../../ops/route/route.cuh"
#include "../ptx.cuh"

constexpr int MAX_RANKS = 64, MAX_REPLICAS = 4;
constexpr uint32_t ABSENT = 0xffffffffu;

// On the device, of one rank. `begun` counts exchanges that dispatch reads, `open` the same for combine: each is written
// only by kernels whose blocks read the other one.
struct State {
    uint64_t begun, open;
    uint64_t timeout;  // ns that a poll may last
    uint32_t failed;   // nonzero: every kernel passes
    uint32_t arrived;  // blocks that have ended their part; zero between kernels
    uint64_t looked;   // when a waiting thread last read the host's abort word
};

// Pinned host memory: written by the device but `abort`. Mirrors the words of control.rs.
struct HostWords {
    uint64_t fault;     // reason << 32 | peer; zero: none
    uint64_t exchange;  // of the fault
    uint64_t abort;     // written by the host
    uint64_t done;      // written by the stream (control.rs)
    uint64_t stopped;   // a wait of this rank has failed: those on other channels end as well
};

enum Reason : uint32_t { DISPATCH_DEADLINE = 1, COMBINE_DEADLINE, ABORTED, COUNT };

// Offsets in every rank's area; the first index of each array is the rank that writes it.
struct Area {
    size_t few_header;   // [ranks] Unit: count, load, stamp (64 bits)
    size_t few_meta;     // [ranks][few_tokens][meta_units] Unit: two slots' local experts and weights
    size_t few_rows;     // [ranks][few_tokens][row_units] Unit
    size_t few_back;     // fast: [ranks][few_tokens][row_units] Unit; deterministic: [few_tokens, k][row_units]
    size_t few_done;     // [ranks] uint64_t stamps
    size_t many_header;  // [ranks] Unit: count, load, stamp (64 bits)
    size_t many_rows;    // [ranks][many_tokens][row_bytes]
    size_t many_ids;     // [ranks][many_tokens, k] uint32_t
    size_t many_weights; // [ranks][many_tokens, k] float
    size_t many_back;    // [ranks][many_tokens, hidden] bf16
    size_t many_done;    // [ranks] uint64_t stamps
    size_t many_chunks;  // [ranks][many_tokens / CHUNK] uint64_t stamps: results of those tokens have come
};

// Tokens whose results are announced together, where ranks do not share a device.
constexpr int CHUNK = 2;

struct ExchangeParams {
    uint8_t *area[MAX_RANKS];   // of every rank, as mapped here
    Area at;
    State *state;
    HostWords *host;
    const uint32_t *placement;  // [layers][experts][MAX_REPLICAS]: rank << 16 | local expert, or ABSENT
    uint32_t *loads;            // [2][MAX_RANKS]: each rank's expert rows one exchange ago; the half of the exchange's parity is being filled
    uint32_t *owner;            // [tokens, k]: rank that computes each slot of this rank's tokens
    int *counts;                // [ranks]: tokens that each rank has
    uint32_t *ids;              // few: [ranks][few_tokens, k]: local expert or ABSENT of what came
    float *weights;             // few: the same's weights
    int ranks, rank, hidden, k, experts;
    int few_tokens, many_tokens, row_bytes;
    int deterministic;
    int alone;  // on its device: nobody needs the room that the next kernel takes while this one waits
    // Of many tokens: what is for other ranks goes to an area of this device (`area` of all of them), from where copy
    // engines carry it to them.
    int staged;
    uint64_t *trace;  // null, or times of blocks: [kernels][TRACED_EXCHANGES][TRACED_BLOCKS][TRACED_POINTS]
};

// Which rank's place in the area of `to` this rank writes: its own; in the staging area that of `to`.
DEVICE int place_for(const ExchangeParams &p, int to) { return p.staged ? to : p.rank; }

// This rank's tokens.
struct ExchangeTokens {
    const uint32_t *ids;   // [count, k]
    const float *weights;  // [count, k]
    int count, layer;
};

// ---- units: 16 bytes that are written and read as one -------------------------------------------------------------

struct Unit {
    uint32_t a, b, c, stamp;
};

DEVICE void store_unit(void *to, const Unit &u) {
    const uint64_t low = static_cast<uint64_t>(u.b) << 32 | u.a, high = static_cast<uint64_t>(u.stamp) << 32 | u.c;
    asm volatile("{\n.reg .b128 v;\nmov.b128 v, {%1, %2};\nst.relaxed.sys.global.b128 [%0], v;\n}" ::"l"(to), "l"(low), "l"(high) : "memory");
}

DEVICE Unit load_unit(const void *from) {
    uint64_t low, high;
    asm volatile("{\n.reg .b128 v;\nld.relaxed.sys.global.b128 v, [%2];\nmov.b128 {%0, %1}, v;\n}" : "=l"(low), "=l"(high) : "l"(from) : "memory");
    return {static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32)};
}

DEVICE void store_release(uint64_t *to, uint64_t v) { asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(to), "l"(v) : "memory"); }
DEVICE uint64_t load_acquire(const uint64_t *from) {
    uint64_t v;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(from) : "memory");
    return v;
}
DEVICE uint64_t load_relaxed(const uint64_t *from) {
    uint64_t v;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(from) : "memory");
    return v;
}
DEVICE void store_relaxed(uint64_t *to, uint64_t v) { asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(to), "l"(v) : "memory"); }
DEVICE void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// The stamp of the small units, of a number made of the epoch (high half) and the exchange: never zero, which is what new
// memory holds, and far from the stamps of other epochs, should a rank that was expelled still write.
DEVICE uint32_t small_stamp(uint64_t exchange) {
    const uint32_t mixed = static_cast<uint32_t>(exchange) * 0x9E3779B1u + static_cast<uint32_t>(exchange >> 32) * 0x85EBCA6Bu;
    return mixed ? mixed : 1;
}

// A header: count, load, stamp. The stamp's halves are c and stamp.
DEVICE Unit header(uint32_t count, uint32_t load, uint64_t stamp) {
    return {count, load, static_cast<uint32_t>(stamp), static_cast<uint32_t>(stamp >> 32)};
}
DEVICE uint64_t header_stamp(const Unit &u) { return static_cast<uint64_t>(u.stamp) << 32 | u.c; }

// ---- waiting --------------------------------------------------------------------------------------------------------

DEVICE uint64_t now_ns() {
    uint64_t t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

// Times of a kernel's blocks, for `gpu_exchange bench --trace`.
constexpr int TRACED_EXCHANGES = 32, TRACED_BLOCKS = 1024, TRACED_POINTS = 8;
enum Traced : int { TRACED_DISPATCH, TRACED_ARRIVE, TRACED_COMBINE };
// Only in the kernels that are named `_traced`: a branch on the way would part loads that are to be under way together.
template <bool TRACED> DEVICE uint64_t entered() { return TRACED ? now_ns() : 0; }
template <bool TRACED> DEVICE void mark(const ExchangeParams &p, Traced kernel, uint64_t exchange, int point, uint64_t when = 0) {
    if (TRACED && threadIdx.x == 0)
        p.trace[((kernel * TRACED_EXCHANGES + exchange % TRACED_EXCHANGES) * TRACED_BLOCKS + blockIdx.x) * TRACED_POINTS + point] = when ? when : now_ns();
}

DEVICE bool failed(const ExchangeParams &p) { return *reinterpret_cast<const volatile uint32_t *>(&p.state->failed) != 0; }

// The first failure is reported; all stop the exchange.
DEVICE void fail(const ExchangeParams &p, Reason reason, int peer, uint64_t exchange) {
    if (atomicCAS(&p.state->failed, 0u, static_cast<uint32_t>(reason)) != 0) return;
    if (load_relaxed(&p.host->stopped)) return;  // another channel has reported
    *reinterpret_cast<volatile uint64_t *>(&p.host->stopped) = 1;
    *reinterpret_cast<volatile uint64_t *>(&p.host->exchange) = exchange;
    __threadfence_system();
    *reinterpret_cast<volatile uint64_t *>(&p.host->fault) = static_cast<uint64_t>(reason) << 32 | static_cast<uint32_t>(peer);
    __threadfence_system();
}

// Between polls: whether to go on. The clock is read every 16 polls. One thread of the device reads host memory about
// every 30 us: were each waiting warp to do it, their reads would queue up for milliseconds, and by then the peers
// wait long enough to do the same.
struct Patience {
    uint64_t start = 0;
    unsigned polls = 0;

    __device__ __forceinline__ bool wait(const ExchangeParams &p, Reason reason, int peer, uint64_t exchange) {
        if (++polls % 16) return true;
        return look(p, reason, peer, exchange);
    }

    __device__ __noinline__ bool look(const ExchangeParams &p, Reason reason, int peer, uint64_t exchange) {
        if (failed(p)) return false;
        const uint64_t now = now_ns();
        if (start == 0) start = now;
        const uint64_t last = *reinterpret_cast<const volatile uint64_t *>(&p.state->looked);
        const bool leads = (threadIdx.x & 31) == __ffs(__activemask()) - 1;
        if (leads && static_cast<int64_t>(now - last) > 30000 && atomicCAS(reinterpret_cast<unsigned long long *>(&p.state->looked), last, now) == last &&
            (load_relaxed(&p.host->abort) || load_relaxed(&p.host->stopped))) {
            fail(p, ABORTED, peer, exchange);
            return false;
        }
        if (now - start < p.state->timeout) return true;
        fail(p, reason, peer, exchange);
        return false;
    }
};

// Polls a unit that was not there at first; out of line, to keep the registers of those who seldom wait.
static __device__ __noinline__ bool spin_unit(const ExchangeParams &p, const void *from, uint32_t stamp, Reason reason, int peer, uint64_t exchange, Unit &u) {
    Patience patience;
    do {
        if (!patience.wait(p, reason, peer, exchange)) return false;
        u = load_unit(from);
    } while (u.stamp != stamp);
    return true;
}

// The unit once it has the stamp; false: gave up.
DEVICE bool await_unit(const ExchangeParams &p, const void *from, uint32_t stamp, Reason reason, int peer, uint64_t exchange, Unit &u) {
    u = load_unit(from);
    if (u.stamp == stamp) return true;
    Unit late;  // in memory, as its address is taken: the usual case keeps to registers
    if (!spin_unit(p, from, stamp, reason, peer, exchange, late)) return false;
    u = late;
    return true;
}

DEVICE bool await_header(const ExchangeParams &p, const void *from, int peer, uint64_t exchange, Unit &u) {
    Patience patience;
    for (u = load_unit(from); header_stamp(u) != exchange; u = load_unit(from))
        if (!patience.wait(p, DISPATCH_DEADLINE, peer, exchange)) return false;
    return true;
}

// `DATA`: what the peer wrote before the stamp is read after it.
template <bool DATA> DEVICE bool await_done(const ExchangeParams &p, const uint64_t *from, int peer, uint64_t exchange) {
    Patience patience;
    while ((DATA ? load_acquire(from) : load_relaxed(from)) != exchange)
        if (!patience.wait(p, COMBINE_DEADLINE, peer, exchange)) return false;
    return true;
}

// ---- destinations ---------------------------------------------------------------------------------------------------

// What one warp knows of its token: lane j < k has slot j's rank and expert there; all lanes the ranks' set.
struct Destinations {
    int rank;
    uint32_t local;
    float weight;
    uint64_t mask;
};

DEVICE uint64_t or_lanes(uint64_t v) {
    return static_cast<uint64_t>(__reduce_or_sync(ALL_LANES, static_cast<uint32_t>(v >> 32))) << 32 |
           __reduce_or_sync(ALL_LANES, static_cast<uint32_t>(v));
}

// Where the slots of a token go. Of an expert's replicas one on a rank that gets the row anyway, else the one with the
// least load, in the mean: loads (known from the exchange before) are scaled by a hash of token and rank, so that
// a rank's tokens do not all choose the same. By one warp.
// `id`, `weight`: of the lane's slot.
DEVICE Destinations choose_ranks(const ExchangeParams &p, int layer, int token, uint32_t id, float weight, uint64_t exchange, int lane) {
    const uint32_t *loads = p.loads + (~exchange & 1) * MAX_RANKS;
    Destinations d{0, ABSENT, 0.f, 0};
    uint4 held = make_uint4(ABSENT, ABSENT, ABSENT, ABSENT);
    if (lane < p.k) {
        d.weight = weight;
        held = __ldg(reinterpret_cast<const uint4 *>(p.placement) + static_cast<size_t>(layer) * p.experts + id);
    }
    uint32_t chosen = held.x;
    const unsigned several = __ballot_sync(ALL_LANES, lane < p.k && held.y != ABSENT);
    d.mask = or_lanes(lane < p.k && held.y == ABSENT ? 1ull << (chosen >> 16) : 0);
    for (unsigned rest = several; rest; rest &= rest - 1) {
        const int slot = __ffs(rest) - 1;
        if (lane == slot) {
            const uint32_t candidates[MAX_REPLICAS] = {held.x, held.y, held.z, held.w};
            uint64_t best = ~0ull;
#pragma unroll
            for (int i = 0; i < MAX_REPLICAS; i++) {
                if (candidates[i] == ABSENT) continue;
                const uint32_t rank = candidates[i] >> 16;
                const uint32_t hash = ((token * 2654435761u) ^ (rank * 40503u) ^ (p.rank * 97u)) * 2246822519u >> 24;
                const bool sent = d.mask >> rank & 1;
                const uint64_t key = sent ? 0 : static_cast<uint64_t>(loads[rank] + 1) * (hash + 64) + 1;
                if (key < best) best = key, chosen = candidates[i];
            }
        }
        d.mask |= 1ull << (__shfl_sync(ALL_LANES, chosen, slot) >> 16);
    }
    d.rank = chosen >> 16, d.local = chosen & 0xffffu;
    if (lane < p.k) p.owner[token * p.k + lane] = d.rank;
    return d;
}

// The same where experts have been chosen before.
DEVICE Destinations choose_ranks(const ExchangeParams &p, const ExchangeTokens &t, int token, uint64_t exchange, int lane) {
    const int slot = token * p.k + min(lane, p.k - 1);
    return choose_ranks(p, t.layer, token, t.ids[slot], t.weights[slot], exchange, lane);
}

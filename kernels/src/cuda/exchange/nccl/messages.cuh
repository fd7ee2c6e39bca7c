// What the kernels of the exchange over NCCL share: where a message's parts lie, and what is believed of it.
//
// A message is one piece of memory: a head of 64 bytes, rows, the experts of each row's slots, their weights. A rank writes
// one for all others: which rank a slot goes to follows from it everywhere alike. Results come back as a head and a row
// for each row (or slot) of the message. A head's stamp says that the library has really brought it; order and visibility
// are the stream's, so nothing here polls: what a rank of this host writes straight into this one's memory it fences before
// the library carries its head. Nothing of a peer is used before it was held against the capacity.
#pragma once
#include "../exchange.cuh"

constexpr int HEAD = 64;

struct Messages {
    uint8_t *there;  // [ranks] messages, `there_stride` apart: what each rank says; this rank's own is what it sends
    uint8_t *out;    // [ranks] results, `back_stride` apart: for each other rank
    uint8_t *back;   // [ranks] results from each rank, this one included
    size_t there_stride, back_stride;
    int row_bytes;   // of a row of a message
    int back_bytes;  // of the results of a row
    int carried;     // few: rows of every message, used or not; many: 0, each rank's own count
    int block;       // many: of a multiple of so many there is room
    uint64_t straight;  // ranks into whose memory (`area`, their `there` as mapped here) is written what is for them: all but heads
};

// One rank's message of `rows` rows.
struct Message {
    uint8_t *at;
    uint8_t *rows;
    uint32_t *ids;   // [rows, k]
    float *weights;  // [rows, k]
};

DEVICE size_t slot_bytes(int rows, int k) { return (static_cast<size_t>(rows) * k * 4 + 15) / 16 * 16; }

DEVICE Message message_in(const Messages &m, uint8_t *at, int rows, int k) {
    rows = m.carried ? m.carried : ceil_div(rows, m.block) * m.block;
    uint8_t *slots = at + HEAD + static_cast<size_t>(rows) * m.row_bytes;
    return {at, at + HEAD, reinterpret_cast<uint32_t *>(slots), reinterpret_cast<float *>(slots + slot_bytes(rows, k))};
}
DEVICE Message message_of(const Messages &m, int rank, int rows, int k) { return message_in(m, m.there + rank * m.there_stride, rows, k); }

// Results of row `row` that `rank` sent back, and where those for `rank` go: straight home, if that is here.
DEVICE uint8_t *result_of(const Messages &m, int rank, int row) {
    return m.back + rank * m.back_stride + HEAD + static_cast<size_t>(row) * m.back_bytes;
}
DEVICE uint8_t *result_for(const Messages &m, int rank, int self, int row) {
    return rank == self ? result_of(m, rank, row) : m.out + rank * m.back_stride + HEAD + static_cast<size_t>(row) * m.back_bytes;
}

// Where this rank's message lies at a rank of `straight`, and the results of that rank's row; where any rank's are written.
DEVICE uint8_t *message_at(const ExchangeParams &p, const Messages &m, int rank) { return p.area[rank] + p.rank * m.there_stride; }
DEVICE uint8_t *result_at(const ExchangeParams &p, const Messages &m, int rank, int row) {
    return p.area[rank] + (m.back - m.there) + p.rank * m.back_stride + HEAD + static_cast<size_t>(row) * m.back_bytes;
}

// This rank's message of `rows` rows, here and wherever it is written straight.
template <class Write> DEVICE void for_each_copy(const ExchangeParams &p, const Messages &m, const Message &own, int rows, const Write &write) {
    write(own);
    for (uint64_t rest = m.straight; rest; rest &= rest - 1) write(message_in(m, message_at(p, m, __ffsll(rest) - 1), rows, p.k));
}

// What the block has written straight is there before the library's kernel behind this one says so. By all threads.
DEVICE void finish_straight(const Messages &m) {
    if (!m.straight) return;
    __syncthreads();
    if (threadIdx.x == 0) fence_system();
}

DEVICE uint8_t *result_to(const ExchangeParams &p, const Messages &m, int rank, int row) {
    return m.straight >> rank & 1 ? result_at(p, m, rank, row) : result_for(m, rank, p.rank, row);
}

DEVICE void write_head(uint8_t *to, const Unit &head) { *reinterpret_cast<Unit *>(to) = head; }
DEVICE Unit read_head(const uint8_t *from) { return *reinterpret_cast<const Unit *>(from); }

// Of this rank's message of the next exchange, unless one has failed. `load`: expert rows here of the one before.
DEVICE void write_own_head(const ExchangeParams &p, const Message &own, int count, const int *load) {
    const Unit head = header(count, *load, p.state->begun + 1);
    if (!failed(p)) write_head(own.at, head);
}

// What all blocks learn of the messages: rows of each rank, loads, first the check of every head. One block reports.
struct Heads {
    int rows[MAX_RANKS];
    uint32_t loads[MAX_RANKS];
};
// What a thread asks for at once: a rank's head, of the thread of that number, and whether an exchange has failed before.
struct Ahead {
    Unit head;
    bool failed;
};
DEVICE Ahead read_ahead(const ExchangeParams &p, const uint8_t *first, size_t stride) {
    Ahead ahead{};
    if (threadIdx.x < p.ranks) ahead.head = read_head(first + threadIdx.x * stride);
    ahead.failed = failed(p);
    return ahead;
}
DEVICE bool check_heads(const ExchangeParams &p, const Ahead &ahead, int most, uint64_t exchange, Heads &heads, bool reports) {
    const int rank = threadIdx.x;
    const Unit &head = ahead.head;
    bool good = !ahead.failed;
    if (good && rank < p.ranks) {
        const bool came = header_stamp(head) == exchange;
        good = came && head.a <= static_cast<uint32_t>(most);
        if (!good && reports) fail(p, came ? COUNT : ABORTED, rank, exchange);
        heads.rows[rank] = head.a, heads.loads[rank] = head.b;
    }
    return __syncthreads_and(good);
}
DEVICE bool read_heads(const ExchangeParams &p, const Messages &m, int most, uint64_t exchange, Heads &heads, bool reports) {
    return check_heads(p, read_ahead(p, m.there, m.there_stride), most, exchange, heads, reports);
}

// All results came; false: some rank's did not.
DEVICE bool check_results(const ExchangeParams &p, const Ahead &ahead, uint64_t exchange, bool reports) {
    const int rank = threadIdx.x;
    bool good = !ahead.failed;
    if (good && rank < p.ranks) {
        good = header_stamp(ahead.head) == exchange;
        if (!good && reports) fail(p, ABORTED, rank, exchange);
    }
    return __syncthreads_and(good);
}
// For each rank, before its results go.
DEVICE void stamp_results(const ExchangeParams &p, const Messages &m, uint64_t exchange) {
    const int rank = threadIdx.x;
    if (rank >= p.ranks) return;
    uint8_t *to = (rank == p.rank ? m.back : m.out) + rank * m.back_stride;
    write_head(to, header(0, 0, exchange));
}

// An expert's owners; of an expert that there is not, none.
DEVICE uint4 owners_of(const ExchangeParams &p, int layer, uint32_t expert) {
    if (expert >= static_cast<uint32_t>(p.experts)) return make_uint4(ABSENT, ABSENT, ABSENT, ABSENT);
    return __ldg(reinterpret_cast<const uint4 *>(p.placement) + static_cast<size_t>(layer) * p.experts + expert);
}

DEVICE uint2 first_owners(const ExchangeParams &p, int layer, uint32_t expert) {
    if (expert >= static_cast<uint32_t>(p.experts)) return make_uint2(ABSENT, ABSENT);
    return __ldg(reinterpret_cast<const uint2 *>(p.placement) + (static_cast<size_t>(layer) * p.experts + expert) * (MAX_REPLICAS / 2));
}

// `choose_ranks` for a row of any rank's message, as every rank does it; lane j < k has slot j's rank and expert there.
DEVICE void choose_for(const ExchangeParams &p, int layer, const Message &from, int sender, int row, uint64_t exchange, int lane,
                       int &rank, uint32_t &local) {
    const uint32_t *loads = p.loads + (~exchange & 1) * MAX_RANKS;
    uint4 held = make_uint4(ABSENT, ABSENT, ABSENT, ABSENT);
    if (lane < p.k) held = owners_of(p, layer, from.ids[row * p.k + lane]);
    uint32_t chosen = held.x;
    const unsigned several = __ballot_sync(ALL_LANES, held.y != ABSENT);
    uint64_t mask = or_lanes(held.x != ABSENT && held.y == ABSENT ? 1ull << (chosen >> 16) : 0);
    for (unsigned rest = several; rest; rest &= rest - 1) {
        const int slot = __ffs(rest) - 1;
        if (lane == slot) {
            const uint32_t candidates[MAX_REPLICAS] = {held.x, held.y, held.z, held.w};
            uint64_t best = ~0ull;
#pragma unroll
            for (int i = 0; i < MAX_REPLICAS; i++) {
                if (candidates[i] == ABSENT) continue;
                const uint32_t to = candidates[i] >> 16;
                const uint32_t hash = ((row * 2654435761u) ^ (to * 40503u) ^ (sender * 97u)) * 2246822519u >> 24;
                const uint64_t key = mask >> to & 1 ? 0 : static_cast<uint64_t>(loads[to] + 1) * (hash + 64) + 1;
                if (key < best) best = key, chosen = candidates[i];
            }
        }
        mask |= 1ull << (__shfl_sync(ALL_LANES, chosen, slot) >> 16);
    }
    rank = chosen == ABSENT ? -1 : static_cast<int>(chosen >> 16);
    local = rank == p.rank ? chosen & 0xffffu : ABSENT;
}

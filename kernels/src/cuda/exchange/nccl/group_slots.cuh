// The slots of an exchange of few tokens over NCCL: which rows of all ranks' messages are for experts here, grouped by expert for their
// kernels, and what the combine needs of each. Bytes: experts' numbers once by the block that groups and once by each row's block.
#pragma once
#include "../group.cuh"
#include "messages.cuh"

constexpr int FEW_THREADS = 512;

struct ArriveFew {
    ExchangeParams exchange;
    Messages messages;
    float *x;  // [ranks * few_tokens, hidden]
    GroupRows group;
    int layer;
};

// Four slots of one message, used or not, that lie side by side: on their way before anyone knows how many there are.
struct FourSlots {
    int sender, token, slot;  // of the first; sender -1: there are none
    uint4 ids;
};
DEVICE int fours_of_message(const ArriveFew &d) { return ceil_div(d.messages.carried * d.exchange.k, 4); }
DEVICE FourSlots locate_slots(const ArriveFew &d, int turn) {
    const ExchangeParams &p = d.exchange;
    const unsigned each = fours_of_message(d), four = turn * FEW_THREADS + threadIdx.x, sender = four / each;
    FourSlots s{-1, 0, 0, {}};
    if (sender >= static_cast<unsigned>(p.ranks)) return s;
    const unsigned first = (four - sender * each) * 4, token = first / p.k;
    s.sender = sender, s.token = token, s.slot = first - token * p.k;
    return s;
}
DEVICE FourSlots read_slots(const ArriveFew &d, int turn) {
    FourSlots s = locate_slots(d, turn);
    if (s.sender < 0) return s;
    const Message from = message_of(d.messages, s.sender, 0, d.exchange.k);
    s.ids = *reinterpret_cast<const uint4 *>(from.ids + s.token * d.exchange.k + s.slot);  // what is behind the last slot is room to sixteen bytes
    return s;
}

// What the block that groups has in shared memory.
constexpr int ROW_WORDS = 1024 / 32;
struct Grouping {
    uint2 holders[MAX_EXPERTS];  // of each expert the first two: the second says whether there are several
    int first[MAX_EXPERTS];      // where the rows of each local expert begin
    int2 scratch[MAX_EXPERTS / WARP];
    uint32_t several[ROW_WORDS];
};
// And of a size that depends on the step: marks [local experts][words], an expert's rows before each word of marks, the slots'
// experts in the order of `FourSlots`, and the grouped slots: row << 16 | slot.
struct GroupingArrays {
    uint32_t *tokens_of, *places;
    uint16_t *starts, *id_of;
    DEVICE GroupingArrays(const ArriveFew &d, uint2 *at) {
        const int words = d.group.experts * d.group.words, slots = d.exchange.ranks * fours_of_message(d) * 4;
        id_of = reinterpret_cast<uint16_t *>(at);
        places = reinterpret_cast<uint32_t *>(id_of + slots);
        tokens_of = places + slots;
        starts = reinterpret_cast<uint16_t *>(tokens_of + words);
    }
};
// Before anything has come.
DEVICE void start_grouping(const ArriveFew &d, Grouping &g, const GroupingArrays &arrays) {
    for (int i = threadIdx.x; i < d.group.experts * d.group.words; i += FEW_THREADS) arrays.tokens_of[i] = 0;
    if (threadIdx.x < ROW_WORDS) g.several[threadIdx.x] = 0;
}

// Which rows of all ranks are for experts here, grouped by expert. By one block, a barrier after `start_grouping`; `slots`: the
// first. The rows' own blocks keep what the combine needs of their slots.
DEVICE void group_messages(const ArriveFew &d, uint64_t exchange, const Heads &heads, FourSlots slots, Grouping &g,
                           const GroupingArrays &arrays) {
    const ExchangeParams &p = d.exchange;
    if (threadIdx.x < p.ranks) {
        p.counts[threadIdx.x] = heads.rows[threadIdx.x];
        p.loads[(exchange & 1) * MAX_RANKS + threadIdx.x] = heads.loads[threadIdx.x];
    }
    if (threadIdx.x == 0) p.state->open = exchange;
    const int turns = ceil_div(p.ranks * fours_of_message(d), FEW_THREADS);
    bool shared = false;
    for (int turn = 0; turn < turns; turn++) {
        if (turn > 0) slots = read_slots(d, turn);
        if (slots.sender < 0) continue;
        const uint32_t ids[4] = {slots.ids.x, slots.ids.y, slots.ids.z, slots.ids.w};
        uint32_t local[4];
        int token = slots.token, slot = slots.slot;
#pragma unroll
        for (int a = 0; a < 4; a++) {
            const int row = slots.sender * p.few_tokens + token;
            local[a] = 0xffffu;
            if (token < heads.rows[slots.sender]) {
                const uint2 held = ids[a] < MAX_EXPERTS ? g.holders[ids[a]] : make_uint2(ABSENT, ABSENT);
                const uint32_t id = held.x & 0xffffu;
                if (held.y != ABSENT) {
                    atomicOr(&g.several[row / 32], 1u << (row % 32));
                    shared = true;
                } else if (held.x != ABSENT && static_cast<int>(held.x >> 16) == p.rank && id < static_cast<uint32_t>(d.group.experts)) {
                    local[a] = id;
                    mark_row(arrays.tokens_of, d.group.words, id, row);
                }
            }
            if (++slot == p.k) slot = 0, token++;
        }
        reinterpret_cast<uint2 *>(arrays.id_of)[turn * FEW_THREADS + threadIdx.x] = make_uint2(local[0] | local[1] << 16, local[2] | local[3] << 16);
    }
    if (__syncthreads_or(shared)) {
        // Rows with an expert that several ranks hold: a warp each.
        const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31;
        for (int row = warp; row < p.ranks * p.few_tokens; row += FEW_THREADS / WARP) {
            if (!(g.several[row / 32] >> (row % 32) & 1)) continue;
            const int sender = row / p.few_tokens, token = row % p.few_tokens;
            int rank;
            uint32_t local;
            choose_for(p, d.layer, message_of(d.messages, sender, 0, p.k), sender, token, exchange, lane, rank, local);
            if (lane >= p.k) continue;
            uint16_t &id = arrays.id_of[sender * fours_of_message(d) * 4 + token * p.k + lane];
            // Slots of experts that one rank holds are marked already.
            if (local >= static_cast<uint32_t>(d.group.experts) || id != 0xffffu) continue;
            id = local;
            mark_row(arrays.tokens_of, d.group.words, local, row);
        }
        __syncthreads();
    }
    const int expert = threadIdx.x;
    int rows = 0;
    if (expert < d.group.experts) {
#pragma unroll 4
        for (int w = expert * d.group.words; w < (expert + 1) * d.group.words; w++) {
            const int more = __popc(arrays.tokens_of[w]);
            arrays.starts[w] = rows, rows += more;
        }
    }
    const int pieces = ceil_div(rows, GROUP_ROWS);
    int2 total;
    const int2 at = scan_pairs(rows, pieces, g.scratch, total);
    if (expert < MAX_EXPERTS) g.first[expert] = at.x;
    if (expert == 0) *d.group.groups.count = total.y, *d.group.rows = total.x;
#pragma unroll 1
    for (int piece = 0; piece < pieces; piece++)
        d.group.groups.group[at.y + piece] = {expert, at.x + piece * GROUP_ROWS, min(GROUP_ROWS, rows - piece * GROUP_ROWS), 0};
    __syncthreads();
    for (int turn = 0; turn < turns; turn++) {
        if (turns > 1) slots = locate_slots(d, turn);
        if (slots.sender < 0) continue;
        const uint2 packed = reinterpret_cast<const uint2 *>(arrays.id_of)[turn * FEW_THREADS + threadIdx.x];
        const uint32_t local[4] = {packed.x & 0xffffu, packed.x >> 16, packed.y & 0xffffu, packed.y >> 16};
        int token = slots.token, slot = slots.slot;
#pragma unroll
        for (int a = 0; a < 4; a++) {
            if (local[a] != 0xffffu) {
                const uint32_t row = slots.sender * p.few_tokens + token, word = local[a] * d.group.words + row / 32;
                const int before = arrays.starts[word] + __popc(arrays.tokens_of[word] & ((1u << row % 32) - 1));
                arrays.places[g.first[local[a]] + before] = row << 16 | (row * p.k + slot);
            }
            if (++slot == p.k) slot = 0, token++;
        }
    }
    __syncthreads();
    for (int place = threadIdx.x; place < total.x; place += FEW_THREADS) {
        const uint32_t both = arrays.places[place];
        d.group.groups.row_token[place] = both >> 16;
        d.group.groups.row_slot[place] = both & 0xffffu;
    }
}

// What the combine needs of a row's slots. By one warp.
DEVICE void keep_slots(const ArriveFew &d, uint64_t exchange, int sender, int token) {
    const ExchangeParams &p = d.exchange;
    const int lane = threadIdx.x & 31, at = (sender * p.few_tokens + token) * p.k + lane;
    const Message from = message_of(d.messages, sender, 0, p.k);
    int rank;
    uint32_t local;
    float weight = 0.f;
    if (lane < p.k) weight = from.weights[token * p.k + lane];
    choose_for(p, d.layer, from, sender, token, exchange, lane, rank, local);
    if (lane >= p.k) return;
    p.ids[at] = local < static_cast<uint32_t>(d.group.experts) ? local : ABSENT, p.weights[at] = weight;
    if (sender == p.rank) p.owner[token * p.k + lane] = rank < 0 ? 0 : rank;
}

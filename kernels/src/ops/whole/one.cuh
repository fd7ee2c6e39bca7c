// One decode token through all layers in one kernel: what its parts share (`one.cu`).
//
// One block a multiprocessor stays for the whole step: 16 warps that compute and one that feeds them (`one_stream.cuh`).
// Blocks do not meet: each value that one leaves for others says itself that it is there (`one_values.cuh`).
#pragma once
#include <climits>

#include "../../cuda/gemv.cuh"
#include "../attention/pages.cuh"
#include "../route/route.cuh"

constexpr int ONE_THREADS = GEMV_THREADS + WARP;  // the last warp feeds the others
// The feeding warp's group is whole, three warps of it idle, so that the others can have some of its registers.
constexpr int LAUNCH_THREADS = GEMV_THREADS + 4 * WARP, COMPUTE_REGISTERS = 104, FEED_REGISTERS = 64;
constexpr int HEAD_DIM = 128, HEADS_HELD = 8, ONE_TOP_K = 8, HALF_SLOTS = 4, EXPERT_RUNS = 4, DENSE_RUNS = 8;
// Tiles of a block's share of the context: the host knows the longest context.
constexpr int MAX_TILES = 1024;
constexpr int MAX_ENTRIES = 32, MAX_PARTS = 3;
// Units whose sums wait for each other: a warp each to finish them.
constexpr int MAX_UNITS = 4;
// The second-level cache's policy for data that is read once (as `createpolicy` makes it).
constexpr uint64_t READ_ONCE = 0x12F0000000000000;

// 4-byte words of a line of the cache.
constexpr int LINE_WORDS = 32;
constexpr int TRACED = 4;

// GATE: what the residual stream before the attention adds to the scores.
enum Op : int { QKV, GATE, ATTENTION, OUTPUT, GATE_UP, DOWN, OPS };
// Of a step: cycles of the ops, then nanoseconds until the layers begin, and of the layers.
constexpr int TRACE_ROWS = OPS + 1;

// The gate's weights times the output projection's (`fold.cu`) are units of OUTPUT: each part's inputs in so many cuts.
constexpr int FOLD_CUTS = 2, FOLD_IMAGE = 8192;
// Arrays whose sum, times the norm's factor, is the gate's logits.
constexpr int MAX_LOGIT_PARTS = GATE_PARTS + MAX_PARTS * FOLD_CUTS;

// What a step leaves for the next one.
struct OneState {
    unsigned layers;  // computed so far
};

// One layer: a row of a table in device memory.
struct OneLayer {
    uint8_t *stream[9];                                     // STREAM_*: weights, and the pages of keys and values
    const float *norm, *q_norm, *k_norm, *moe_norm, *bias;  // q_norm, k_norm, bias: or null
    uint32_t bf16_scales, unused;                           // a bit each of SCALES_*
};

struct OneParams {
    const OneLayer *layer;        // [layers]
    const float *hidden;          // [hidden]: the embedded token
    const int *position;
    const int *token_run;
    const uint32_t *tables;
    const double *turns;          // [rotary / 2]
    // What blocks leave for each other (`one_values.cuh`), each value written once a layer.
    float *projection, *squares;  // [q + 2 kv], and of each 32 of them the sum of squares
    float *partial;               // [kv head][split_stride][8][HEAD_DIM]
    float2 *partial_sums;         // [kv head][split_stride][8]: maximum (base 2) and sum
    float *attended;              // [parts][width]: the residual stream behind the attention as a sum
    float *logits;                // [GATE_PARTS + parts * FOLD_CUTS][MAX_EXPERTS]: the gate's logits as a sum, without the norm's factor
    float *acted;                 // [top_k][inter]
    float *after;                 // [2][width]: the residual stream behind the layer as a sum
    float *result;                // the same behind the last layer, for the kernels that follow
    unsigned *announced;          // [OPS][LINE_WORDS]: how often blocks have come to the end of an op
    OneState *state;
    unsigned long long *trace;    // [grid][TRACE_ROWS][TRACED], or null
    size_t expert_bytes, up_offset, down_offset;
    int layers, width, q_width, kv_width, inter, experts, k, rotary;
    int table_stride, page_tokens, parts, renormalize;
    float eps, scale;             // scale: log2(e) / sqrt(HEAD_DIM)
    int split_stride;             // splits of a head at most
    int unused;
};

// ---- shared memory ------------------------------------------------------------------------------------------------

// Stages of one copy. INT4 with groups of 128: what a warp mostly has of a tile, at M2's widths.
template <int F> constexpr int COPY_STAGES = F == INT4_G128 ? 3 : Layout<F>::SPAN;
template <int F> constexpr int COPY_BYTES = Layout<F>::BYTES * COPY_STAGES<F>;

// A warp's ring, and how many copies are on their way at most.
constexpr int WARP_RING = 10752, COPIES = 8;

// Keys of a tile of 16 tokens, or values: one copy.
template <int KV> constexpr int KEY_BYTES = TILE_TOKENS * HEAD_DIM * KV_BYTES<KV>;
// A tile's values lie in the ring right behind its keys.
template <int KV> constexpr int TOGETHER = 2 * KEY_BYTES<KV>;

// A run of a warp's weights, the same in every layer: offset in a stream of the layer and size, both in units of 16 bytes. FP8 of experts: its
// first trio's scale block and what is copied.
struct alignas(8) OneEntry {
    uint32_t offset;
    uint16_t size;
    uint8_t copy;    // of one copy, in units of 16 bytes, less one; COPY_TRIOS: a stage, a trio's first with its scale block
    uint8_t stream;  // of `OneLayer`, bits 0 to 3; the experts' slot from bit 4 on
};

enum : int { STREAM_Q, STREAM_K, STREAM_V, STREAM_O, STREAM_GATE, STREAM_EXPERTS, STREAM_KEYS, STREAM_VALUES, STREAM_FOLD, STREAMS };
constexpr int ENTRY_SLOT = 16;
constexpr uint8_t COPY_TRIOS = 0;

enum : int { SCALES_Q, SCALES_K, SCALES_V, SCALES_O, SCALES_EXPERTS };

// What a block does in an op, the same in every layer.
struct alignas(16) OnePlan {
    int unit, units, step;  // its units: from `unit` below `units`, one every `step`
    int part;               // of the output projection's inputs, or the half of the slots
    int begin, end;         // inputs
    int first_slot, slots;  // of `down`; `output`: units of the gate's
    int plain;              // units behind it are the gate's
    int scales;             // of the first units: SCALES_*
    int next_scales[2];     // units from which on it is one more
};

// Whether a unit's scales are BF16.
struct UnitScales {
    int first, next[2];
    uint32_t bf16;

    __device__ __forceinline__ UnitScales(const OneLayer &l, const OnePlan &plan)
        : first(plan.scales), next{plan.next_scales[0], plan.next_scales[1]}, bf16(l.bf16_scales) {}
    __device__ __forceinline__ int operator()(int unit) const { return bf16 >> (first + (unit >= next[0]) + (unit >= next[1])) & 1; }
};

// The thread's index, not known to be the same in every layer: what follows from it is made where it is needed and does not
// occupy a register for the whole step.
DEVICE int thread_here() {
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));
    return thread;
}

struct OneShared {
    union {
        uint8_t image[24576];                  // the op's input; OUTPUT's for the gate from FOLD_IMAGE on
        struct {                               // attention: of up to 16 tiles
            uint4 likely[GEMV_WARPS][WARP];    // probabilities against the tile's own maximum, as operands
            float4 rest[HEAD_DIM / 16][WARP];  // what the upper warps' tiles add
        } round;
    };
    uint8_t gate_image[2048];
    float partial[MAX_UNITS][GEMV_WARPS * TILE_ROWS];  // of units: [warp][row]
    float residual[MAX_UNITS][MAX_PARTS][32];          // of the units' outputs, as a sum
    uint4 operands[HEAD_DIM / 16][WARP];               // the query as operands of the products with the keys
    alignas(16) float2 turn[HEAD_DIM / 2];             // cosine and sine of the pair at the token's position
    alignas(16) float key[HEAD_DIM], value[HEAD_DIM];
    float maximum[GEMV_WARPS][HEADS_HELD], sum[GEMV_WARPS][HEADS_HELD];
    uint32_t values[GEMV_WARPS];     // where the warps' tiles of values are in their rings
    uint32_t tile[MAX_TILES];        // where the block's tiles lie in a layer's keys, in units of 16 bytes
    OneEntry program[GEMV_WARPS][MAX_ENTRIES];
    OnePlan plan[OPS];
    ushort2 run[OPS][GEMV_WARPS];    // of a warp's tiles: first stage, and how many
    float steps[96];                 // of the image's blocks, FP8
    uint8_t slot[96];                // of a block of 128 of `down`'s inputs, counted over the half's slots
    OneLayer layers[2];              // by the layer's last bit
    OneParams p;
    uint64_t full[GEMV_WARPS][COPIES], empty[GEMV_WARPS][COPIES];
    uint16_t held[GEMV_WARPS][COPIES];  // bytes of the ring that a copy holds
    const uint8_t *feeding[2][STREAMS];  // the streams of the layers that are being asked for, by the last bit
    unsigned long long trace[TRACE_ROWS][TRACED], started;
    long long noted;                    // when the trace was written last
    alignas(16) float scratch[GEMV_WARPS];
    alignas(16) uint32_t keys[MAX_EXPERTS];                     // of the choice
    alignas(16) uint32_t best[ONE_TOP_K * MAX_EXPERTS / WARP];  // of each 32 experts
    int best_id[ONE_TOP_K * MAX_EXPERTS / WARP];
    float scores[MAX_EXPERTS];
    float weights[ONE_TOP_K];       // of the chosen experts
    int ids[ONE_TOP_K];
    unsigned epoch;                 // layers computed before this step
    int entries;                    // of a layer's program
    int first_down;                 // the entry before which the feeding warp waits for `released`
    int released;                   // layers of which the block's products of gate and up are made
    int chooses;                    // whether the block reads experts at all
    int position;
    int tiles, splits;              // of one head's context: tiles of 16 tokens, and over how many blocks
    int head, split, tile0, tile1;  // this block's
    int per_kv;                     // query heads of a kv head
    int split_row[GEMV_WARPS];      // where the splits of a warp's head begin, for the output projection
};

static_assert(sizeof(OneShared) <= 57344, "`cuda.rs` asks for so much behind the rings");

// The inputs [begin, end) of one part, in whole blocks of 128.
DEVICE void slice_inputs(int inputs, int parts, int part, int &begin, int &end) {
    const int blocks = inputs / 128, each = ceil_div(blocks, parts);
    begin = min(part * each, blocks) * 128, end = min((part + 1) * each, blocks) * 128;
}

// The gate's units of OUTPUT: of the part's inputs, in F32 stages of 64, a cut, and of that a warp's stages (pairs of BF16: high
// parts, low parts), counted from the part's beginning.
DEVICE void fold_run(int inputs, int cut, int warp, int &first, int &count) {
    int begin, stages;
    split_stages(inputs / 64, FOLD_CUTS, cut, begin, stages);
    split_stages(stages, GEMV_WARPS, warp, first, count);
    first += begin;
}

// Blocks that take the gate's units: those without a share of the context, while they are many. A multiple of the parts.
DEVICE int gate_blocks(const OneParams &p, int splits) {
    const int grid = gridDim.x, units = p.experts / TILE_ROWS * GATE_PARTS, idle = grid - p.kv_width / HEAD_DIM * splits;
    return (2 * idle >= units + 2 * GATE_PARTS ? idle : grid) / GATE_PARTS * GATE_PARTS;
}

// `down`: a block serves half of the slots, four warps each. First slot of the half, and how many.
DEVICE void half_slots(int k, int &slot0, int &slots) {
    const int half = blockIdx.x & 1;
    slots = half ? k / 2 : k - k / 2, slot0 = half ? k - k / 2 : 0;
}

// Where a tile of this block's head begins in a layer's keys (and values), in units of 16 bytes.
template <int KV> DEVICE uint32_t find_tile(const OneParams &p, const uint32_t *table, int head, int tile) {
    const int position = tile * TILE_TOKENS;
    const uint32_t page = __ldcg(table + position / p.page_tokens);
    const uint32_t row = (page * (p.kv_width / HEAD_DIM) + head) * p.page_tokens + position % p.page_tokens;
    return row * (HEAD_DIM * KV_BYTES<KV> / 16);
}

// ---- what a warp will read ------------------------------------------------------------------------------------------

// `copy`: bytes of one copy.
template <int F> DEVICE OneEntry entry_of(int stream, int tile, int stages, int first, int count, int copy = COPY_BYTES<F>) {
    if constexpr (TRIOS<F>) {
        const size_t from = tile * tile_bytes<F>(stages) + stage_offset<F>(first) - SCALE_BLOCK;
        return {static_cast<uint32_t>(from / 16), static_cast<uint16_t>(count * (Layout<F>::BYTES / 16) + ceil_div(count, TRIO) * (SCALE_BLOCK / 16)),
                COPY_TRIOS, static_cast<uint8_t>(stream)};
    }
    const uint32_t offset = static_cast<uint32_t>(tile * stages + first) * (Layout<F>::BYTES / 16);
    return {offset, static_cast<uint16_t>(count * (Layout<F>::BYTES / 16)),
            static_cast<uint8_t>(copy / 16 - 1), static_cast<uint8_t>(stream)};
}

// Units that this block takes of `units`, one every `step` blocks.
DEVICE int units_of(int units, int block, int step) { return block < step && block < units ? (units - 1 - block) / step + 1 : 0; }

// The warp's program of one layer: a lane makes one entry. Entries of no bytes stand for nothing to read; the one of
// the keys stands for all of them.
template <int DENSE, int EXPERT, int KV> DEVICE void write_program(const OneParams &p, OneShared &shared, int splits) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, grid = gridDim.x, block = blockIdx.x;
    int begin, end, first, count;
    const int used = grid / p.parts * p.parts, gates = gate_blocks(p, splits);
    const int counts[OPS] = {units_of((p.q_width + 2 * p.kv_width) / 32, block, grid),
                             units_of(p.experts / TILE_ROWS * GATE_PARTS, block, gates),
                             1,
                             units_of((p.width / 32 + p.experts / TILE_ROWS * FOLD_CUTS) * p.parts, block, used),
                             units_of(p.k * (p.inter / 32), block, grid),
                             units_of(p.width / TILE_ROWS, block / 2, grid / 2)};
    int op = 0, i = lane, entries = 0;
#pragma unroll
    for (int o = 0; o < OPS; o++) {
        if (op == o && i >= counts[o]) i -= counts[o], op++;
        entries += counts[o];
    }
    OneEntry entry{};
    if (op == QKV) {
        const int stages = p.width / Layout<DENSE>::K;
        split_stages(stages, DENSE_RUNS, warp % DENSE_RUNS, first, count);
        int tile = (block + i * grid) * 2 + warp / DENSE_RUNS, stream = STREAM_Q;
        if (tile >= p.q_width / TILE_ROWS) {
            tile -= p.q_width / TILE_ROWS, stream = STREAM_K;
            if (tile >= p.kv_width / TILE_ROWS) tile -= p.kv_width / TILE_ROWS, stream = STREAM_V;
        }
        entry = entry_of<DENSE>(stream, tile, stages, first, count);
    } else if (op == ATTENTION) {
        entry = {0, KEY_BYTES<KV> / 16, 0, STREAM_KEYS};
    } else if (op == OUTPUT) {
        const int unit = (block + i * used) / p.parts, stages = p.q_width / Layout<DENSE>::K, fold = unit - p.width / 32;
        slice_inputs(p.q_width, p.parts, block % p.parts, begin, end);
        if (fold < 0) {
            split_stages((end - begin) / Layout<DENSE>::K, DENSE_RUNS, warp % DENSE_RUNS, first, count);
            entry = entry_of<DENSE>(STREAM_O, unit * 2 + warp / DENSE_RUNS, stages, begin / Layout<DENSE>::K + first, count);
        } else {
            fold_run(end - begin, fold % FOLD_CUTS, warp, first, count);
            entry = entry_of<BF16>(STREAM_FOLD, fold / FOLD_CUTS, p.q_width / 32, begin / 32 + 2 * first, 2 * count, 2 * COPY_BYTES<BF16>);
        }
    } else if (op == GATE) {
        // A stage of 64 inputs in F32 is two of BF16: high parts, low parts.
        slice_inputs(p.width, GATE_PARTS, block % GATE_PARTS, begin, end);
        split_stages((end - begin) / 32, GEMV_WARPS, warp, first, count);
        entry = entry_of<BF16>(STREAM_GATE, (block + i * gates) / GATE_PARTS, p.width / 32, begin / 32 + first, count);
    } else if (op == GATE_UP) {
        const int per_expert = p.inter / 32, unit = block + i * grid, r = warp / EXPERT_RUNS, stages = p.width / Layout<EXPERT>::K;
        split_runs<EXPERT>(stages, EXPERT_RUNS, warp % EXPERT_RUNS, first, count);
        entry = entry_of<EXPERT>(STREAM_EXPERTS | unit / per_expert * ENTRY_SLOT, unit % per_expert * 2 + (r & 1), stages, first, count);
        if (r >= 2) entry.offset += static_cast<uint32_t>(p.up_offset / 16);
    } else if (op == DOWN) {
        const int tile = block / 2 + i * (grid / 2), stages = p.inter / Layout<EXPERT>::K;
        half_slots(p.k, begin, end);
        split_runs<EXPERT>(stages, EXPERT_RUNS, warp % EXPERT_RUNS, first, count);
        if (warp / EXPERT_RUNS >= end) count = 0;
        entry = entry_of<EXPERT>(STREAM_EXPERTS | (begin + warp / EXPERT_RUNS) % ONE_TOP_K * ENTRY_SLOT, tile, stages, first, count);
        entry.offset += static_cast<uint32_t>(p.down_offset / 16);
    }
    if (lane < entries) shared.program[warp][lane] = entry;
    if (threadIdx.x == 0)
        shared.first_down = EXPERT == INT4_G128 ? entries - counts[DOWN] : MAX_ENTRIES, shared.entries = entries, shared.chooses = counts[GATE_UP] + counts[DOWN] > 0;
}

// The ops' plans; by thread: an op, and an op and a warp.
template <int DENSE, int EXPERT> DEVICE void write_plans(const OneParams &p, OneShared &shared, int splits) {
    const int grid = gridDim.x, block = blockIdx.x, gates = gate_blocks(p, splits);
    if (threadIdx.x < OPS) {
        const int op = threadIdx.x, used = grid / p.parts * p.parts;
        OnePlan plan{};
        plan.step = grid, plan.unit = block, plan.end = p.width;
        plan.scales = op < OUTPUT ? SCALES_Q : op == OUTPUT ? SCALES_O : SCALES_EXPERTS, plan.next_scales[0] = plan.next_scales[1] = INT_MAX;
        if (op == QKV) {
            plan.units = (p.q_width + 2 * p.kv_width) / 32;
            plan.next_scales[0] = p.q_width / 32, plan.next_scales[1] = (p.q_width + p.kv_width) / 32;
        }
        if (op == OUTPUT) {
            plan.part = block % p.parts, plan.unit = block / p.parts, plan.step = used / p.parts;
            plan.units = block < used ? p.width / 32 + p.experts / TILE_ROWS * FOLD_CUTS : 0;
            slice_inputs(p.q_width, p.parts, plan.part, plan.begin, plan.end);
            plan.slots = units_of(plan.units, plan.unit, plan.step) - units_of(p.width / 32, plan.unit, plan.step);
        }
        if (op == GATE) {
            plan.step = gates, plan.units = block < gates ? p.experts / TILE_ROWS * GATE_PARTS : 0;
            slice_inputs(p.width, GATE_PARTS, block % GATE_PARTS, plan.begin, plan.end);
            if (block >= gates) plan.begin = plan.end;
        }
        if (op == GATE_UP) plan.units = p.k * (p.inter / 32);
        if (op == DOWN) {
            plan.part = block & 1, plan.unit = block / 2, plan.step = grid / 2;
            plan.units = block / 2 < grid / 2 ? p.width / TILE_ROWS : 0;
            half_slots(p.k, plan.first_slot, plan.slots);
        }
        plan.plain = op == OUTPUT ? p.width / 32 : op == GATE ? 0 : plan.units;
        shared.plan[op] = plan;
    }
    if (threadIdx.x < OPS * GEMV_WARPS) {
        const int op = threadIdx.x / GEMV_WARPS, warp = threadIdx.x % GEMV_WARPS;
        int begin = 0, end = p.width, first = 0, count = 0, slot0, slots;
        if (op == OUTPUT) slice_inputs(p.q_width, p.parts, block % p.parts, begin, end);
        if (op == GATE) slice_inputs(p.width, GATE_PARTS, block % GATE_PARTS, begin, end);
        half_slots(p.k, slot0, slots);
        if (op == QKV || op == OUTPUT) split_stages((end - begin) / Layout<DENSE>::K, DENSE_RUNS, warp % DENSE_RUNS, first, count);
        if (op == GATE) split_stages((end - begin) / 32, GEMV_WARPS, warp, first, count);
        if (op == GATE_UP) split_runs<EXPERT>(p.width / Layout<EXPERT>::K, EXPERT_RUNS, warp % EXPERT_RUNS, first, count);
        if (op == DOWN && warp / EXPERT_RUNS < slots) split_runs<EXPERT>(p.inter / Layout<EXPERT>::K, EXPERT_RUNS, warp % EXPERT_RUNS, first, count);
        shared.run[op][warp] = make_ushort2(first, count);
    }
    if (threadIdx.x < sizeof(shared.slot)) shared.slot[threadIdx.x] = threadIdx.x / (p.inter / 128);
}

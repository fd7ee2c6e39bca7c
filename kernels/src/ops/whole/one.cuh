// One decode token through all layers in one kernel: what its parts share (`one.cu`).
//
// One block a multiprocessor stays for the whole step: 16 warps that compute and one that feeds them (`one_stream.cuh`).
// Blocks do not meet: each value that one leaves for others says itself that it is there (`one_values.cuh`).
#pragma once
#include "../../cuda/gemv.cuh"
#include "../attention/pages.cuh"
#include "../route/route.cuh"

constexpr int ONE_THREADS = GEMV_THREADS + WARP;  // the last warp feeds the others
constexpr int HEAD_DIM = 128, HEADS_HELD = 8, ONE_TOP_K = 8, HALF_SLOTS = 4, EXPERT_RUNS = 4, DENSE_RUNS = 8;
// Tiles of a block's share of the context: the host knows the longest context.
constexpr int MAX_TILES = 1024;
constexpr int MAX_ENTRIES = 32, MAX_PARTS = 3;
// Floats from one head's values to the next in shared memory: the lanes of a warp meet all banks.
constexpr int MERGED_STRIDE = HEAD_DIM + 4;
// Units whose sums wait for each other: a warp each to finish them.
constexpr int MAX_UNITS = 4;
// The second-level cache's policy for data that is read once (as `createpolicy` makes it).
constexpr uint64_t READ_ONCE = 0x12F0000000000000;

// 4-byte words of a line of the cache.
constexpr int LINE_WORDS = 32;
constexpr int TRACED = 4;

enum Op : int { QKV, ATTENTION, OUTPUT, GATE, GATE_UP, DOWN, OPS };

// What a step leaves for the next one.
struct OneState {
    unsigned layers;  // computed so far
};

// One layer: a row of a table in device memory.
struct OneLayer {
    uint8_t *stream[8];                                     // STREAM_*: weights, and the pages of keys and values
    const float *norm, *q_norm, *k_norm, *moe_norm, *bias;  // q_norm, k_norm, bias: or null
    int bf16_scales[4];                                     // of q, k, v, o
    int expert_bf16_scales, unused;
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
    float *logits;                // [GATE_PARTS][experts]
    float *acted;                 // [top_k][inter]
    float *after;                 // [2][width]: the residual stream behind the layer as a sum
    float *result;                // the same behind the last layer, for the kernels that follow
    unsigned *announced;          // [OPS][LINE_WORDS]: how often blocks have come to the end of an op
    OneState *state;
    unsigned long long *trace;    // [grid][OPS][TRACED] cycles, or null
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

// A run of a warp's weights, the same in every layer: offset in a stream of the layer and size, both in units of 16 bytes.
struct alignas(8) OneEntry {
    uint32_t offset;
    uint16_t size;
    uint8_t copy;    // of one copy, in units of 16 bytes
    uint8_t stream;  // of `OneLayer`, bits 0 to 2; ENTRY_*; the experts' slot from bit 4 on
};

enum : int { STREAM_Q, STREAM_K, STREAM_V, STREAM_O, STREAM_GATE, STREAM_EXPERTS, STREAM_KEYS, STREAM_VALUES };
constexpr int ENTRY_SLOT = 16;

struct OneShared {
    union {
        uint8_t image[24576];                                    // the op's input
        float merged[GEMV_WARPS / 2][HEADS_HELD][MERGED_STRIDE];  // attention: results of half of the warps
        float query[HEADS_HELD][HEAD_DIM];
    };
    uint8_t gate_image[2048];
    float partial[MAX_UNITS][GEMV_WARPS * TILE_ROWS];  // of units: [warp][row]
    uint4 operands[HEAD_DIM / 16][WARP];       // the query as operands of the products with the keys
    float2 turn[HEAD_DIM / 2];                 // cosine and sine of the pair at the token's position
    float key[HEAD_DIM], value[HEAD_DIM];
    float maximum[GEMV_WARPS / 2][HEADS_HELD], sum[GEMV_WARPS / 2][HEADS_HELD];
    uint32_t tile[MAX_TILES];      // where the block's tiles lie in a layer's keys, in units of 16 bytes
    OneEntry program[GEMV_WARPS][MAX_ENTRIES];
    OneLayer layers[2];              // by the layer's last bit
    OneParams p;
    uint64_t full[GEMV_WARPS][COPIES], empty[GEMV_WARPS][COPIES];
    uint16_t held[GEMV_WARPS][COPIES];  // bytes of the ring that a copy holds
    const uint8_t *feeding[8];          // the streams of the layer that is being asked for
    unsigned long long trace[OPS][TRACED];
    alignas(16) float scratch[GEMV_WARPS];
    float weights[ONE_TOP_K];       // of the chosen experts
    int ids[ONE_TOP_K];
    unsigned epoch;                 // layers computed before this step
    int entries;                    // of a layer's program
    int position;
    int tiles, splits;              // of one head's context: tiles of 16 tokens, and over how many blocks
    int head, split, tile0, tile1;  // this block's
};

static_assert(sizeof(OneShared) <= 59392, "`cuda.rs` asks for so much behind the rings");

// The inputs [begin, end) of one part, in whole blocks of 128.
DEVICE void slice_inputs(int inputs, int parts, int part, int &begin, int &end) {
    const int blocks = inputs / 128, each = ceil_div(blocks, parts);
    begin = min(part * each, blocks) * 128, end = min((part + 1) * each, blocks) * 128;
}

// The units [begin, end) of gate and up that this block takes.
DEVICE void gate_up_units(const OneParams &p, int &begin, int &end) {
    const int units = p.k * (p.inter / 32), grid = gridDim.x, block = blockIdx.x;
    begin = units * block / grid, end = units * (block + 1) / grid;
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

template <int F> DEVICE OneEntry entry_of(int stream, int tile, int stages, int first, int count) {
    const uint32_t offset = static_cast<uint32_t>(tile * stages + first) * (Layout<F>::BYTES / 16);
    return {offset, static_cast<uint16_t>(count * (Layout<F>::BYTES / 16)),
            static_cast<uint8_t>(COPY_BYTES<F> / 16), static_cast<uint8_t>(stream)};
}

// Units that this block takes of `units`, one every `step` blocks.
DEVICE int units_of(int units, int block, int step) { return block < step && block < units ? (units - 1 - block) / step + 1 : 0; }

// The warp's program of one layer: a lane makes one entry. Entries of no bytes stand for nothing to read; the one of
// the keys stands for all of them.
template <int DENSE, int EXPERT, int KV> DEVICE void write_program(const OneParams &p, OneShared &shared) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, grid = gridDim.x, block = blockIdx.x;
    int begin, end, first, count;
    gate_up_units(p, begin, end);
    const int used = grid / p.parts * p.parts;
    const int counts[OPS] = {units_of((p.q_width + 2 * p.kv_width) / 32, block, grid),
                             1,
                             units_of(p.width / 32 * p.parts, block, used),
                             block < p.experts / TILE_ROWS * GATE_PARTS,
                             end - begin,
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
        const int unit = block + i * used, stages = p.q_width / Layout<DENSE>::K;
        slice_inputs(p.q_width, p.parts, unit % p.parts, begin, end);
        split_stages((end - begin) / Layout<DENSE>::K, DENSE_RUNS, warp % DENSE_RUNS, first, count);
        entry = entry_of<DENSE>(STREAM_O, unit / p.parts * 2 + warp / DENSE_RUNS, stages, begin / Layout<DENSE>::K + first, count);
    } else if (op == GATE) {
        // A stage of 64 inputs in F32 is two of BF16: high parts, low parts.
        slice_inputs(p.width, GATE_PARTS, block % GATE_PARTS, begin, end);
        split_stages((end - begin) / 32, GEMV_WARPS, warp, first, count);
        entry = entry_of<BF16>(STREAM_GATE, block / GATE_PARTS, p.width / 32, begin / 32 + first, count);
    } else if (op == GATE_UP) {
        const int per_expert = p.inter / 32, unit = begin + i, r = warp / EXPERT_RUNS, stages = p.width / Layout<EXPERT>::K;
        split_stages(stages, EXPERT_RUNS, warp % EXPERT_RUNS, first, count);
        entry = entry_of<EXPERT>(STREAM_EXPERTS | unit / per_expert * ENTRY_SLOT, unit % per_expert * 2 + (r & 1), stages, first, count);
        if (r >= 2) entry.offset += static_cast<uint32_t>(p.up_offset / 16);
    } else if (op == DOWN) {
        const int tile = block / 2 + i * (grid / 2), stages = p.inter / Layout<EXPERT>::K;
        half_slots(p.k, begin, end);
        split_stages(stages, EXPERT_RUNS, warp % EXPERT_RUNS, first, count);
        if (warp / EXPERT_RUNS >= end) count = 0;
        entry = entry_of<EXPERT>(STREAM_EXPERTS | (begin + warp / EXPERT_RUNS) % ONE_TOP_K * ENTRY_SLOT, tile, stages, first, count);
        entry.offset += static_cast<uint32_t>(p.down_offset / 16);
    }
    if (lane < entries) shared.program[warp][lane] = entry;
    if (threadIdx.x == 0) shared.entries = entries;
}

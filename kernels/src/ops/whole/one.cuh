// One decode token through all layers in one kernel: what its parts share (`one.cu`).
//
// One block a multiprocessor stays for the whole step. Blocks meet at a barrier of the device after each op; weights do
// not wait for it: every warp's ring of bulk copies asks for what the warp multiplies next, across ops and layers. Only
// the experts' weights wait, for the choice.
#pragma once
#include "../../cuda/gemv.cuh"
#include "../attention/pages.cuh"
#include "../route/route.cuh"

constexpr int HEAD_DIM = 128, HEADS_HELD = 8, ONE_TOP_K = 8, HALF_SLOTS = 4, EXPERT_RUNS = 4, DENSE_RUNS = 8;
// Pages of a block's share of the context that are looked up once a step.
constexpr int KNOWN_PAGES = 512;
constexpr int MAX_DEPTH = 5;

enum Op : int { QKV, ATTENTION, OUTPUT, GATE, GATE_UP, DOWN, OPS };

// One layer: a row of a table in device memory.
struct OneLayer {
    const uint8_t *q, *k, *v, *o, *gate, *experts;          // streams
    const float *norm, *q_norm, *k_norm, *moe_norm, *bias;  // q_norm, k_norm, bias: or null
    uint8_t *keys, *values;                                 // pages
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
    float *before, *middle;       // [hidden]: the residual stream as the norms saw it
    float *attended;              // [parts][hidden]
    float *after;                 // [2][hidden]
    float *projection, *squares;  // [q + 2 kv], and of each 32 of them the sum of squares
    float *partial;               // [kv head][split][8][HEAD_DIM]
    float2 *partial_sums;         // [kv head][split][8]: maximum (base 2) and sum
    float *logits;                // [GATE_PARTS][experts]
    float *acted;                 // [top_k][inter]
    unsigned *arrived, *base;     // the barrier's counter, and its value when the kernel starts
    unsigned long long *trace;    // [grid][OPS][4] cycles, or null
    size_t expert_bytes, up_offset, down_offset;
    int layers, width, q_width, kv_width, inter, experts, k, rotary;
    int table_stride, page_tokens, parts, renormalize;
    float eps, scale;             // scale: log2(e) / sqrt(HEAD_DIM)
    int prefetch, unused;
};

// ---- the barrier of the device ------------------------------------------------------------------------------------

// The counter only grows; what a barrier waits for follows from the number of barriers before it.
struct DeviceBarrier {
    unsigned *arrived;
    unsigned target;

    // What this block wrote is visible to whoever has waited.
    __device__ __forceinline__ void arrive() {
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
        }
        target += gridDim.x;
    }

    __device__ __forceinline__ void wait() {
        if (threadIdx.x == 0) {
            unsigned seen;
            do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
            while (static_cast<int>(seen - target) < 0);
        }
        __syncthreads();
    }
};

// ---- shared memory ------------------------------------------------------------------------------------------------

template <int DENSE, int EXPERT, int KV> struct OneShape {
    static constexpr int DENSE_COPY = Layout<DENSE>::BYTES * Layout<DENSE>::SPAN;
    static constexpr int EXPERT_COPY = Layout<EXPERT>::BYTES * Layout<EXPERT>::SPAN;
    static constexpr int SLOT = DENSE_COPY > EXPERT_COPY ? DENSE_COPY : EXPERT_COPY;  // never under 2048
    // Keys of a tile of 16 tokens fill one slot or two, 128 bytes of each token a slot; values as many.
    static constexpr int KEY_SLOTS = HEAD_DIM * KV_BYTES<KV> / 128;
    static constexpr int DEPTH = SLOT > 2200 ? 4 : MAX_DEPTH;
    static constexpr int WARP_RING = DEPTH * SLOT;
    static_assert(SLOT >= 2048 && DEPTH >= 2 * KEY_SLOTS, "a tile's keys and values are held at once");
};

struct OneShared {
    union {
        uint8_t image[24576];                                // the op's input
        float merged[GEMV_WARPS / 2][HEADS_HELD][HEAD_DIM];  // attention: results of half of the warps
        float query[HEADS_HELD][HEAD_DIM];
    };
    uint8_t gate_image[2048];
    float partial[2][PARTIAL_FLOATS<1>];
    uint4 operands[HEAD_DIM / 16][WARP];  // the query as operands of the products with the keys
    float2 turn[HEAD_DIM / 2];            // cosine and sine of the pair at the token's position
    float key[HEAD_DIM], value[HEAD_DIM];
    float maximum[GEMV_WARPS / 2][HEADS_HELD], sum[GEMV_WARPS / 2][HEADS_HELD];
    float score[MAX_EXPERTS], choice[MAX_EXPERTS];
    uint32_t pages[KNOWN_PAGES];
    OneLayer layers[2];  // by the layer's last bit
    OneParams p;
    uint64_t full[GEMV_WARPS * MAX_DEPTH];
    unsigned long long trace[OPS][4];
    float weights[ONE_TOP_K], scratch[GEMV_WARPS];
    int ids[ONE_TOP_K];
    int chosen;                    // layers whose experts are known
    int tiles, splits;             // of one head's context: tiles of 16 tokens, and over how many blocks
    int head, split, tile0, tile1; // this block's
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

DEVICE uint32_t page_of_tile(const OneShared &shared, int tile) {
    const int known = tile - shared.tile0;
    if (known < KNOWN_PAGES) return shared.pages[known];
    return __ldcg(shared.p.tables + tile * TILE_TOKENS / shared.p.page_tokens);
}

// ---- what a warp will read ------------------------------------------------------------------------------------------

// Contiguous bytes and how they are cut into copies; `next`: what comes after it, as `OneCursor` counts.
struct OneRun {
    const uint8_t *from;
    int left, copy;
    int next;
};

// layer * 65536 + op * 4096 + the op's run.
constexpr int CURSOR_OP = 4096, CURSOR_LAYER = 65536;

template <int F> DEVICE void take(OneRun &run, const uint8_t *stream, int tile, int stages, int first, int count) {
    run.from = stream + (static_cast<size_t>(tile) * stages + first) * Layout<F>::BYTES;
    run.left = count * Layout<F>::BYTES, run.copy = Layout<F>::BYTES * Layout<F>::SPAN;
}

// Run `i` of an op for this warp: false if there is none; a run of no bytes is nothing to read.
template <int DENSE, int EXPERT, int KV> DEVICE bool run_of(const OneShared &shared, int layer, int op, int i, OneRun &run) {
    const OneParams &p = shared.p;
    const OneLayer &l = shared.layers[layer & 1];
    const int warp = threadIdx.x / WARP, grid = gridDim.x, block = blockIdx.x;
    int first, count, begin, end;
    run.left = 0;
    if (op == QKV) {
        const int unit = block + i * grid, stages = p.width / Layout<DENSE>::K;
        if (unit >= (p.q_width + 2 * p.kv_width) / 32) return false;
        split_stages(stages, DENSE_RUNS, warp % DENSE_RUNS, first, count);
        int tile = unit * 2 + warp / DENSE_RUNS;
        const uint8_t *stream = l.q;
        if (tile >= p.q_width / TILE_ROWS) {
            tile -= p.q_width / TILE_ROWS, stream = l.k;
            if (tile >= p.kv_width / TILE_ROWS) tile -= p.kv_width / TILE_ROWS, stream = l.v;
        }
        take<DENSE>(run, stream, tile, stages, first, count);
    } else if (op == ATTENTION) {
        // Keys, then values, of every sixteenth tile.
        const int tile = shared.tile0 + warp + (i >> 1) * GEMV_WARPS;
        if (tile >= shared.tile1) return false;
        const int position = tile * TILE_TOKENS, kv_heads = p.kv_width / HEAD_DIM;
        const size_t row = (static_cast<size_t>(page_of_tile(shared, tile)) * kv_heads + shared.head) * p.page_tokens +
                           position % p.page_tokens;
        run.from = (i & 1 ? l.values : l.keys) + row * (HEAD_DIM * KV_BYTES<KV>);
        run.left = OneShape<DENSE, EXPERT, KV>::KEY_SLOTS * 2048, run.copy = 2048;
    } else if (op == OUTPUT) {
        const int used = grid / p.parts * p.parts, unit = block + i * used;
        if (block >= used || unit >= p.width / 32 * p.parts) return false;
        slice_inputs(p.q_width, p.parts, unit % p.parts, begin, end);
        split_stages((end - begin) / Layout<DENSE>::K, DENSE_RUNS, warp % DENSE_RUNS, first, count);
        take<DENSE>(run, l.o, unit / p.parts * 2 + warp / DENSE_RUNS, p.q_width / Layout<DENSE>::K,
                    begin / Layout<DENSE>::K + first, count);
    } else if (op == GATE) {
        if (i > 0 || block >= p.experts / TILE_ROWS * GATE_PARTS) return false;
        slice_inputs(p.width, GATE_PARTS, block % GATE_PARTS, begin, end);
        // A stage of 64 inputs in F32 is two of BF16: high parts, low parts.
        split_stages((end - begin) / 32, GEMV_WARPS, warp, first, count);
        take<BF16>(run, l.gate, block / GATE_PARTS, p.width / 32, begin / 32 + first, count);
    } else if (op == GATE_UP) {
        gate_up_units(p, begin, end);
        const int per_expert = p.inter / 32, unit = begin + i, r = warp / EXPERT_RUNS, stages = p.width / Layout<EXPERT>::K;
        if (unit >= end) return false;
        split_stages(stages, EXPERT_RUNS, warp % EXPERT_RUNS, first, count);
        const uint8_t *stream = l.experts + shared.ids[unit / per_expert] * p.expert_bytes + (r < 2 ? 0 : p.up_offset);
        take<EXPERT>(run, stream, unit % per_expert * 2 + (r & 1), stages, first, count);
    } else {
        const int used = grid / 2, tile = block / 2 + i * used, stages = p.inter / Layout<EXPERT>::K;
        if (block / 2 >= used || tile >= p.width / TILE_ROWS) return false;
        half_slots(p.k, begin, end);
        if (warp / EXPERT_RUNS >= end) return true;
        split_stages(stages, EXPERT_RUNS, warp % EXPERT_RUNS, first, count);
        take<EXPERT>(run, l.experts + shared.ids[begin + warp / EXPERT_RUNS] * p.expert_bytes + p.down_offset, tile, stages,
                     first, count);
    }
    return true;
}

// The first run with bytes from `cursor` on; without bytes: nothing more is known. One copy of this code, not one per
// product.
template <int DENSE, int EXPERT, int KV> __device__ __noinline__ OneRun next_run(const OneShared &shared, int cursor) {
    OneRun run{nullptr, 0, 0, 0};
    int layer = cursor / CURSOR_LAYER, op = cursor % CURSOR_LAYER / CURSOR_OP, i = cursor % CURSOR_OP;
#pragma unroll 1
    while (layer < shared.p.layers && !(op == GATE_UP && shared.chosen <= layer)) {
        if (run_of<DENSE, EXPERT, KV>(shared, layer, op, i, run)) {
            i++;
            if (run.left > 0) break;
        } else {
            i = 0;
            if (++op == OPS) op = QKV, layer++;
        }
    }
    run.next = layer * CURSOR_LAYER + op * CURSOR_OP + i;
    return run;
}

// The warp's ring of slots, filled in the order of the ops.
template <int DENSE, int EXPERT, int KV> struct OneStream {
    using Shape = OneShape<DENSE, EXPERT, KV>;
    const OneShared *shared;
    uint32_t slots, full, parity;
    OneRun run;
    int head, tail, free;
    bool leader;

    __device__ __forceinline__ void start(OneShared &memory, uint8_t *ring) {
        const int warp = threadIdx.x / WARP;
        uint64_t *barriers = memory.full + warp * Shape::DEPTH;
        shared = &memory, leader = (threadIdx.x & 31) == 0;
        slots = shared_address(ring + warp * Shape::WARP_RING), full = shared_address(barriers), parity = 0;
        run = {nullptr, 0, 0, 0}, head = 0, tail = 0, free = Shape::DEPTH;
        if (leader) {
#pragma unroll 1
            for (int i = 0; i < Shape::DEPTH; i++) barrier_init(barriers + i, 1);
            barrier_init_fence();
        }
        __syncwarp();
    }

    // Asks for as much as there is room for and is known.
    __device__ __forceinline__ void pump() {
#pragma unroll 1
        while (free > 0) {
            if (run.left == 0) {
                run = next_run<DENSE, EXPERT, KV>(*shared, run.next);
                if (run.left == 0) return;
            }
            const int bytes = min(run.left, run.copy);
            if (leader) {
                const uint64_t once = evict_first_policy();
                asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full + head * 8), "r"(bytes) : "memory");
                asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], "
                             "%2, [%3], %4;" ::"r"(slots + head * Shape::SLOT),
                             "l"(run.from), "r"(bytes), "r"(full + head * 8), "l"(once)
                             : "memory");
            }
            run.from += bytes, run.left -= bytes, free--;
            if (++head == Shape::DEPTH) head = 0;
        }
    }

    // Address of the slot `behind` the oldest, once it has arrived.
    __device__ __forceinline__ uint32_t front(int behind = 0) {
        int slot = tail + behind;
        uint32_t phase = parity;
        if (slot >= Shape::DEPTH) slot -= Shape::DEPTH, phase ^= 1;
        asm volatile(
            "{\n"
            ".reg .pred done;\n"
            "again:\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
            "@!done bra again;\n"
            "}\n" ::"r"(full + slot * 8),
            "r"(phase)
            : "memory");
        return slots + slot * Shape::SLOT;
    }

    // The oldest slots have been read by every lane: their place takes the next requests.
    __device__ __forceinline__ void pop(int count = 1) {
        __syncwarp();
        free += count, tail += count;
        if (tail >= Shape::DEPTH) tail -= Shape::DEPTH, parity ^= 1;
        pump();
    }
};

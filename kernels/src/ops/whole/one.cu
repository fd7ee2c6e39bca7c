// One decode token through all layers: the six ops of a layer (`Op`), each over all blocks, a barrier after each.
//
// Products are those of `gemv.cuh` for one token: a unit is R tiles of 16 rows whose inputs are cut into S runs, R S = 16
// warps; partial sums meet in shared memory in order. What an op leaves for the next one lies in F32 in device memory
// (the second-level cache, really); every block makes the whole input of its products itself.
// Bytes: all streams of a layer but those of the experts that are not chosen, and keys and values, once.
#include "one_attention.cuh"

// The residual stream as a sum of arrays, and its norm: a warp has 128 neighbouring values at a time.
struct OneNorm {
    static constexpr int QUADS = 2;
    float4 v[QUADS], w[QUADS];

    static __device__ __forceinline__ int place(int i) { return 4 * (threadIdx.x + i * GEMV_THREADS); }

    // Before the inputs are there.
    __device__ __forceinline__ void load_weights(const float *weight, int width) {
#pragma unroll
        for (int i = 0; i < QUADS; i++) w[i] = load_quad(weight + place(i), place(i) < width);
    }

    __device__ __forceinline__ void load(const float *x, int arrays, int width) {
        float4 part[QUADS][4];
#pragma unroll
        for (int a = 0; a < 4; a++)
#pragma unroll
            for (int i = 0; i < QUADS; i++)
                part[i][a] = a < arrays && place(i) < width
                                 ? __ldcg(reinterpret_cast<const float4 *>(x + static_cast<size_t>(a) * width + place(i)))
                                 : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            v[i] = part[i][0];
#pragma unroll
            for (int a = 1; a < 4; a++)
                v[i].x += part[i][a].x, v[i].y += part[i][a].y, v[i].z += part[i][a].z, v[i].w += part[i][a].w;
        }
    }

    __device__ __forceinline__ void write(float *to, int width) {
#pragma unroll
        for (int i = 0; i < QUADS; i++)
            if (place(i) < width) *reinterpret_cast<float4 *>(to + place(i)) = v[i];
    }

    // v becomes its norm. Holds a barrier of the block.
    __device__ __forceinline__ void finish(int width, float eps, float *scratch) {
        float squares = 0.f;
#pragma unroll
        for (int i = 0; i < QUADS; i++) squares += (v[i].x * v[i].x + v[i].y * v[i].y) + (v[i].z * v[i].z + v[i].w * v[i].w);
        squares = warp_sum(squares);
        if ((threadIdx.x & 31) == 0) scratch[threadIdx.x / WARP] = squares;
        __syncthreads();
        float total = 0.f;
#pragma unroll
        for (int i = 0; i < GEMV_WARPS; i++) total += scratch[i];
        const float inverse = rsqrtf(total / width + eps);
#pragma unroll
        for (int i = 0; i < QUADS; i++)
            v[i].x *= inverse * w[i].x, v[i].y *= inverse * w[i].y, v[i].z *= inverse * w[i].z, v[i].w *= inverse * w[i].w;
    }

    // The inputs [begin, end) as an image.
    template <bool BYTES> __device__ __forceinline__ void store(uint8_t *image, int begin, int end) {
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            const int block = place(i) / IMAGE_BLOCK;  // the same for the warp
            if (block * IMAGE_BLOCK >= begin && block * IMAGE_BLOCK < end)
                image_store_block<BYTES>(image, end - begin, block - begin / IMAGE_BLOCK, v[i], threadIdx.x & 31);
        }
    }
};

// The output projection's input: heads' weighted sums over their splits; a warp a head.
template <bool BYTES> DEVICE void image_from_splits(const OneShared &shared, uint8_t *image, int begin, int end) {
    const OneParams &p = shared.p;
    const int lane = threadIdx.x & 31, splits = shared.splits, per_kv = p.q_width / p.kv_width;
#pragma unroll 1
    for (int block = threadIdx.x / WARP; block < (end - begin) / IMAGE_BLOCK; block += GEMV_WARPS) {
        const int head = begin / HEAD_DIM + block;
        const size_t row = static_cast<size_t>(head / per_kv) * splits * HEADS_HELD + head % per_kv;
        const float2 sums = lane < splits ? __ldcg(p.partial_sums + row + lane * HEADS_HELD) : make_float2(-INFINITY, 0.f);
        float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
        float share = 0.f;
#pragma unroll 1
        for (int s0 = 0; s0 < splits; s0 += 8) {
            float4 part[8];
#pragma unroll
            for (int s = 0; s < 8; s++)
                part[s] = s0 + s < splits ? __ldcg(reinterpret_cast<const float4 *>(p.partial + (row + (s0 + s) * HEADS_HELD) * HEAD_DIM) + lane)
                                          : make_float4(0.f, 0.f, 0.f, 0.f);
            if (s0 == 0) {
                const float weight = exp2_fast(sums.x - warp_max(sums.x));
                share = weight / warp_sum(weight * sums.y);
            }
#pragma unroll
            for (int s = 0; s < 8; s++) {
                const float weight = __shfl_sync(ALL_LANES, share, (s0 + s) & 31);
                v.x += weight * part[s].x, v.y += weight * part[s].y, v.z += weight * part[s].z, v.w += weight * part[s].w;
            }
        }
        image_store_block<BYTES>(image, end - begin, block, v, lane);
    }
}

// The choice of experts from the gate's logits, by every block. `bias`: of the thread's expert.
DEVICE void choose(OneShared &shared, float bias, int layer) {
    const OneParams &p = shared.p;
    if (threadIdx.x < p.experts) {
        float z = 0.f;
#pragma unroll
        for (int part = 0; part < GATE_PARTS; part++) z += __ldcg(p.logits + part * p.experts + threadIdx.x);
        const float score = 1.f / (1.f + expf(-z));
        shared.score[threadIdx.x] = score, shared.choice[threadIdx.x] = score + bias;
    }
    __syncthreads();
    if (threadIdx.x < WARP) {
        int id;
        float weight;
        RouteParams route{};
        route.experts = p.experts, route.k = p.k, route.renormalize = p.renormalize;
        choose_experts(route, shared.score, shared.choice, threadIdx.x, id, weight);
        if (threadIdx.x < p.k) shared.ids[threadIdx.x] = id, shared.weights[threadIdx.x] = weight;
        if (threadIdx.x == 0) shared.chosen = layer + 1;
    }
    __syncthreads();
}

// The gate's part: stages of BF16 in pairs (high, low) that meet the same 64 inputs.
template <class Stream> DEVICE void multiply_gate(Stream &stream, uint32_t image, int first, int count, int lane, float (&acc)[1][4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) acc[0][i] = 0.f;
#pragma unroll 1
    for (int i = first; i < first + count; i++) {
        multiply_stage<BF16, 1>(stream.front(), image + (i / 2) * 256, 0, 0, lane, 0, acc);
        stream.pop();
    }
}

// Everything that does not change during the step.
template <int DENSE, int EXPERT, int KV> DEVICE void prepare(const OneParams &p, OneShared &shared) {
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(OneParams) / 4); i += GEMV_THREADS)
        reinterpret_cast<uint32_t *>(&shared.p)[i] = reinterpret_cast<const uint32_t *>(&p)[i];
    const int position = __ldcg(p.position), kv_heads = p.kv_width / HEAD_DIM;
    const int tiles = position / TILE_TOKENS + 1;
    const int splits = min(ceil_div(tiles, GEMV_WARPS), min(static_cast<int>(gridDim.x) / kv_heads, WARP));
    const int head = blockIdx.x % kv_heads, split = blockIdx.x / kv_heads, each = ceil_div(tiles, splits);
    const int tile0 = split < splits ? min(tiles, split * each) : 0, tile1 = split < splits ? min(tiles, tile0 + each) : 0;
    const uint32_t *table = p.tables + static_cast<size_t>(__ldcg(p.token_run)) * p.table_stride;
    if (threadIdx.x == 0) {
        shared.tiles = tiles, shared.splits = splits, shared.head = head, shared.split = split;
        shared.tile0 = tile0, shared.tile1 = tile1, shared.chosen = 0;
    }
    if (threadIdx.x < OPS * 4) (&shared.trace[0][0])[threadIdx.x] = 0;
    const int known = tile0 + threadIdx.x;
    static_assert(KNOWN_PAGES <= GEMV_THREADS, "a thread looks up one page");
    if (threadIdx.x < KNOWN_PAGES && known < tile1) shared.pages[threadIdx.x] = __ldcg(table + known * TILE_TOKENS / p.page_tokens);
    if (threadIdx.x < p.rotary / 2) {
        const double turn = position * p.turns[threadIdx.x];
        float sine, cosine;
        sincospif(2.f * static_cast<float>(turn - rint(turn)), &sine, &cosine);
        shared.turn[threadIdx.x] = make_float2(cosine, sine);
    }
    copy_layer(p, shared, 0);
    __syncthreads();
    if (threadIdx.x == 0) shared.p.tables = table;
    __syncthreads();
}

// Asks the second-level cache for this block's share of a stream.
DEVICE void prefetch(const uint8_t *stream, size_t bytes) {
    const size_t each = (bytes / gridDim.x + 15) / 16 * 16, from = each * blockIdx.x;
    if (from >= bytes) return;
    const uint32_t size = static_cast<uint32_t>(min(each, bytes - from));
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(stream + from), "r"(size) : "memory");
}

template <int DENSE, int EXPERT, int KV> DEVICE void decode_one(const OneParams &params) {
    using Shape = OneShape<DENSE, EXPERT, KV>;
    extern __shared__ __align__(128) uint8_t raw[];
    OneShared &shared = *reinterpret_cast<OneShared *>(raw + GEMV_WARPS * Shape::WARP_RING);
    const OneParams &p = shared.p;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, grid = gridDim.x, block = blockIdx.x;
    prepare<DENSE, EXPERT, KV>(params, shared);
    OneStream<DENSE, EXPERT, KV> stream;
    stream.start(shared, raw);
    stream.pump();
    wait_for_inputs();
    DeviceBarrier barrier{p.arrived, __ldcg(p.base)};
    const bool traced = p.trace && threadIdx.x == 0;
    OneNorm norm;
    long long mark = 0;
    int buffer = 0;
    const auto note = [&](int op, int what) {
        if (!traced) return;
        const long long now = clock64();
        shared.trace[op][what] += now - mark;
        mark = now;
    };
    if (traced) mark = clock64();
#pragma unroll 1
    for (int layer = 0; layer < p.layers; layer++) {
        const OneLayer &l = shared.layers[layer & 1];
#pragma unroll 1
        for (int op = QKV; op < OPS; op++) {
            const uint32_t image = shared_address(shared.image);
            uint32_t x = image, tails = 0;
            int first = 0, count = 0, unit = block, units = 0, step = grid, part = 0, slot0 = 0, slots = 0;
            float bias = 0.f;
            // What can be read or made before the op before has ended.
            if (op == QKV) {
                norm.load_weights(l.norm, p.width);
            } else if (op == GATE) {
                norm.load_weights(l.moe_norm, p.width);
            } else if (op == GATE_UP) {
                norm.store<INT4<EXPERT>>(shared.image, 0, p.width);
                if (l.bias && threadIdx.x < p.experts) bias = l.bias[threadIdx.x];
            } else if (op == ATTENTION && layer + 1 < p.layers) {
                copy_layer(p, shared, layer + 1);
            }
            if (layer > 0 || op > QKV) barrier.wait();
            note(op, 0);

            if (op == QKV) {
                norm.load(layer ? p.after : p.hidden, layer ? 2 : 1, p.width);
                if (block == 0) norm.write(p.before, p.width);
                norm.finish(p.width, p.eps, shared.scratch);
                norm.store<INT4<DENSE>>(shared.image, 0, p.width);
                split_stages(p.width / Layout<DENSE>::K, DENSE_RUNS, warp % DENSE_RUNS, first, count);
                units = (p.q_width + 2 * p.kv_width) / 32, tails = p.width * 2;
                __syncthreads();
            } else if (op == ATTENTION) {
                if (p.prefetch && layer + 1 < p.layers && threadIdx.x == 0) {
                    const OneLayer &next = shared.layers[(layer + 1) & 1];
                    const size_t row = static_cast<size_t>(p.width) / Layout<DENSE>::K * Layout<DENSE>::BYTES;
                    const size_t out_row = static_cast<size_t>(p.q_width) / Layout<DENSE>::K * Layout<DENSE>::BYTES;
                    prefetch(next.q, p.q_width / TILE_ROWS * row);
                    prefetch(next.k, p.kv_width / TILE_ROWS * row);
                    prefetch(next.v, p.kv_width / TILE_ROWS * row);
                    prefetch(next.o, p.width / TILE_ROWS * out_row);
                    prefetch(next.gate, static_cast<size_t>(p.experts) / TILE_ROWS * (p.width / 64) * Layout<F32>::BYTES);
                }
                attend<DENSE, EXPERT, KV>(shared, l, stream);
            } else if (op == OUTPUT) {
                const int used = grid / p.parts * p.parts;
                int begin, end;
                part = block % p.parts;
                slice_inputs(p.q_width, p.parts, part, begin, end);
                split_stages((end - begin) / Layout<DENSE>::K, DENSE_RUNS, warp % DENSE_RUNS, first, count);
                if (block < used) {
                    image_from_splits<INT4<DENSE>>(shared, shared.image, begin, end);
                    units = p.width / 32 * p.parts, step = used, tails = (end - begin) * 2;
                }
                __syncthreads();
            } else if (op == GATE) {
                int begin, end;
                slice_inputs(p.width, GATE_PARTS, block % GATE_PARTS, begin, end);
                norm.load(p.attended, p.parts, p.width);
                if (block == 0) norm.write(p.middle, p.width);
                norm.finish(p.width, p.eps, shared.scratch);
                norm.store<false>(shared.gate_image, begin, end);
                split_stages((end - begin) / 32, GEMV_WARPS, warp, first, count);
                x = shared_address(shared.gate_image);
                units = p.experts / TILE_ROWS * GATE_PARTS;
                __syncthreads();
            } else if (op == GATE_UP) {
                choose(shared, bias, layer);
                stream.pump();
                split_stages(p.width / Layout<EXPERT>::K, EXPERT_RUNS, warp % EXPERT_RUNS, first, count);
                gate_up_units(p, unit, units);
                step = 1, tails = p.width * 2;
            } else {
                const int used = grid / 2, bytes = image_bytes<INT4<EXPERT>>(p.inter), in_half = warp / EXPERT_RUNS;
                half_slots(p.k, slot0, slots);
                if (block / 2 < used && slots > 0) {
                    const float *from = p.acted + static_cast<size_t>(slot0) * p.inter;
                    fill_images<INT4<EXPERT>>([&](int i) { return from + static_cast<size_t>(i) * p.inter; }, slots, p.inter, 0,
                                              p.inter, shared.image, bytes);
                }
                if (in_half < slots) split_stages(p.inter / Layout<EXPERT>::K, EXPERT_RUNS, warp % EXPERT_RUNS, first, count);
                unit = block / 2, step = used, units = block / 2 < used ? p.width / TILE_ROWS : 0;
                x = image + in_half * bytes, tails = p.inter * 2;
            }
            note(op, 1);

#pragma unroll 1
            for (; unit < units; unit += step) {
                // The residual, on its way during the product.
                float sum = 0.f;
                if (op == OUTPUT && part == 0 && warp == 0) sum = __ldcg(p.before + unit / p.parts * 32 + lane);
                if (op == DOWN && !(block & 1) && threadIdx.x < TILE_ROWS) sum = __ldcg(p.middle + unit * TILE_ROWS + lane);
                float acc[1][4];
                if (op == GATE) {
                    multiply_gate(stream, x, first, count, lane, acc);
                } else if (DENSE == EXPERT || op < GATE) {
                    int scales = l.expert_bf16_scales;
                    if (op == QKV) {
                        const int row = unit * 32 + warp / DENSE_RUNS * TILE_ROWS - p.q_width;
                        scales = l.bf16_scales[row < 0 ? 0 : row < p.kv_width ? 1 : 2];
                    }
                    if (op == OUTPUT) scales = l.bf16_scales[3];
                    multiply_run<DENSE, 1>(stream, x, x + tails, 0, first, count, lane, scales, acc);
                } else {
                    multiply_run<EXPERT, 1>(stream, x, x + tails, 0, first, count, lane, l.expert_bf16_scales, acc);
                }
                float *partial = shared.partial[buffer];
                store_partials<1>(partial, warp, lane, acc);
                __syncthreads();
                buffer ^= 1;
                if (warp > 0) continue;
                const int tile = lane / TILE_ROWS, row = lane % TILE_ROWS;
                if (op == QKV) {
                    const float v = sum_partials(partial, 4, tile, DENSE_RUNS, 0, row);
                    p.projection[unit * 32 + lane] = v;
                    const float squares = warp_sum(v * v);
                    if (lane == 0) p.squares[unit] = squares;
                } else if (op == OUTPUT) {
                    sum += sum_partials(partial, 4, tile, DENSE_RUNS, 0, row);
                    p.attended[static_cast<size_t>(part) * p.width + unit / p.parts * 32 + lane] = sum;
                } else if (op == GATE) {
                    const int first_row = unit / GATE_PARTS * TILE_ROWS;
                    if (lane < TILE_ROWS)
                        p.logits[unit % GATE_PARTS * p.experts + first_row + row] = sum_partials(partial, 4, 0, GEMV_WARPS, 0, row);
                } else if (op == GATE_UP) {
                    const int per_expert = p.inter / 32;
                    const float gate = sum_partials(partial, 4, tile, EXPERT_RUNS, 0, row);
                    const float up = sum_partials(partial, 4, 2 + tile, EXPERT_RUNS, 0, row);
                    p.acted[static_cast<size_t>(unit / per_expert) * p.inter + unit % per_expert * 32 + lane] =
                        gate / (1.f + __expf(-gate)) * up;
                } else if (lane < TILE_ROWS) {
                    for (int j = 0; j < slots; j++)
                        sum += shared.weights[slot0 + j] * sum_partials(partial, 4, j, EXPERT_RUNS, 0, row);
                    p.after[static_cast<size_t>(block & 1) * p.width + unit * TILE_ROWS + lane] = sum;
                }
            }
            note(op, 2);
            if (layer + 1 < p.layers || op < DOWN) barrier.arrive();
            note(op, 3);
        }
    }
    allow_next_kernel();
    // Every block has passed the last barrier's arrival, so every block has read the base.
    if (block == 0 && threadIdx.x == 0) *p.base = barrier.target;
    if (!p.trace) return;
    __syncthreads();
    if (threadIdx.x < OPS * 4)
        p.trace[static_cast<size_t>(block) * OPS * 4 + threadIdx.x] = (&shared.trace[0][0])[threadIdx.x];
}

#define ONE(NAME, DENSE, EXPERT, KV_NAME, KV)                                                                          \
    extern "C" __global__ void __launch_bounds__(GEMV_THREADS, 1)                                                      \
        decode_one_##NAME##_##KV_NAME(const __grid_constant__ OneParams p) { decode_one<DENSE, EXPERT, KV>(p); }

ONE(int4_g128_int4_g128, INT4_G128, INT4_G128, bf16, KV_BF16)
ONE(int4_g128_int4_g128, INT4_G128, INT4_G128, e4m3, KV_E4M3)
ONE(fp8_fp8, FP8, FP8, bf16, KV_BF16)
ONE(fp8_fp8, FP8, FP8, e4m3, KV_E4M3)
ONE(bf16_int4_g32, BF16, INT4_G32, bf16, KV_BF16)
ONE(bf16_int4_g32, BF16, INT4_G32, e4m3, KV_E4M3)
ONE(bf16_bf16, BF16, BF16, bf16, KV_BF16)
ONE(bf16_bf16, BF16, BF16, e4m3, KV_E4M3)

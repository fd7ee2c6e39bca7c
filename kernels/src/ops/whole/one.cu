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

    __device__ __forceinline__ void load(const float *x, int arrays, const float *weight, int width) {
        float4 part[QUADS][4] = {};
        const auto load_array = [&](int a) {
#pragma unroll
            for (int i = 0; i < QUADS; i++)
                if (a < arrays && place(i) < width)
                    part[i][a] = __ldcg(reinterpret_cast<const float4 *>(x + a * width + place(i)));
        };
        load_array(0), load_array(1);
        if (arrays > 2) load_array(2), load_array(3);
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            w[i] = load_quad(weight + place(i), place(i) < width);
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
        const float inverse = rsqrtf(__fdividef(total, width) + eps);
#pragma unroll
        for (int i = 0; i < QUADS; i++)
            v[i].x *= inverse * w[i].x, v[i].y *= inverse * w[i].y, v[i].z *= inverse * w[i].z, v[i].w *= inverse * w[i].w;
    }

    // The inputs [begin, end) as an image.
    template <int F> __device__ __forceinline__ void store(uint8_t *image, int begin, int end) {
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            const int block = place(i) / IMAGE_BLOCK;  // the same for the warp
            if (block * IMAGE_BLOCK >= begin && block * IMAGE_BLOCK < end)
                store_image<F>(image, end - begin, block - begin / IMAGE_BLOCK, v[i]);
        }
    }
};

// The output projection's input: heads' weighted sums over their splits; a warp a head.
template <int F> DEVICE void image_from_splits(const OneShared &shared, uint8_t *image, int begin, int end) {
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
                share = __fdividef(weight, warp_sum(weight * sums.y));
            }
#pragma unroll
            for (int s = 0; s < 8; s++) {
                const float weight = __shfl_sync(ALL_LANES, share, (s0 + s) & 31);
                v.x += weight * part[s].x, v.y += weight * part[s].y, v.z += weight * part[s].z, v.w += weight * part[s].w;
            }
        }
        store_image<F>(image, end - begin, block, v);
    }
}

// How many of the keys in quads [first, end) go before a key.
template <class Before> DEVICE int count_before(const uint4 *keys, int first, int end, const Before &before) {
    int count = 0;
#pragma unroll 2
    for (int i = first; i < end; i++) {
        const uint4 quad = keys[i];
        count += before(quad.x, 4 * i) + before(quad.y, 4 * i + 1) + before(quad.z, 4 * i + 2) + before(quad.w, 4 * i + 3);
    }
    return count;
}

// The choice of experts from the gate's logits, by every block: an expert's place is the number of those that go before
// it, the lower one among equals. `bias`: of the thread's expert.
DEVICE void choose(OneShared &shared, float bias, int layer) {
    const OneParams &p = shared.p;
    const int e = threadIdx.x;
    float score = 0.f;
    uint32_t key = 0;
    if (e < p.experts) {
        float z = 0.f;
#pragma unroll
        for (int part = 0; part < GATE_PARTS; part++) z += __ldcg(p.logits + part * p.experts + e);
        score = 1.f / (1.f + expf(-z));
        key = ordered(score + bias);
        shared.keys[e] = key;
    }
    __syncthreads();
    if (e < p.experts) {
        const uint4 *keys = reinterpret_cast<const uint4 *>(shared.keys);
        const int warp0 = e / WARP * WARP / 4, warp1 = min(warp0 + WARP / 4, p.experts / 4);
        const int place = count_before(keys, 0, warp0, [&](uint32_t k, int) { return k >= key ? 1 : 0; }) +
                          count_before(keys, warp0, warp1, [&](uint32_t k, int i) { return k > key || (k == key && i < e) ? 1 : 0; }) +
                          count_before(keys, warp1, p.experts / 4, [&](uint32_t k, int) { return k > key ? 1 : 0; });
        if (place < p.k) shared.ids[place] = e, shared.scores[place] = score;
    }
    if (e == 0) shared.chosen = layer + 1;
    __syncthreads();
}

// Images of `rows` rows of `k` values: a warp a block of 128, the loads of up to four blocks at a time.
template <int F> DEVICE void images_of_rows(const float *from, int rows, int k, uint8_t *image, int bytes) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, blocks = k / IMAGE_BLOCK;
#pragma unroll 1
    for (int first = warp; first < rows * blocks; first += 4 * GEMV_WARPS) {
        float4 v[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (first + i * GEMV_WARPS < rows * blocks)
                v[i] = __ldcg(reinterpret_cast<const float4 *>(from) + (first + i * GEMV_WARPS) * WARP + lane);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int task = first + i * GEMV_WARPS;
            if (task < rows * blocks) store_image<F>(image + task / blocks * bytes, k, task % blocks, v[i]);
        }
    }
    __syncthreads();
}

// This block's share of each of a layer's streams that all blocks read, for `prefetch`.
template <int DENSE> DEVICE void share_streams(const OneParams &p, OneShared &shared) {
    const int stream = threadIdx.x;
    if (stream > STREAM_GATE) return;
    const int inputs = stream == STREAM_O ? p.q_width : p.width;
    const int rows = stream == STREAM_Q ? p.q_width : stream == STREAM_O ? p.width : stream == STREAM_GATE ? p.experts : p.kv_width;
    const uint32_t tile = stream == STREAM_GATE ? inputs / 64 * (Layout<F32>::BYTES / 16) : inputs / Layout<DENSE>::K * (Layout<DENSE>::BYTES / 16);
    const uint32_t size = rows / TILE_ROWS * tile, each = (size + gridDim.x - 1) / gridDim.x, from = min(size, each * blockIdx.x);
    shared.share[stream] = make_uint2(from, min(each, size - from));
}

// Asks the second-level cache for this block's share of a layer: a lane a stream.
DEVICE void prefetch(const OneShared &shared, const OneLayer &l, int lane) {
    if (lane < 0 || lane > STREAM_GATE) return;
    const uint2 share = shared.share[lane];
    if (share.y > 0)
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(l.stream[lane] + static_cast<size_t>(share.x) * 16),
                     "r"(share.y * 16)
                     : "memory");
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
    for (int tile = tile0 + threadIdx.x; tile < min(tile1, tile0 + MAX_TILES); tile += GEMV_THREADS)
        shared.tile[tile - tile0] = find_tile<KV>(p, table, head, tile);
    write_program<DENSE, EXPERT, KV>(p, shared);
    share_streams<DENSE>(p, shared);
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
            if (op == GATE_UP) {
                norm.store<EXPERT>(shared.image, 0, p.width);
                if (l.bias && threadIdx.x < p.experts) bias = l.bias[threadIdx.x];
            } else if (op == ATTENTION && layer + 1 < p.layers) {
                copy_layer(p, shared, layer + 1);
            }
            if (layer > 0 || op > QKV) barrier.wait();
            note(op, 0);

            if (op == QKV) {
                norm.load(layer ? p.after : p.hidden, layer ? 2 : 1, l.norm, p.width);
                if (block == 0) norm.write(p.before, p.width);
                norm.finish(p.width, p.eps, shared.scratch);
                norm.store<DENSE>(shared.image, 0, p.width);
                split_stages(p.width / Layout<DENSE>::K, DENSE_RUNS, warp % DENSE_RUNS, first, count);
                units = (p.q_width + 2 * p.kv_width) / 32, tails = p.width * 2;
                __syncthreads();
            } else if (op == ATTENTION) {
                attend<DENSE, EXPERT, KV>(shared, l, stream, [&] { note(op, 1); });
            } else if (op == OUTPUT) {
                if (p.prefetch && layer + 1 < p.layers)
                    prefetch(shared, shared.layers[(layer + 1) & 1], static_cast<int>(threadIdx.x) - (GEMV_THREADS - WARP));
                const int used = grid / p.parts * p.parts;
                int begin, end;
                part = block % p.parts;
                slice_inputs(p.q_width, p.parts, part, begin, end);
                split_stages((end - begin) / Layout<DENSE>::K, DENSE_RUNS, warp % DENSE_RUNS, first, count);
                if (block < used) {
                    image_from_splits<DENSE>(shared, shared.image, begin, end);
                    units = p.width / 32 * p.parts, step = used, tails = (end - begin) * 2;
                }
                __syncthreads();
            } else if (op == GATE) {
                int begin, end;
                slice_inputs(p.width, GATE_PARTS, block % GATE_PARTS, begin, end);
                norm.load(p.attended, p.parts, l.moe_norm, p.width);
                if (block == 0) norm.write(p.middle, p.width);
                norm.finish(p.width, p.eps, shared.scratch);
                norm.store<BF16>(shared.gate_image, begin, end);
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
                if (block / 2 < used && slots > 0)
                    images_of_rows<EXPERT>(p.acted + static_cast<size_t>(slot0) * p.inter, slots, p.inter, shared.image, bytes);
                if (in_half < slots) split_stages(p.inter / Layout<EXPERT>::K, EXPERT_RUNS, warp % EXPERT_RUNS, first, count);
                unit = block / 2, step = used, units = block / 2 < used ? p.width / TILE_ROWS : 0;
                x = image + in_half * bytes, tails = p.inter * 2;
            }
            if (op != ATTENTION) note(op, 1);

            // A few units one after the other, then a warp finishes each.
#pragma unroll 1
            while (unit < units) {
                const int mine = unit + warp * step, tile = lane / TILE_ROWS, row = lane % TILE_ROWS;
                const bool finishes = warp < MAX_UNITS && mine < units;
                // The residual, on its way during the products.
                float sum = 0.f;
                if (finishes && op == OUTPUT && part == 0) sum = __ldcg(p.before + mine / p.parts * 32 + lane);
                if (finishes && op == DOWN && !(block & 1)) sum = __ldcg(p.middle + mine * TILE_ROWS + row);
#pragma unroll 1
                for (int held = 0; held < MAX_UNITS && unit < units; held++, unit += step) {
                    float acc[1][4] = {};
                    if (op == GATE) {
                        multiply_gate(stream, x, first, count, lane, acc);
                    } else if (DENSE == EXPERT || op < GATE) {
                        int scales = l.expert_bf16_scales;
                        if (op == QKV) {
                            const int at = unit * 32 + warp / DENSE_RUNS * TILE_ROWS - p.q_width;
                            scales = l.bf16_scales[at < 0 ? 0 : at < p.kv_width ? 1 : 2];
                        }
                        if (op == OUTPUT) scales = l.bf16_scales[3];
                        multiply_stages<DENSE>(stream, x, x + tails, first, count, lane, scales, acc);
                    } else {
                        multiply_stages<EXPERT>(stream, x, x + tails, first, count, lane, l.expert_bf16_scales, acc);
                    }
                    store_sums(shared.partial[held], warp, lane, acc);
                }
                __syncthreads();
                if (finishes) {
                    const float *partial = shared.partial[warp];
                    if (op == QKV) {
                        const float v = sum_runs<DENSE_RUNS>(partial, tile, row);
                        p.projection[mine * 32 + lane] = v;
                        const float squares = warp_sum(v * v);
                        if (lane == 0) p.squares[mine] = squares;
                    } else if (op == OUTPUT) {
                        sum += sum_runs<DENSE_RUNS>(partial, tile, row);
                        p.attended[part * p.width + mine / p.parts * 32 + lane] = sum;
                    } else if (op == GATE) {
                        if (lane < TILE_ROWS)
                            p.logits[mine % GATE_PARTS * p.experts + mine / GATE_PARTS * TILE_ROWS + row] =
                                sum_runs<GEMV_WARPS>(partial, 0, row);
                    } else if (op == GATE_UP) {
                        const int per_expert = p.inter / 32;
                        const float gate = sum_runs<EXPERT_RUNS>(partial, tile, row);
                        const float up = sum_runs<EXPERT_RUNS>(partial, 2 + tile, row);
                        p.acted[mine / per_expert * p.inter + mine % per_expert * 32 + lane] = gate / (1.f + __expf(-gate)) * up;
                    } else if (lane < TILE_ROWS) {
                        float total = 0.f;
                        for (int j = 0; j < p.k; j++) total += shared.scores[j];
                        if (!p.renormalize) total = 1.f;
#pragma unroll 1
                        for (int j = 0; j < slots; j++)
                            sum += shared.scores[slot0 + j] / total * sum_runs<EXPERT_RUNS>(partial, j, row);
                        p.after[(block & 1) * p.width + mine * TILE_ROWS + row] = sum;
                    }
                }
                if (unit < units) __syncthreads();  // the sums' places are free again
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

// One decode token through all layers: the six ops of a layer (`Op`), each over all blocks.
//
// Products are those of `gemv.cuh` for one token: a unit is R tiles of 16 rows whose inputs are cut into S runs, R S = 16
// warps; partial sums meet in shared memory in order. What an op leaves for the next one lies in F32 in device memory
// (the second-level cache, really); every block makes the whole input of its products itself. A norm's factor is applied
// to the products' results, so that the input need not wait for it.
// Bytes: all streams of a layer but those of the experts that are not chosen, and keys and values, once.
#include "one_attention.cuh"

// The residual stream as a sum of arrays, times the norm's weights: a warp has 128 neighbouring values at a time.
struct OneNorm {
    static constexpr int QUADS = 2;
    float4 v[QUADS];  // the norm's weights, then what is multiplied

    static __device__ __forceinline__ int place(int i) { return 4 * (threadIdx.x + i * GEMV_THREADS); }

    // Before the values are there.
    __device__ __forceinline__ void load_weights(const float *weight, int width) {
#pragma unroll
        for (int i = 0; i < QUADS; i++) v[i] = load_quad(weight + place(i), place(i) < width);
    }

    // Leaves the warp's sum of squares in `scratch`.
    template <int ARRAYS>
    __device__ __forceinline__ void receive_sum(const float *x, int arrays, int width, uint32_t turn, uint32_t check, float *scratch) {
        float4 part[QUADS * ARRAYS];
        const int lane4 = (threadIdx.x & 31) * 4;
        receive(part, x, turn, check, [&](int j) {
            const int i = j / ARRAYS, a = j % ARRAYS;
            return (a < arrays ? a * width : 0) + (place(i) < width ? place(i) : lane4);
        });
        float squares = 0.f;
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            float4 x = part[i * ARRAYS];
#pragma unroll
            for (int a = 1; a < ARRAYS; a++) {
                const float4 more = part[i * ARRAYS + a];
                if (a < arrays) x.x += more.x, x.y += more.y, x.z += more.z, x.w += more.w;
            }
            if (place(i) >= width) x = make_float4(0.f, 0.f, 0.f, 0.f);
            squares += (x.x * x.x + x.y * x.y) + (x.z * x.z + x.w * x.w);
            v[i].x *= x.x, v[i].y *= x.y, v[i].z *= x.z, v[i].w *= x.w;
        }
        __syncwarp();
        squares = warp_sum(squares);
        if ((threadIdx.x & 31) == 0) scratch[threadIdx.x / WARP] = squares;
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

// The norm's factor, once all warps' sums are there.
DEVICE float norm_factor(const float *scratch, int width, float eps) {
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < GEMV_WARPS; i += 4) {
        const float4 v = *reinterpret_cast<const float4 *>(scratch + i);
        total += (v.x + v.y) + (v.z + v.w);
    }
    return rsqrtf(__fdividef(total, width) + eps);
}

// The output projection's input: heads' weighted sums over their splits; a warp a head.
template <int F> DEVICE void image_from_splits(OneShared &shared, int begin, int end, uint32_t turn) {
    const OneParams &p = shared.p;
    const int thread = thread_here(), lane = thread & 31, block = thread / WARP, splits = shared.splits;
    if (block >= (end - begin) / IMAGE_BLOCK) return;
    const int row = shared.split_row[block];
    const auto sums = [&] {
        const uint2 v = lane < splits ? peek_pair(p.partial_sums + row + lane * HEADS_HELD) : make_uint2(turn, turn);
        return make_uint2(v.x ^ turn, v.y ^ turn);
    };
    uint2 found = sums();
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
    float share = 0.f;
#pragma unroll 1
    for (int s0 = 0; s0 < splits; s0 += 5) {
        float4 part[5];
        receive(part, p.partial, turn, 1, [&](int s) { return (row + min(s0 + s, splits - 1) * HEADS_HELD) * HEAD_DIM + lane * 4; });
        if (s0 == 0) {
            while ((found.x | found.y) & 1) {
                found = sums();
            }
            __syncwarp();
            const float top = lane < splits ? __uint_as_float(found.x) : -INFINITY, sum = __uint_as_float(found.y);
            const float weight = exp2_fast(top - warp_max(top));
            share = __fdividef(weight, warp_sum(weight * sum));
        }
        __syncwarp();
#pragma unroll
        for (int s = 0; s < 5; s++) {
            const float weight = s0 + s < splits ? __shfl_sync(ALL_LANES, share, (s0 + s) & 31) : 0.f;
            v.x += weight * part[s].x, v.y += weight * part[s].y, v.z += weight * part[s].z, v.w += weight * part[s].w;
        }
    }
    store_image<F>(shared.image, end - begin, block, v);
}

// Images of rows of `inter` values, `all` blocks of 128 together: a warp a block, the loads of up to three at a time.
template <int F> DEVICE void images_of_rows(OneShared &shared, const float *from, int all, int bytes, uint32_t turn) {
    const int thread = thread_here(), warp = thread / WARP, lane = thread & 31, k = shared.p.inter;
#pragma unroll 1
    for (int first = warp; first < all; first += 3 * GEMV_WARPS) {
        float4 v[3];
        receive(v, from, turn, 1, [&](int i) { return min(first + i * GEMV_WARPS, all - 1) * IMAGE_BLOCK + lane * 4; });
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 3; i++) {
            const int task = first + i * GEMV_WARPS;
            if (task >= all) break;
            const int slot = shared.slot[task];
            store_image<F>(shared.image + slot * bytes, k, task - slot * (k / IMAGE_BLOCK), v[i]);
        }
    }
}

// Values of the residual stream, asked for long before they are added: `count` (16 or 32) neighbours of up to three arrays, by
// one warp, to `to`.
DEVICE void ask_residual(uint32_t to, const float *x, int arrays, int width, int at, int count) {
    const int lane = threadIdx.x & 31, quads = count / 4, a = lane / quads, quad = lane % quads * 4;
    if (a < arrays)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + (a * 32 + quad) * 4), "l"(x + a * width + at + quad) : "memory");
}

// This lane's value, summed over the arrays.
DEVICE float asked_residual(const float (&from)[MAX_PARTS][32], int arrays, int at) {
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncwarp();
    float sum = 0.f;
#pragma unroll
    for (int a = 0; a < MAX_PARTS; a++)
        if (a < arrays) sum += __uint_as_float(__float_as_uint(from[a][at]) & ~1u);
    return sum;
}

// Everything that does not change during the step.
template <int DENSE, int EXPERT, int KV> DEVICE void prepare(const OneParams &p, OneShared &shared) {
    if (threadIdx.x < GEMV_THREADS) {
        for (int i = threadIdx.x; i < static_cast<int>(sizeof(OneParams) / 4); i += GEMV_THREADS)
            reinterpret_cast<uint32_t *>(&shared.p)[i] = reinterpret_cast<const uint32_t *>(&p)[i];
        const int position = __ldcg(p.position), kv_heads = p.kv_width / HEAD_DIM;
        const int tiles = position / TILE_TOKENS + 1;
        const int splits = min(ceil_div(tiles, GEMV_WARPS), p.split_stride);
        // The last blocks first: they have fewer units of q, k and v, so room in their rings for keys.
        const int share = gridDim.x - 1 - blockIdx.x;
        const int head = share % kv_heads, split = share / kv_heads, each = ceil_div(tiles, splits);
        const int tile0 = split < splits ? min(tiles, split * each) : 0, tile1 = split < splits ? min(tiles, tile0 + each) : 0;
        const uint32_t *table = p.tables + static_cast<size_t>(__ldcg(p.token_run)) * p.table_stride;
        if (threadIdx.x == 0) {
            shared.per_kv = p.q_width / p.kv_width;
            shared.position = position, shared.tiles = tiles, shared.splits = splits, shared.head = head, shared.split = split;
            shared.tile0 = tile0, shared.tile1 = tile1, shared.epoch = __ldcg(&p.state->layers);
        }
        if (threadIdx.x < OPS * TRACED) (&shared.trace[0][0])[threadIdx.x] = 0;
        for (int tile = tile0 + threadIdx.x; tile < min(tile1, tile0 + MAX_TILES); tile += GEMV_THREADS)
            shared.tile[tile - tile0] = find_tile<KV>(p, table, head, tile);
        write_program<DENSE, EXPERT, KV>(p, shared);
        write_plans<DENSE, EXPERT>(p, shared);
        if (threadIdx.x < GEMV_WARPS) {
            int begin, end;
            slice_inputs(p.q_width, p.parts, blockIdx.x % p.parts, begin, end);
            const int query = begin / HEAD_DIM + threadIdx.x, per_kv = p.q_width / p.kv_width;
            shared.split_row[threadIdx.x] = query / per_kv * p.split_stride * HEADS_HELD + query % per_kv;
        }
        if (threadIdx.x < p.rotary / 2) {
            const double turn = position * p.turns[threadIdx.x];
            float sine, cosine;
            sincospif(2.f * static_cast<float>(turn - rint(turn)), &sine, &cosine);
            shared.turn[threadIdx.x] = make_float2(cosine, sine);
        }
        copy_layer(p, shared, 0);
        if (threadIdx.x < GEMV_WARPS * COPIES)
            barrier_init(&shared.full[0][threadIdx.x], 1), barrier_init(&shared.empty[0][threadIdx.x], 1);
        barrier_init_fence();
    }
    __syncthreads();
}

template <int DENSE, int EXPERT, int KV> DEVICE void compute(OneShared &shared, uint8_t *rings) {
    const OneParams &p = shared.p;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, block = blockIdx.x;
    OneStream stream;
    stream.start(shared, rings);
    wait_for_inputs();
    const bool traced = p.trace && threadIdx.x == 0;
    const auto note = [&](int op, int what) {
        if (!traced) return;
        // A meeting only holds up what depends on something behind it.
        if (*const_cast<const volatile int *>(&shared.entries) < 0) __trap();
        const long long now = clock64();
        shared.trace[op][what] += now - shared.noted;
        shared.noted = now;
    };
    if (traced) shared.noted = clock64();
#pragma unroll 1
    for (int layer = 0; layer < p.layers; layer++) {
        const OneLayer &l = shared.layers[layer & 1];
        const unsigned epoch = shared.epoch + layer + 1;
        const uint32_t turn = epoch & 1;
        // Where the residual stream before the attention is.
        const float *before = layer ? p.after : p.hidden;
        const int arrays = layer ? 2 : 1;
#pragma unroll 1
        for (int op = QKV; op < OPS; op++) {
            const uint32_t image = shared_address(shared.image);
            const OnePlan &plan = shared.plan[op];
            const ushort2 run = shared.run[op][warp];
            const int first = run.x, count = run.y, step = plan.step, units = plan.units, part = plan.part;
            int unit = plan.unit;
            uint32_t x = image, tails = p.width * 2;
            OneNorm norm;
            if (op == QKV) {
                norm.load_weights(l.norm, p.width);
                if (layer) listen_together(p, DOWN, epoch - 1);
                norm.receive_sum<2>(before, arrays, p.width, turn ^ 1, layer ? 1 : 0, shared.scratch);
                note(op, 0);
                norm.store<DENSE>(shared.image, 0, p.width);
            } else if (op == ATTENTION) {
                attend<KV>(shared, l, stream, epoch, [&] { note(op, 1); });
                note(op, 2);
                continue;
            } else if (op == OUTPUT) {
                tails = (plan.end - plan.begin) * 2;
                listen_together(p, ATTENTION, epoch);
                note(op, 0);
                if (units) image_from_splits<DENSE>(shared, plan.begin, plan.end, turn);
            } else if (op == GATE) {
                norm.load_weights(l.moe_norm, p.width);
                listen_together(p, OUTPUT, epoch);
                norm.receive_sum<MAX_PARTS>(p.attended, p.parts, p.width, turn, 1, shared.scratch);
                note(op, 0);
                norm.store<BF16>(shared.gate_image, plan.begin, plan.end);
                x = shared_address(shared.gate_image);
            } else if (op == GATE_UP) {
                if (shared.chooses) {
                    const float bias = l.bias && threadIdx.x < p.experts ? l.bias[threadIdx.x] : 0.f;
                    listen_together(p, GATE, epoch);
                    choose(shared, bias, turn);
                }
            } else {
                const int bytes = image_bytes<INT4<EXPERT>>(p.inter);
                tails = p.inter * 2, x = image + warp / EXPERT_RUNS * bytes;
                listen_together(p, GATE_UP, epoch);
                note(op, 0);
                if (units && plan.slots > 0)
                    images_of_rows<EXPERT>(shared, p.acted + static_cast<size_t>(plan.first_slot) * p.inter, plan.slots * (p.inter / 128), bytes, turn);
            }
            meet();
            note(op, 1);
            if (op == GATE_UP) {
                if (layer + 1 < p.layers) copy_layer(p, shared, layer + 1);
                if (warp == 0 && shared.chooses) weigh_experts(shared);
            }

            bool announced = false;
            // A few units one after the other, then a warp finishes each.
#pragma unroll 1
            while (unit < units) {
                const int mine = unit + warp * step, tile = lane / TILE_ROWS, row = lane % TILE_ROWS;
                const bool finishes = warp < MAX_UNITS && mine < units;
                // The residual, on its way during the products; it was there for the norms.
                const bool adds = finishes && part == 0 && (op == OUTPUT || op == DOWN);
                const uint32_t residual = shared_address(shared.residual[warp % MAX_UNITS]);
                if (adds && op == OUTPUT) ask_residual(residual, before, arrays, p.width, mine * 32, 32);
                if (adds && op == DOWN) ask_residual(residual, p.attended, p.parts, p.width, mine * TILE_ROWS, TILE_ROWS);
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
                meet();
                if (threadIdx.x == 0 && unit >= units) announce(p, op), announced = true;
                note(op, 2);
                if (finishes) {
                    const float *partial = shared.partial[warp];
                    float sum = adds ? asked_residual(shared.residual[warp], op == OUTPUT ? arrays : p.parts, op == OUTPUT ? lane : row) : 0.f;
                    const float factor = op != OUTPUT && op != DOWN ? norm_factor(shared.scratch, p.width, p.eps) : 1.f;
                    if (op == QKV) {
                        const float v = factor * sum_runs<DENSE_RUNS>(partial, tile, row);
                        publish(p.projection + mine * 32 + lane, v, turn);
                        const float squares = warp_sum(v * v);
                        if (lane == 0) publish(p.squares + mine, squares, turn);
                    } else if (op == OUTPUT) {
                        sum += sum_runs<DENSE_RUNS>(partial, tile, row);
                        publish(p.attended + part * p.width + mine * 32 + lane, sum, turn);
                    } else if (op == GATE) {
                        if (lane < TILE_ROWS)
                            publish(p.logits + mine % GATE_PARTS * p.experts + mine / GATE_PARTS * TILE_ROWS + row,
                                    factor * sum_runs<GEMV_WARPS>(partial, 0, row), turn);
                    } else if (op == GATE_UP) {
                        const float gate = factor * sum_runs<EXPERT_RUNS>(partial, tile, row);
                        const float up = factor * sum_runs<EXPERT_RUNS>(partial, 2 + tile, row);
                        publish(p.acted + mine * 32 + lane, __fdividef(gate, 1.f + __expf(-gate)) * up, turn);
                    } else if (lane < TILE_ROWS) {
#pragma unroll 1
                        for (int j = 0; j < plan.slots; j++) sum += shared.weights[plan.first_slot + j] * sum_runs<EXPERT_RUNS>(partial, j, row);
                        const int at = part * p.width + mine * TILE_ROWS + row;
                        publish(p.after + at, sum, turn);
                        if (layer + 1 == p.layers) p.result[at] = sum;
                    }
                }
                if (unit < units) meet();  // the sums' places are free again
            }
            if (threadIdx.x == 0 && !announced) announce(p, op);
            // The experts' input, while the choice is made.
            if (op == GATE) norm.store<EXPERT>(shared.image, 0, p.width);
            note(op, 3);
        }
    }
    allow_next_kernel();
    // All blocks have announced ops of this step, so all have read the state.
    if (block == 0 && threadIdx.x == 0) p.state->layers = shared.epoch + p.layers;
    if (!p.trace) return;
    meet();
    if (threadIdx.x < OPS * TRACED)
        p.trace[static_cast<size_t>(block) * OPS * TRACED + threadIdx.x] = (&shared.trace[0][0])[threadIdx.x];
}

template <int DENSE, int EXPERT, int KV> DEVICE void decode_one(const OneParams &params) {
    extern __shared__ __align__(128) uint8_t rings[];
    OneShared &shared = *reinterpret_cast<OneShared *>(rings + GEMV_WARPS * WARP_RING);
    prepare<DENSE, EXPERT, KV>(params, shared);
    if (threadIdx.x < GEMV_THREADS)
        compute<DENSE, EXPERT, KV>(shared, rings);
    else
        feed<KV>(shared, rings);
}


#define ONE(NAME, DENSE, EXPERT, KV_NAME, KV)                                                                          \
    extern "C" __global__ void __launch_bounds__(ONE_THREADS, 1)                                                  \
        decode_one_##NAME##_##KV_NAME(const __grid_constant__ OneParams p) { decode_one<DENSE, EXPERT, KV>(p); }

ONE(int4_g128_int4_g128, INT4_G128, INT4_G128, bf16, KV_BF16)
ONE(int4_g128_int4_g128, INT4_G128, INT4_G128, e4m3, KV_E4M3)
ONE(fp8_fp8, FP8, FP8, bf16, KV_BF16)
ONE(fp8_fp8, FP8, FP8, e4m3, KV_E4M3)
ONE(bf16_int4_g32, BF16, INT4_G32, bf16, KV_BF16)
ONE(bf16_int4_g32, BF16, INT4_G32, e4m3, KV_E4M3)
ONE(bf16_bf16, BF16, BF16, bf16, KV_BF16)
ONE(bf16_bf16, BF16, BF16, e4m3, KV_E4M3)

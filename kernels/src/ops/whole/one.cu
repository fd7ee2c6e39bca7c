// One decode token through all layers: the six ops of a layer (`Op`), each over all blocks.
//
// Products are those of `gemv.cuh` for one token: a unit is R tiles of 16 rows whose inputs are cut into S runs, R S = 16
// warps; partial sums meet in shared memory in order. What an op leaves for the next one lies in F32 in device memory
// (the second-level cache, really); every block makes the whole input of its products itself. A norm's factor is applied
// to the products' results, so that the input need not wait for it.
// Bytes: all streams of a layer but those of the experts that are not chosen, and keys and values, once.
#include "one_attention.cuh"
#include "one_input.cuh"

// Values of the residual stream, asked for long before they are added: `count` (16 or 32) neighbours of up to three arrays, by
// one warp, to `to`.
DEVICE void ask_residual(uint32_t to, const float *x, int arrays, int width, int at, int count) {
    const int lane = thread_here() & 31, quads = count / 4, a = lane / quads, quad = lane % quads * 4;
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

DEVICE unsigned long long nanoseconds() {
    unsigned long long t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t)::"memory");
    return t;
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
            shared.tile0 = tile0, shared.tile1 = tile1, shared.epoch = __ldcg(&p.state->layers), shared.released = 0;
        }
        if (threadIdx.x < TRACE_ROWS * TRACED) (&shared.trace[0][0])[threadIdx.x] = 0;
        for (int tile = tile0 + threadIdx.x; tile < min(tile1, tile0 + MAX_TILES); tile += GEMV_THREADS)
            shared.tile[tile - tile0] = find_tile<KV>(p, table, head, tile);
        write_program<DENSE, EXPERT, KV>(p, shared, splits);
        write_plans<DENSE, EXPERT>(p, shared, splits);
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
    const int block = blockIdx.x;
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
    // All products of an op are made. By one thread.
    const auto ends = [&](int op, int layer) {
        announce(p, op);
        if (op == GATE_UP) *const_cast<volatile int *>(&shared.released) = layer + 1;
    };
    if (traced) shared.noted = clock64(), shared.trace[OPS][0] = nanoseconds() - shared.started;
#pragma unroll 1
    for (int layer = 0; layer < p.layers; layer++) {
#pragma unroll 1
        for (int op = QKV; op < OPS; op++) {
            // Made again for each op, as all that follows from the thread: what lives through a layer does not fit into registers.
            const OneLayer &l = shared.layers[layer & 1];
            const unsigned epoch = shared.epoch + layer + 1;
            const uint32_t turn = epoch & 1;
            // Where the residual stream before the attention is.
            const float *before = layer ? p.after : p.hidden;
            const int arrays = layer ? 2 : 1;
            const int thread = thread_here(), warp = thread / WARP, lane = thread & 31;
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
                norm.store<DENSE>(shared, p.width);
            } else if (op == GATE) {
                if (unit >= units) continue;
                image_for_gate(shared, l.moe_norm, before, arrays, turn ^ 1, layer ? 1 : 0);
                x = shared_address(shared.gate_image);
            } else if (op == ATTENTION) {
                attend<KV>(shared, l, stream, epoch, note);
                note(op, 3);
                continue;
            } else if (op == OUTPUT) {
                tails = (plan.end - plan.begin) * 2;
                listen_together(p, ATTENTION, epoch);
                note(op, 0);
                if (units) image_from_splits<DENSE>(shared, plan.begin, plan.end, plan.slots > 0, turn);
            } else if (op == GATE_UP) {
                if (shared.chooses) {
                    const int e = expert_here();
                    const float bias = l.bias && e >= 0 && e < p.experts ? l.bias[e] : 0.f;
                    norm.load_weights(l.moe_norm, p.width);
                    listen_together(p, OUTPUT, epoch);
                    const float z = norm.receive_attended(p, turn, shared.scratch);
                    note(op, 0);
                    meet();
                    // The lower warps, with more of the image, do not wait for the choice.
                    if (thread >= GEMV_THREADS - MAX_EXPERTS) choose(shared, norm_factor(shared.scratch, p.width, p.eps) * z, bias);
                    norm.store<IMAGE_OF<EXPERT>>(shared, p.width);
                }
            } else {
                const int bytes = image_bytes<INT4<EXPERT>>(p.inter);
                tails = p.inter * 2, x = image + warp / EXPERT_RUNS * bytes;
                listen_together(p, GATE_UP, epoch);
                note(op, 0);
                if (unit < units && plan.slots > 0)
                    images_of_rows<IMAGE_OF<EXPERT>>(shared, p.acted + static_cast<size_t>(plan.first_slot) * p.inter, plan.slots * (p.inter / 128), bytes, turn);
            }
            meet();
            if constexpr (DENSE == FP8) tails = shared_address(shared.steps + (op == DOWN ? warp / EXPERT_RUNS * (p.inter / IMAGE_BLOCK) : 0)) - x;
            note(op, 1);
            if (op == GATE_UP) {
                if (layer + 1 < p.layers) copy_layer(p, shared, layer + 1);
                if (warp == 0 && shared.chooses) weigh_experts(shared);
            }

            if (thread == 0 && unit >= units) ends(op, layer);
            // A few units one after the other, then a warp finishes each.
#pragma unroll 1
            while (unit < units) {
                const int mine = unit + warp * step, tile = lane / TILE_ROWS, row = lane % TILE_ROWS;
                const int plain = plan.plain;  // units behind it are the gate's
                const bool finishes = warp < MAX_UNITS && mine < units;
                // The residual, on its way during the products; it was there for the norms.
                const bool adds = finishes && part == 0 && mine < plain && (op == OUTPUT || op == DOWN);
                const uint32_t residual = shared_address(shared.residual[warp % MAX_UNITS]);
                if (adds && op == OUTPUT) ask_residual(residual, before, arrays, p.width, mine * 32, 32);
                if (adds && op == DOWN) ask_residual(residual, p.attended, p.parts, p.width, mine * TILE_ROWS, TILE_ROWS);
                int held = 0;
                const UnitScales scales_of(l, plan);
                if constexpr (DENSE == INT4_G128 && EXPERT == INT4_G128) {
                    const uint32_t from = x + first * 256, tail = x + tails + first * IMAGE_TAIL_BYTES;
                    if (count == 3)
                        multiply_units<3>(stream, shared, from, tail, lane, warp, unit, held, plain, step, scales_of);
                    else if (count == 2)
                        multiply_units<2>(stream, shared, from, tail, lane, warp, unit, held, plain, step, scales_of);
                }
#pragma unroll 1
                for (; held < MAX_UNITS && unit < units; held++, unit += step) {
                    float acc[1][4] = {};
                    if (unit >= plain) {
                        if (op == OUTPUT) {
                            int from, pairs;
                            fold_run(plan.end - plan.begin, (unit - plain) % FOLD_CUTS, warp, from, pairs);
                            multiply_pairs(stream, DENSE == BF16 ? x : x + FOLD_IMAGE, from, pairs, lane, acc);
                        } else {
                            multiply_gate(stream, x, first, count, lane, acc);
                        }
                    } else if (DENSE == EXPERT || op < GATE_UP) {
                        multiply_stages<DENSE>(stream, x, x + tails, first, count, lane, scales_of(unit), acc);
                    } else {
                        multiply_stages<EXPERT>(stream, x, x + tails, first, count, lane, scales_of(unit), acc);
                    }
                    store_sums(shared.partial[held], warp, lane, acc);
                }
                // What the finish adds and multiplies with, while the slowest warp is awaited.
                float sum = 0.f, factor = 1.f;
                if (adds) sum = asked_residual(shared.residual[warp], op == OUTPUT ? arrays : p.parts, op == OUTPUT ? lane : row);
                if (finishes && (op == QKV || op == GATE_UP)) factor = norm_factor(shared.scratch, p.width, p.eps);
                meet();
                if (thread == 0 && unit >= units) ends(op, layer);
                note(op, 2);
                if (finishes) {
                    const float *partial = shared.partial[warp];
                    if (op == QKV) {
                        const float v = factor * sum_runs<DENSE_RUNS>(partial, tile, row);
                        publish(p.projection + mine * 32 + lane, v, turn);
                        const float squares = warp_sum(v * v);
                        if (lane == 0) publish(p.squares + mine, squares, turn);
                    } else if (mine >= plain) {
                        const int at = mine - plain, cuts = op == GATE ? GATE_PARTS : FOLD_CUTS;
                        const int array = op == GATE ? at % cuts : GATE_PARTS + part * FOLD_CUTS + at % cuts;
                        if (lane < TILE_ROWS) publish(p.logits + array * MAX_EXPERTS + at / cuts * TILE_ROWS + row, sum_runs<GEMV_WARPS>(partial, 0, row), turn);
                    } else if (op == OUTPUT) {
                        sum += sum_runs<DENSE_RUNS>(partial, tile, row);
                        publish(p.attended + part * p.width + mine * 32 + lane, sum, turn);
                    } else if (op == GATE_UP) {
                        const float gate = factor * sum_runs<EXPERT_RUNS>(partial, tile, row);
                        const float up = factor * sum_runs<EXPERT_RUNS>(partial, 2 + tile, row);
                        publish(p.acted + mine * 32 + lane, __fdividef(gate, 1.f + __expf(-gate)) * up, turn);
                    } else if (lane < TILE_ROWS) {
#pragma unroll
                        for (int j = 0; j < HALF_SLOTS; j++)
                            if (j < plan.slots) sum += shared.weights[plan.first_slot + j] * sum_runs<EXPERT_RUNS>(partial, j, row);
                        const int at = part * p.width + mine * TILE_ROWS + row;
                        publish(p.after + at, sum, turn);
                        if (layer + 1 == p.layers) p.result[at] = sum;
                    }
                }
                if (unit < units) meet();  // the sums' places are free again
            }
            note(op, 3);
        }
    }
    allow_next_kernel();
    // All blocks have announced ops of this step, so all have read the state.
    if (block == 0 && threadIdx.x == 0) p.state->layers = shared.epoch + p.layers;
    if (!p.trace) return;
    if (traced) shared.trace[OPS][1] = nanoseconds() - shared.started - shared.trace[OPS][0];
    meet();
    if (threadIdx.x < TRACE_ROWS * TRACED)
        p.trace[static_cast<size_t>(block) * TRACE_ROWS * TRACED + threadIdx.x] = (&shared.trace[0][0])[threadIdx.x];
}

template <int DENSE, int EXPERT, int KV> DEVICE void decode_one(const OneParams &params) {
    extern __shared__ __align__(128) uint8_t rings[];
    OneShared &shared = *reinterpret_cast<OneShared *>(rings + GEMV_WARPS * WARP_RING);
    if (threadIdx.x == 0) shared.started = nanoseconds();
    prepare<DENSE, EXPERT, KV>(params, shared);
    if (threadIdx.x < GEMV_THREADS) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COMPUTE_REGISTERS));
        compute<DENSE, EXPERT, KV>(shared, rings);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FEED_REGISTERS));
        if (threadIdx.x < ONE_THREADS) feed<KV, DENSE, EXPERT>(shared, rings);
    }
}

#define ONE(NAME, DENSE, EXPERT, KV_NAME, KV)                                                                          \
    extern "C" __global__ void __launch_bounds__(LAUNCH_THREADS, 1)                                               \
        decode_one_##NAME##_##KV_NAME(const __grid_constant__ OneParams p) { decode_one<DENSE, EXPERT, KV>(p); }

ONE(int4_g128_int4_g128, INT4_G128, INT4_G128, bf16, KV_BF16)
ONE(int4_g128_int4_g128, INT4_G128, INT4_G128, e4m3, KV_E4M3)
ONE(fp8_fp8, FP8, FP8_EXPERTS, bf16, KV_BF16)
ONE(fp8_fp8, FP8, FP8_EXPERTS, e4m3, KV_E4M3)
ONE(bf16_int4_g32, BF16, INT4_G32, bf16, KV_BF16)
ONE(bf16_int4_g32, BF16, INT4_G32, e4m3, KV_E4M3)
ONE(bf16_bf16, BF16, BF16, bf16, KV_BF16)
ONE(bf16_bf16, BF16, BF16, e4m3, KV_E4M3)

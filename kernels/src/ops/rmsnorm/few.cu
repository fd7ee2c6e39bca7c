// The rows of rmsnorm.cu of a decode step: a cluster of eight blocks a row, each with an eighth of its values, so that few rows and
// their many parts are read by many multiprocessors. Widths are multiples of 4.
#include "../../cuda/cluster.cuh"
#include "combine.cuh"

constexpr int SPREAD = 8, SPREAD_THREADS = 128, AHEAD = 12;

// Up to AHEAD arrays' four values at `at`, from array `first` on, on their way together; zeros past `count`.
DEVICE void load_arrays(const float *from, size_t stride, int first, int count, bool there, float4 (&v)[AHEAD]) {
#pragma unroll
    for (int a = 0; a < AHEAD; a++) v[a] = load_quad(from + (first + a) * stride, there && first + a < count);
}

// The same of BF16.
DEVICE void load_arrays_bf16(const uint16_t *from, size_t stride, int first, int count, bool there, float4 (&v)[AHEAD]) {
    uint2 pairs[AHEAD];
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
        pairs[a] = there && first + a < count ? *reinterpret_cast<const uint2 *>(from + (first + a) * stride) : make_uint2(0, 0);
#pragma unroll
    for (int a = 0; a < AHEAD; a++) v[a] = make_float4(bf16_low(pairs[a].x), bf16_high(pairs[a].x), bf16_low(pairs[a].y), bf16_high(pairs[a].y));
}

// x0 + x1 + .., in order.
struct AddParts {
    DEVICE void operator()(const NormRows &p, size_t at, int, int, bool there, float4 &v) const {
#pragma unroll 1
        for (int first = 0; first < p.input.more; first += AHEAD) {
            float4 more[AHEAD];
            if (p.bf16_parts)
                load_arrays_bf16(reinterpret_cast<const uint16_t *>(p.input.x1) + at, p.input.stride, first, p.input.more, there, more);
            else
                load_arrays(p.input.x1 + at, p.input.stride, first, p.input.more, there, more);
#pragma unroll
            for (int a = 0; a < AHEAD; a++) v.x += more[a].x, v.y += more[a].y, v.z += more[a].z, v.w += more[a].w;
        }
    }
};

// x0 + the weighted sum over the slots, in order.
struct AddSlots {
    const CombineRows &c;
    DEVICE void operator()(const NormRows &p, size_t, int row, int k, bool there, float4 &v) const {
        const float *weights = c.weights + static_cast<size_t>(row) * c.slots;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
        for (int first = 0; first < c.slots; first += AHEAD) {
            float4 y[AHEAD];
            float by[AHEAD];
            load_arrays(c.y + static_cast<size_t>(row) * c.slots * p.input.k + k, p.input.k, first, c.slots, there, y);
#pragma unroll
            for (int a = 0; a < AHEAD; a++) by[a] = first + a < c.slots ? weights[first + a] : 0.f;
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                sum.x = fmaf(by[a], y[a].x, sum.x), sum.y = fmaf(by[a], y[a].y, sum.y);
                sum.z = fmaf(by[a], y[a].z, sum.z), sum.w = fmaf(by[a], y[a].w, sum.w);
            }
        }
        v.x += sum.x, v.y += sum.y, v.z += sum.z, v.w += sum.w;
    }
};

template <int PASSES, class Add> DEVICE void norm_few(const NormRows &p, const Add &add) {
    __shared__ float squares[SPREAD], scratch[SPREAD_THREADS / WARP];
    cluster_arrive();
    // Quantised: a warp has the 128 values of a scale.
    const int row = blockIdx.x / SPREAD, rank = blockIdx.x % SPREAD, quads = p.padded / 4, unit = p.quantised ? WARP : 1;
    const int each = ceil_div(quads / unit, SPREAD) * unit;
    const int end = 4 * min((rank + 1) * each, quads);
    const auto place = [&](int i) { return 4 * (rank * each + static_cast<int>(threadIdx.x) + i * SPREAD_THREADS); };
    float4 w[PASSES], v[PASSES];
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
        const int k = place(i);
        w[i] = make_float4(1.f, 1.f, 1.f, 1.f);
        if (p.input.weight && k < min(end, p.input.k)) w[i] = __ldg(reinterpret_cast<const float4 *>(p.input.weight + k));
    }
    allow_next_kernel();  // early, see ptx.cuh
    wait_for_inputs();
    const size_t from = static_cast<size_t>(p.rows ? p.rows[row] : row) * p.input.k;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
        const int k = place(i);
        const bool there = k < min(end, p.input.k);
        v[i] = load_quad(p.input.x0 + from + k, there);
        add(p, from + k, row, k, there, v[i]);
        if (there && p.input.sum_out) *reinterpret_cast<float4 *>(p.input.sum_out + from + k) = v[i];
        sum += (v[i].x * v[i].x + v[i].y * v[i].y) + (v[i].z * v[i].z + v[i].w * v[i].w);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = sum;
    __syncthreads();
    cluster_wait();  // all blocks are there
    if (threadIdx.x < SPREAD) {
        sum = (scratch[0] + scratch[1]) + (scratch[2] + scratch[3]);
        store_in(in_block(shared_address(squares + rank), threadIdx.x), sum);
    }
    cluster_sync();
    sum = 0.f;
#pragma unroll
    for (int r = 0; r < SPREAD; r++) sum += squares[r];
    const float inverse = p.input.weight ? rsqrtf(sum / p.input.k + p.input.eps) : 1.f;
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
        const int k = place(i);
        if (k >= end) break;
        const float4 y = make_float4(v[i].x * inverse * w[i].x, v[i].y * inverse * w[i].y, v[i].z * inverse * w[i].z, v[i].w * inverse * w[i].w);
        if (p.normed && k < p.input.k) *reinterpret_cast<float4 *>(p.normed + static_cast<size_t>(row) * p.input.k + k) = y;
        if (p.plane) {
            *reinterpret_cast<uint32_t *>(p.plane + plane_offset(row, k, p.plane_blocks)) = pack_bf16(y.x, y.y);
            *reinterpret_cast<uint32_t *>(p.plane + plane_offset(row, k + 2, p.plane_blocks)) = pack_bf16(y.z, y.w);
        }
        if (p.quantised) {
            const QuantisedScale scale(warp_max(fmaxf(fmaxf(fabsf(y.x), fabsf(y.y)), fmaxf(fabsf(y.z), fabsf(y.w)))));
            *reinterpret_cast<uint32_t *>(p.quantised + quantised_offset(row, k, p.plane_blocks)) = scale.quantise(y.x, y.z, y.y, y.w);
            if (k % 128 == 0) *reinterpret_cast<float *>(p.quantised + quantised_scale(row, k / 128, p.padded / 128, p.plane_blocks)) = scale.scale;
        }
    }
}

// PASSES: of 4,096 values.
#define FEW(PASSES)                                                                                                    \
    extern "C" __global__ void __cluster_dims__(SPREAD) __launch_bounds__(SPREAD_THREADS)                              \
        norm_few_##PASSES(const __grid_constant__ NormRows p) { norm_few<PASSES>(p, AddParts()); }                     \
    extern "C" __global__ void __cluster_dims__(SPREAD) __launch_bounds__(SPREAD_THREADS)                              \
        combine_few_##PASSES(const __grid_constant__ CombineRows p) { norm_few<PASSES>(p.norm, AddSlots{p}); }
FEW(1)
FEW(2)

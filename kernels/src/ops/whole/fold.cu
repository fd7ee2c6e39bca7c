// The gate's weights times the output projection's, once a model: [experts, q_width], as a stream of F32.
//
// A layer's scores are G (w * (h + W_o a)) times the norm's factor: h the residual stream before the attention, a what the
// attention leaves, w the norm's weights. With F = G diag(w) W_o made here they are G (w * h) + F a, so that `one.cu` need not
// wait for the output projection before it multiplies. Sums are in F32, in the order of the projection's rows.
// Bytes: both weights once for each 128 experts or 64 inputs, which the second-level cache mostly serves.
#include "../../cuda/plane.cuh"
#include "../../cuda/stream.cuh"

constexpr int FOLD_THREADS = 256, FOLD_INPUTS = 64, FOLD_EXPERTS = 128;

struct FoldParams {
    const uint8_t *gate;    // F32 stream [experts, width]
    const float *norm;      // [width]
    const uint8_t *output;  // stream [width, q_width]
    uint8_t *folded;        // F32 stream [experts, q_width]
    int experts, width, q_width, bf16_scales;
};

// Where input `k` (0 to 63) of row `r` (0 to 15) lies in a chunk: see stream.cuh.
struct ChunkPlace {
    int lane, product, half, element, upper;
    __device__ __forceinline__ ChunkPlace(int r, int k)
        : lane(r % 8 * 4 + k % 32 / 8), product(2 * (k / 32) + k % 8 / 4), half(k % 4 / 2), element(k % 2), upper(r / 8) {}
};

DEVICE float bf16_at(const uint8_t *at) { return __uint_as_float(static_cast<uint32_t>(*reinterpret_cast<const uint16_t *>(at)) << 16); }

// One weight of a stream with `stages` stages a tile.
template <int F> DEVICE float weight_at(const uint8_t *stream, int stages, int row, int input, int bf16_scales) {
    const int r = row % TILE_ROWS;
    const uint8_t *stage = stream + (static_cast<size_t>(row / TILE_ROWS) * stages + input / Layout<F>::K) * Layout<F>::BYTES;
    if constexpr (F == INT4_G128) {
        const ChunkPlace at(r, input % 64);
        const int chunk = input % Layout<F>::K / 64;
        const uint32_t word = *reinterpret_cast<const uint32_t *>(stage + chunk * 512 + at.lane * 16 + at.product * 4);
        const int q = word >> (4 * (at.upper + 2 * at.half) + 16 * at.element) & 15, zero = stage[1024 + 32 + r];
        return static_cast<float>(q - zero) * scale_value(*reinterpret_cast<const uint16_t *>(stage + 1024 + 2 * r), bf16_scales);
    } else if constexpr (F == FP8) {
        const uint32_t byte = stage[r * 128 + (quantised_place(input % 128) ^ (r % PLANE_ROWS * 16))];
        const float v = __uint_as_float((byte & 0x80) << 24 | (byte & 0x7f) << 20) * 1.329227995784916e36f;
        return v * *reinterpret_cast<const float *>(stage + 2048);
    } else {
        const int inside = row_offset(r, input);
        const float high = bf16_at(stage + inside);
        return F == F32 ? high + bf16_at(stage + 2048 + inside) : high;
    }
}

// A block has 64 inputs and 128 experts, a thread 4 and 8 of them.
template <int F> DEVICE void fold_gate(const FoldParams &p) {
    __shared__ float output[TILE_ROWS][FOLD_INPUTS], gate[TILE_ROWS][FOLD_EXPERTS];
    const int input0 = blockIdx.x * FOLD_INPUTS, expert0 = blockIdx.y * FOLD_EXPERTS;
    const int mine = threadIdx.x % 16 * 4, experts = threadIdx.x / 16 * 8;
    float sum[8][4] = {};
    for (int row0 = 0; row0 < p.width; row0 += TILE_ROWS) {
        for (int i = threadIdx.x; i < TILE_ROWS * FOLD_INPUTS; i += FOLD_THREADS) {
            const int r = i / FOLD_INPUTS, k = i % FOLD_INPUTS;
            output[r][k] = weight_at<F>(p.output, p.q_width / Layout<F>::K, row0 + r, input0 + k, p.bf16_scales);
        }
        for (int i = threadIdx.x; i < TILE_ROWS * FOLD_EXPERTS; i += FOLD_THREADS) {
            const int e = i / TILE_ROWS, r = i % TILE_ROWS;
            gate[r][e] = expert0 + e < p.experts ? weight_at<F32>(p.gate, p.width / 64, expert0 + e, row0 + r, 0) * p.norm[row0 + r] : 0.f;
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < TILE_ROWS; r++) {
            const float4 w = *reinterpret_cast<const float4 *>(&output[r][mine]);
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const float g = gate[r][experts + e];
                sum[e][0] += g * w.x, sum[e][1] += g * w.y, sum[e][2] += g * w.z, sum[e][3] += g * w.w;
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int e = 0; e < 8; e++) {
        const int expert = expert0 + experts + e;
        if (expert >= p.experts) break;
        uint8_t *stage = p.folded + (static_cast<size_t>(expert / TILE_ROWS) * (p.q_width / 64) + blockIdx.x) * Layout<F32>::BYTES;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t high, low;
            split_bf16(sum[e][2 * half], sum[e][2 * half + 1], high, low);
            const int inside = row_offset(expert % TILE_ROWS, mine + 2 * half);
            *reinterpret_cast<uint32_t *>(stage + inside) = high;
            *reinterpret_cast<uint32_t *>(stage + 2048 + inside) = low;
        }
    }
}

#define FOLD(NAME, FORMAT)                                                                                             \
    extern "C" __global__ void __launch_bounds__(FOLD_THREADS) fold_gate_##NAME(const __grid_constant__ FoldParams p) { fold_gate<FORMAT>(p); }
FOLD(int4_g128, INT4_G128)
FOLD(fp8, FP8)
FOLD(bf16, BF16)

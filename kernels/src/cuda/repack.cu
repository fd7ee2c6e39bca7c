// Load time: rows as checkpoints store them become streams (stream.cuh), and dummy weights are made in place.
// Rows past `rows` and inputs past `k` are zeros (INT4: the zero point).
#include "plane.cuh"
#include "stream.cuh"

enum Order { ROWS = 0, BY_INPUTS = 1, BY_OUTPUTS = 2 };
enum ScaleType { SCALE_F32 = 0, SCALE_F16 = 1, SCALE_BF16 = 2 };

struct RepackParams {
    const uint8_t *data;    // 4 bits: as `order` says; FP8: [rows, k]; 16 and 32 bit: [rows, k]
    const uint8_t *scales;  // 4 bits: [rows, k / group], or by group; FP8: F32 [ceil(rows / 128), ceil(k / 128)]
    const uint8_t *zeros;   // 4 bits: [rows, k / group], or by group, packed; or null: 8
    uint8_t *stream;
    int *spoilt;            // becomes 1 if a value is not finite
    int rows, k, tiles, stages, group, bf16_scales;
    int row0;               // FP8 scales: row of the whole weight that data's row 0 is
    // Pieces along the inputs: the first one that data, scales and zeros have, and the stages that they make.
    int input0, stage0, stages_here;
    // 4 bits: ROWS: [rows, k / 2], low nibble first. BY_INPUTS (GPTQ): words [k / 8, rows], nibble n is input n of eight.
    // BY_OUTPUTS (AWQ): words [k, rows / 8], nibble n is output 0, 2, 4, 6, 1, 3, 5, 7 of eight. Their scales and zeros are
    // [k / group, rows], zeros packed across outputs in the same way, those of GPTQ in order.
    int order, scale_type;
    int zeros_less, unused;  // what is added to a stored zero point
};

// The input of a chunk that (lane column, product, register half, element) holds; see stream.cuh.
DEVICE int chunk_input(int column, int product, int half, int element) {
    return 32 * (product / 2) + 8 * column + 4 * (product % 2) + 2 * half + element;
}

// Nibble of an AWQ word that holds output `row`.
DEVICE int awq_nibble(int row) { return (row % 8) / 2 + 4 * (row % 2); }

DEVICE uint32_t nibble(const RepackParams &p, int row, int k) {
    if (row >= p.rows || k >= p.k) return p.zeros && row < p.rows ? 0 : 8;  // such inputs are zeros
    size_t byte;
    int odd;
    if (p.order == ROWS) {
        byte = static_cast<size_t>(row) * (p.k / 2) + k / 2, odd = k & 1;
    } else if (p.order == BY_INPUTS) {
        const int i = k - p.input0;
        byte = (static_cast<size_t>(i / 8) * p.rows + row) * 4 + i % 8 / 2, odd = i & 1;
    } else {
        const int n = awq_nibble(row);
        byte = (static_cast<size_t>(k - p.input0) * (p.rows / 8) + row / 8) * 4 + n / 2, odd = n & 1;
    }
    return odd ? p.data[byte] >> 4 : p.data[byte] & 15;
}

// Where a group's scale is, counted in scales.
DEVICE size_t scale_at(const RepackParams &p, int row, int k) {
    if (p.order == ROWS) return static_cast<size_t>(row) * (p.k / p.group) + k / p.group;
    return static_cast<size_t>(k / p.group - p.input0 / p.group) * p.rows + row;
}

DEVICE float scale_of(const RepackParams &p, size_t at) {
    if (p.scale_type == SCALE_F32) return reinterpret_cast<const float *>(p.scales)[at];
    const uint16_t bits = reinterpret_cast<const uint16_t *>(p.scales)[at];
    return p.scale_type == SCALE_F16 ? __half2float(__ushort_as_half(bits)) : __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

DEVICE uint8_t zero_of(const RepackParams &p, size_t at) {
    if (p.order == ROWS) return p.zeros[at];
    const int row = at % p.rows;
    const size_t word = at / p.rows * (p.rows / 8) + row / 8;
    const int n = p.order == BY_INPUTS ? row % 8 : awq_nibble(row);
    return (p.zeros[word * 4 + n / 2] >> (4 * (n & 1)) & 15) + p.zeros_less;
}

DEVICE uint16_t scale_bits(float v, int bf16) {
    return bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(v)) : __half_as_ushort(__float2half_rn(v));
}

// Whether one of two 16-bit values, or of four FP8 codes, is NaN or infinite.
template <int F> DEVICE bool is_spoilt(uint32_t word) {
    if constexpr (E4M3<F>) {
        const uint32_t full = word & 0x7f7f7f7fu;  // NaN is all of these bits
        return ((full + 0x01010101u) & 0x80808080u) != 0;
    } else {
        constexpr uint32_t EXPONENT = F == F16 ? 0x7c00u : 0x7f80u;
        return (word & EXPONENT) == EXPONENT || (word >> 16 & EXPONENT) == EXPONENT;
    }
}

// One warp a stage.
template <int F> DEVICE void repack(const RepackParams &p) {
    const size_t index = (static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x) / WARP;
    if (index >= static_cast<size_t>(p.tiles) * p.stages_here) return;
    const int tile = static_cast<int>(index / p.stages_here), stage = p.stage0 + static_cast<int>(index % p.stages_here);
    const int lane = threadIdx.x & 31, t = lane & 3, row = tile * TILE_ROWS + (lane >> 2), k0 = stage * Layout<F>::K;
    uint8_t *const begin = p.stream + tile * tile_bytes<F>(p.stages), *const to = begin + stage_offset<F>(stage);
    bool spoilt = false;
    if constexpr (F == INT4_G128 || F == INT4_G32) {
        for (int c = 0; c < 2; c++)
            for (int s = 0; s < 4; s++) {
                uint32_t word = 0;
                for (int i = 0; i < 4; i++)
                    for (int e = 0; e < 2; e++)
                        word |= nibble(p, row + (i & 1) * 8, k0 + c * 64 + chunk_input(t, s, i / 2, e)) << (4 * i + 16 * e);
                *reinterpret_cast<uint32_t *>(to + c * 512 + lane * 16 + s * 4) = word;
            }
        constexpr int GROUPS = 128 / Layout<F>::GROUP;
        for (int i = lane; i < GROUPS * TILE_ROWS; i += WARP) {
            const int g = i / TILE_ROWS, r = i % TILE_ROWS, k = k0 + g * Layout<F>::GROUP, of = tile * TILE_ROWS + r;
            const bool real = of < p.rows && k < p.k;
            const size_t at = real ? scale_at(p, of, k) : 0;
            const float scale = real ? scale_of(p, at) : 0.f;
            spoilt |= !isfinite(scale);
            *reinterpret_cast<uint16_t *>(to + 1024 + g * 48 + r * 2) = scale_bits(scale, p.bf16_scales);
            to[1024 + g * 48 + 32 + r] = real && p.zeros ? zero_of(p, at) : 8;
        }
    } else if constexpr (E4M3<F>) {
        const auto value = [&](int r, int k) -> uint32_t {
            return r < p.rows && k < p.k ? p.data[static_cast<size_t>(r) * p.k + k] : 0;
        };
        for (int s = 0; s < 8; s++)
            for (int upper = 0; upper < 2; upper++) {
                const int r = row + 8 * upper, k = k0 + s / 4 * 64 + chunk_input(t, s % 4, 0, 0);
                const uint32_t word = value(r, k) | value(r, k + 2) << 8 | value(r, k + 1) << 16 | value(r, k + 3) << 24;
                spoilt |= is_spoilt<F>(word);
                *reinterpret_cast<uint32_t *>(to + upper * 1024 + (lane >> 2) * 128 + ((s ^ (lane >> 2)) * 16) + t * 4) = word;
            }
        if (lane < 4) {
            const int blocks = ceil_div(p.k, 128), of = (p.row0 + tile * TILE_ROWS) / 128;
            const bool real = tile * TILE_ROWS < p.rows && stage < blocks;
            const float scale = real ? reinterpret_cast<const float *>(p.scales)[static_cast<size_t>(of) * blocks + stage] : 0.f;
            if constexpr (TRIOS<F>) {
                // A block of its own, and its place among the trio's.
                float *const own = reinterpret_cast<float *>(begin + scale_offset<F>(stage));
                if (stage % TRIO > 0) own[lane] = scale;
                if (lane == 0) reinterpret_cast<float *>(begin + scale_offset<F>(stage - stage % TRIO))[stage % TRIO] = scale;
            } else {
                *reinterpret_cast<float *>(to + 2048 + lane * 4) = scale;
            }
        }
    } else {
        for (int s = 0; s < 4; s++)
            for (int i = 0; i < 4; i++) {
                const int r = row + (i & 1) * 8, k = k0 + chunk_input(t, s, i / 2, 0), at = row_offset(r % TILE_ROWS, k);
                uint32_t high = 0, low = 0;
                if constexpr (F == F32) {
                    const float *data = reinterpret_cast<const float *>(p.data) + static_cast<size_t>(r) * p.k;
                    const float first = r < p.rows && k < p.k ? data[k] : 0.f, second = r < p.rows && k + 1 < p.k ? data[k + 1] : 0.f;
                    spoilt |= !isfinite(first) || !isfinite(second);
                    split_bf16(first, second, high, low);
                    *reinterpret_cast<uint32_t *>(to + 2048 + at) = low;
                } else {
                    const uint16_t *data = reinterpret_cast<const uint16_t *>(p.data) + static_cast<size_t>(r) * p.k;
                    if (r < p.rows && k < p.k) high = data[k];
                    if (r < p.rows && k + 1 < p.k) high |= static_cast<uint32_t>(data[k + 1]) << 16;
                    spoilt |= is_spoilt<F>(high);
                }
                *reinterpret_cast<uint32_t *>(to + at) = high;
            }
    }
    if (spoilt) *p.spoilt = 1;
}

#define REPACK(NAME, FORMAT)                                                                                           \
    extern "C" __global__ void repack_##NAME(const __grid_constant__ RepackParams p) { repack<FORMAT>(p); }
REPACK(int4_g128, INT4_G128)
REPACK(int4_g32, INT4_G32)
REPACK(fp8, FP8)
REPACK(fp8_experts, FP8_EXPERTS)
REPACK(bf16, BF16)
REPACK(f16, F16)
REPACK(f32, F32)

// ---- dummy weights ---------------------------------------------------------------------------------------------

struct DummyParams {
    uint8_t *stream;
    unsigned long long stages, seed;
    int format;
    float scale;  // standard deviation of the weights
};

DEVICE uint32_t mixed(unsigned long long seed, unsigned long long counter) {
    unsigned long long x = seed + counter * 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return static_cast<uint32_t>(x >> 32) ^ static_cast<uint32_t>(x);
}

// Uniform with the given standard deviation.
DEVICE float uniform_weight(uint32_t bits, float scale) { return ((bits >> 8) * (1.f / 8388608.f) - 1.f) * 1.7320508f * scale; }

// Random stages (FP8 of experts: trios); a warp each. INT4: every nibble, scale for a zero point of 8; FP8: every finite value below 2.
extern "C" __global__ void dummy_stream(const __grid_constant__ DummyParams p) {
    const int lane = threadIdx.x & 31;
    const bool int4 = p.format == INT4_G128 || p.format == INT4_G32;
    const int bytes = p.format == INT4_G128 ? Layout<INT4_G128>::BYTES : p.format == INT4_G32 ? Layout<INT4_G32>::BYTES
                      : p.format == FP8 ? Layout<FP8>::BYTES : p.format == FP8_EXPERTS ? TRIO_BYTES<FP8_EXPERTS> : p.format == F32 ? Layout<F32>::BYTES : Layout<BF16>::BYTES;
    constexpr int LINE = Layout<FP8_EXPERTS>::LINE;
    const unsigned long long warps = static_cast<unsigned long long>(gridDim.x) * blockDim.x / WARP;
    for (unsigned long long stage = (static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x) / WARP;
         stage < p.stages; stage += warps) {
        uint8_t *to = p.stream + stage * bytes;
        for (int at = lane * 4; at < bytes; at += WARP * 4) {
            unsigned long long counter = stage * 4096 + at;
            if (p.format == FP8_EXPERTS && at >= LINE) counter = (stage * TRIO + (at - LINE) / 2048) * 4096 + (at - LINE) % 2048;  // as in FP8
            uint32_t word = mixed(p.seed, counter);
            if (int4 && at < 1024) {
                // No nibble is 0: the rest is symmetric about the zero point, so that outputs have no common drift.
                const uint32_t zero = ~(word | word >> 1 | word >> 2 | word >> 3) & 0x11111111u;
                word |= zero << 3;
            } else if (int4) {
                const int inside = (at - 1024) % 48;
                const float s = p.scale / 4.6f * (0.75f + (word & 255) / 512.f);
                const uint32_t half = __half_as_ushort(__float2half_rn(s));
                word = inside < 32 ? half | half << 16 : 0x08080808u;
            } else if (p.format == FP8 || p.format == FP8_EXPERTS) {
                if (p.format == FP8 ? at >= 2048 : at < LINE)
                    word = __float_as_uint(p.scale);
                else
                    word &= 0xbfbfbfbfu;  // exponent below 8: magnitude below 2
            } else if (p.format == BF16 || p.format == F16 || p.format == F32) {
                const float a = uniform_weight(word, p.scale), b = uniform_weight(mixed(~p.seed, stage * 4096 + at), p.scale);
                word = p.format == F16 ? pack_f16(a, b) : p.format == F32 && at >= 2048 ? 0u : pack_bf16(a, b);
            }
            *reinterpret_cast<uint32_t *>(to + at) = word;
        }
    }
}

// A vector of ones plus noise (norm weights), or noise alone (biases).
extern "C" __global__ void dummy_vector(float *to, int count, float base, float noise, unsigned long long seed) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) to[i] = base + uniform_weight(mixed(seed, i), noise);
}

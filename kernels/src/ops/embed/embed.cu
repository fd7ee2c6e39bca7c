// hidden[t] = table[ids[t]]: a gather from the head's kind of stream.
#include "../../cuda/plane.cuh"
#include "../../cuda/stream.cuh"

constexpr uint32_t SAMPLED = 1u << 31;

struct EmbedParams {
    Weight table;
    int format;  // BF16, F16 or F32
    const uint32_t *ids;
    const uint32_t *sampled;  // tokens of the last sampling: for ids SAMPLED | row
    float *hidden;  // [tokens, width]
    int width;
};

constexpr int EMBED_THREADS = 512;

// Where the weight of (row, input) of a 16-bit stream lies, in bytes.
DEVICE size_t element_offset_16bit(int row, int input, int stages) {
    return (static_cast<size_t>(row / TILE_ROWS) * stages + input / 64) * Layout<BF16>::BYTES + row_offset(row % TILE_ROWS, input);
}

// A pair of neighbouring inputs is one word of the stream.
extern "C" __global__ void __launch_bounds__(EMBED_THREADS) embed(const __grid_constant__ EmbedParams p) {
    wait_for_inputs();
    allow_next_kernel();
    uint32_t id = p.ids[blockIdx.x];
    if (id & SAMPLED) id = p.sampled[id & ~SAMPLED];
    float *hidden = p.hidden + static_cast<size_t>(blockIdx.x) * p.width;
    const bool known = id < static_cast<uint32_t>(p.table.rows);  // ids are checked before: a NaN is seen, a fault is not
#pragma unroll 3
    for (int k = 2 * threadIdx.x; k < p.width; k += 2 * EMBED_THREADS) {
        float2 v = make_float2(NAN, NAN);
        if (known) {
            const size_t at = element_offset_16bit(id, k, p.table.stages);  // in a stream of 2048-byte stages
            if (p.format == F32) {
                const uint8_t *from = p.table.stream + at / 2048 * Layout<F32>::BYTES + at % 2048;
                const uint32_t high = *reinterpret_cast<const uint32_t *>(from);
                const uint32_t low = *reinterpret_cast<const uint32_t *>(from + 2048);
                v = make_float2(bf16_low(high) + bf16_low(low), bf16_high(high) + bf16_high(low));
            } else {
                const uint32_t bits = *reinterpret_cast<const uint32_t *>(p.table.stream + at);
                v = p.format == BF16 ? make_float2(bf16_low(bits), bf16_high(bits))
                                     : __half22float2(*reinterpret_cast<const __half2 *>(&bits));
            }
        }
        *reinterpret_cast<float2 *>(hidden + k) = v;
    }
}

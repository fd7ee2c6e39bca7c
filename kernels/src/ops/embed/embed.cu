// hidden[t] = table[ids[t]]: a gather from the head's kind of stream.
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

extern "C" __global__ void __launch_bounds__(256) embed(const __grid_constant__ EmbedParams p) {
    wait_for_inputs();
    allow_next_kernel();
    uint32_t id = p.ids[blockIdx.x];
    if (id & SAMPLED) id = p.sampled[id & ~SAMPLED];
    const int row = static_cast<int>(min(id, static_cast<uint32_t>(INT32_MAX)));
    float *hidden = p.hidden + static_cast<size_t>(blockIdx.x) * p.width;
    if (row >= p.table.rows) {  // ids are checked before they come here: a NaN is seen, a fault is not
        for (int k = threadIdx.x; k < p.width; k += blockDim.x) hidden[k] = NAN;
        return;
    }
    for (int k = threadIdx.x; k < p.width; k += blockDim.x) {
        if (p.format == F32) {
            const size_t at = element_offset_16bit(row, k, p.table.stages);  // in a stream of 2048-byte stages
            const size_t stage = at / 2048, inside = at % 2048;
            const uint8_t *from = p.table.stream + stage * Layout<F32>::BYTES + inside;
            const float high = __bfloat162float(*reinterpret_cast<const __nv_bfloat16 *>(from));
            hidden[k] = high + __bfloat162float(*reinterpret_cast<const __nv_bfloat16 *>(from + 2048));
        } else {
            const uint8_t *from = p.table.stream + element_offset_16bit(row, k, p.table.stages);
            hidden[k] = p.format == BF16 ? __bfloat162float(*reinterpret_cast<const __nv_bfloat16 *>(from))
                                         : __half2float(*reinterpret_cast<const __half *>(from));
        }
    }
}

// hidden[t] += sum over j of weights[t, j] * y[row of (t, j)], the results of many tokens' experts in their sorted rows as bf16;
// the slots in order. Bytes: 2 a value of each slot, 8 of the residual stream; all slots' loads of a thread are on their way
// together.
#include "../../cuda/ptx.cuh"

struct CombineSorted {
    float *hidden;                // [tokens, width]
    const __nv_bfloat16 *sorted;  // [sorted rows, width]
    const uint32_t *row_of_slot;  // [tokens, slots]
    const float *weights;         // [tokens, slots]
    int width, slots;             // width: a multiple of 8
};

constexpr int COMBINE_THREADS = 384, COMBINE_SLOTS = 8;

extern "C" __global__ void __launch_bounds__(COMBINE_THREADS) combine_sorted(const __grid_constant__ CombineSorted p) {
    wait_for_inputs();
    allow_next_kernel();
    const size_t slot = static_cast<size_t>(blockIdx.x) * p.slots;
    float *const row = p.hidden + static_cast<size_t>(blockIdx.x) * p.width;
    for (int k = 8 * threadIdx.x; k < p.width; k += 8 * blockDim.x) {
        float sum[8] = {};
        for (int first = 0; first < p.slots; first += COMBINE_SLOTS) {
            uint4 v[COMBINE_SLOTS];
            float weight[COMBINE_SLOTS];
#pragma unroll
            for (int j = 0; j < COMBINE_SLOTS; j++) {
                v[j] = make_uint4(0, 0, 0, 0), weight[j] = 0.f;
                if (first + j >= p.slots) continue;
                weight[j] = p.weights[slot + first + j];
                v[j] = *reinterpret_cast<const uint4 *>(p.sorted + static_cast<size_t>(p.row_of_slot[slot + first + j]) * p.width + k);
            }
#pragma unroll
            for (int j = 0; j < COMBINE_SLOTS; j++) {
                if (first + j >= p.slots) break;
                const uint32_t words[4] = {v[j].x, v[j].y, v[j].z, v[j].w};
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    sum[2 * i] = fmaf(weight[j], bf16_low(words[i]), sum[2 * i]);
                    sum[2 * i + 1] = fmaf(weight[j], bf16_high(words[i]), sum[2 * i + 1]);
                }
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float4 *const to = reinterpret_cast<float4 *>(row + k + 4 * half);
            float4 h = *to;
            h.x += sum[4 * half], h.y += sum[4 * half + 1], h.z += sum[4 * half + 2], h.w += sum[4 * half + 3];
            *to = h;
        }
    }
}

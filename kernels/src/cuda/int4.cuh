// INT4 with groups of 128 in the kernels of groups: a copy brings three stages, which are in registers before the next copy is asked for and are multiplied
// with their chains of products in turn. Sums are added stage by stage, as `multiply_stage` adds them: the same bits, whatever a group's number of rows.
#pragma once
#include "stream.cuh"

// Stages that are copied and multiplied together.
constexpr int INT4_TOGETHER = 3;

// acc += N stages of INT4 with groups of 128 times activations, their chains of products in turn. `x`, `tail`: addresses of the lane's own first input (of the other
// half of a stage's: 16 bytes beside it) and of its first token's tail. `released` is called once the stages are in registers.
template <int NT, int N, class Released>
DEVICE void multiply_bytes(uint32_t stage, uint32_t x, uint32_t tail, uint32_t token_bytes, int lane, int bf16_scales, float (&acc)[NT][4], const Released &released) {
    constexpr int BYTES = Layout<INT4_G128>::BYTES;
    const uint32_t scales = stage + 1024 + (lane >> 2) * 2, zeros = stage + 1056 + (lane >> 2);
    uint4 word[N][2];
    uint32_t scale[N][2];
    int zero[N][2];
    uint32_t all = 0;
#pragma unroll
    for (int s = 0; s < N; s++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            word[s][half] = load_shared16(stage + s * BYTES + half * 512 + lane * 16);
            scale[s][half] = load_shared_u16(scales + s * BYTES + half * 16), zero[s][half] = load_shared_u8(zeros + s * BYTES + half * 8);
            all ^= word[s][half].w ^ scale[s][half] ^ static_cast<uint32_t>(zero[s][half]);
        }
    await_loaded(all);
    released();
    // Of more than four tokens there are chains enough, and no registers for more.
    constexpr int TURN = NT == 1 ? N : 1;
#pragma unroll
    for (int first = 0; first < N; first += TURN) {
        int part[TURN][NT][4] = {};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint4 b[TURN][NT];
#pragma unroll
            for (int s = 0; s < TURN; s++)
#pragma unroll
                for (int n = 0; n < NT; n++) b[s][n] = load_shared16((half ? x ^ 16 : x) + (first + s) * IMAGE_BLOCK_BYTES<true> + n * 4 * token_bytes);
#pragma unroll
            for (int pair = 0; pair < 2; pair++)
#pragma unroll
                for (int s = 0; s < TURN; s++) {
                    const uint4 w = word[first + s][half];
                    const uint32_t low = pair ? w.z : w.x, high = pair ? w.w : w.y;
                    const uint32_t a[4] = {low & 0x0f0f0f0fu, low, high & 0x0f0f0f0fu, high};
#pragma unroll
                    for (int n = 0; n < NT; n++) mma_bytes(part[s][n], a, pair ? b[s][n].z : b[s][n].x, pair ? b[s][n].w : b[s][n].y);
                }
        }
#pragma unroll
        for (int s = 0; s < TURN; s++) {
            const int at = first + s;
            const float scale0 = scale_value(scale[at][0], bf16_scales), scale1 = scale_value(scale[at][1], bf16_scales);
#pragma unroll
            for (int n = 0; n < NT; n++) {
                const int2 scaled = load_shared8(tail + at * BLOCK_TAIL_BYTES + n * 4 * IMAGE_TAIL_BYTES);
                add_bytes(part[s][n], scaled.y, __int_as_float(scaled.x), scale0, scale1, zero[at][0], zero[at][1], acc[n]);
            }
        }
    }
}

// A run of INT4 with groups of 128, INT4_TOGETHER stages at a time; `x`, `tail`: of its first stage.
template <int NT, class Queue>
DEVICE void multiply_bytes_run(Queue &queue, uint32_t x, uint32_t tail, uint32_t token_bytes, int count, int lane, int bf16_scales, float (&acc)[NT][4]) {
    constexpr int BYTES = Layout<INT4_G128>::BYTES;
    const int column = lane >> 2, t = lane & 3, low = column & 1;
    x += (column >> 1) * token_bytes + low * 128 + ((t * 32) ^ (low * 16));
    tail += t * IMAGE_TAIL_BYTES;
#pragma unroll 1
    while (count > 0) {
        uint32_t stage = queue.front();
        if (count >= INT4_TOGETHER) {
            multiply_bytes<NT, INT4_TOGETHER>(stage, x, tail, token_bytes, lane, bf16_scales, acc, [&] { queue.pop(); });
            x += INT4_TOGETHER * IMAGE_BLOCK_BYTES<true>, tail += INT4_TOGETHER * BLOCK_TAIL_BYTES;
        } else {
#pragma unroll 1
            for (int i = 0; i < count; i++) {
                multiply_bytes<NT, 1>(stage, x, tail, token_bytes, lane, bf16_scales, acc, [] {});
                stage += BYTES, x += IMAGE_BLOCK_BYTES<true>, tail += BLOCK_TAIL_BYTES;
            }
            queue.pop();
        }
        count -= INT4_TOGETHER;
    }
}

// FP8 of experts in the kernels of groups: a copy brings a trio with its scales, which is in registers before the next copy is asked for and whose three chains of
// products take turns. The images are of F16 (image.cuh). Sums are added stage by stage: the same bits, whatever a group's number of rows.
#pragma once
#include "stream.cuh"

// How the images of a group lie: of up to 4 * NT rows as high and low parts, or, ROWS, of eight whose values are BF16, one part each.
template <int NT, bool ROWS> struct TrioImages {
    static constexpr int CHUNK = ROWS ? 128 : 256, STAGE = 2 * CHUNK;
    // Address of the lane's own inputs in the first chunk; the others of a chunk are 64 bytes beside them.
    static DEVICE uint32_t near(uint32_t x, uint32_t token_bytes, int lane) {
        const int column = lane >> 2, t = lane & 3, odd = column & 1;
        return x + (ROWS ? column * token_bytes : (column >> 1) * token_bytes + odd * 128) + ((t * 16) ^ (odd * 64));
    }
    // Of the lane's first step.
    static DEVICE uint32_t first_step(uint32_t steps, int lane) { return steps + (lane & 3) * (ROWS ? 8 : 4); }
};

// acc += N stages times activations. `near`, `steps`: the lane's own, of the first stage. `released` is called once the stages are in registers.
template <int NT, bool ROWS, int N, class Released>
DEVICE void multiply_trio(uint32_t stage, uint32_t near, uint32_t steps, uint32_t token_bytes, int lane, const float (&scale)[N], float (&acc)[NT][4], const Released &released) {
    using Images = TrioImages<NT, ROWS>;
    constexpr int BYTES = Layout<FP8_EXPERTS>::BYTES, QUARTERS = 4;
    // Of more than four rows there are chains enough, and no registers for more.
    constexpr int TURN = NT == 1 ? N : 1, AHEAD = NT == 1 ? 2 : 1;
#pragma unroll
    for (int first = 0; first < N; first += TURN) {
        uint4 word[TURN][QUARTERS], b[AHEAD][TURN][NT];  // b: a quarter of the stages' inputs, and the next one
        const auto load = [&](int i) {
#pragma unroll
            for (int s = 0; s < TURN; s++)
#pragma unroll
                for (int n = 0; n < NT; n++)
                    b[i % AHEAD][s][n] = load_shared16((i % 2 ? near ^ 64 : near) + (first + s) * Images::STAGE + i / 2 * Images::CHUNK + n * 4 * token_bytes);
        };
#pragma unroll
        for (int s = 0; s < TURN; s++)
#pragma unroll
            for (int i = 0; i < QUARTERS; i++) word[s][i] = load_rows(stage + (first + s) * BYTES, i, lane);
        if (AHEAD > 1) load(0);
        uint32_t all = __float_as_uint(scale[first]);
#pragma unroll
        for (int s = 0; s < TURN; s++)
#pragma unroll
            for (int i = 0; i < QUARTERS; i++) all ^= word[s][i].w;
        await_loaded(all);
        if (first + TURN == N) released();
        float part[TURN][NT][4] = {};
#pragma unroll
        for (int i = 0; i < QUARTERS; i++) {
            if (AHEAD == 1)
                load(i);
            else if (i + 1 < QUARTERS)
                load(i + 1);
#pragma unroll
            for (int pair = 0; pair < 2; pair++)
#pragma unroll
                for (int s = 0; s < TURN; s++) {
                    const uint4 w = word[s][i];
                    uint32_t a[4];
                    e4m3_to_f16(pair ? w.z : w.x, a[0], a[2]);
                    e4m3_to_f16(pair ? w.w : w.y, a[1], a[3]);
#pragma unroll
                    for (int n = 0; n < NT; n++) {
                        const uint4 x = b[i % AHEAD][s][n];
                        mma_f16(part[s][n], a, pair ? x.z : x.x, pair ? x.w : x.y);
                    }
                }
        }
#pragma unroll
        for (int s = 0; s < TURN; s++) {
            const uint32_t at = steps + (first + s) * IMAGE_TAIL_BYTES;
            if constexpr (ROWS) {
                const int2 two = load_shared8(at);
                const float even = scale[first + s] * __int_as_float(two.x), odd = scale[first + s] * __int_as_float(two.y);
#pragma unroll
                for (int i = 0; i < 4; i++) acc[0][i] += (i % 2 ? odd : even) * part[s][0][i];
            } else {
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    const float by = scale[first + s] * load_shared_f32(at + n * 16);
                    acc[n][0] += by * (part[s][n][0] + part[s][n][1]);
                    acc[n][2] += by * (part[s][n][2] + part[s][n][3]);
                }
            }
        }
    }
}

// A run, a trio at a time; `x`, `steps`: of its first stage.
template <int NT, bool ROWS, class Queue>
DEVICE void multiply_trios(Queue &queue, uint32_t x, uint32_t steps, uint32_t token_bytes, int count, int lane, float (&acc)[NT][4]) {
    using Images = TrioImages<NT, ROWS>;
    uint32_t near = Images::near(x, token_bytes, lane);
    steps = Images::first_step(steps, lane);
#pragma unroll 1
    while (count > 0) {
        uint32_t stage = queue.front();
        const uint4 scales = load_shared16(stage - SCALE_BLOCK);
        if (count >= TRIO) {
            const float three[TRIO] = {__uint_as_float(scales.x), __uint_as_float(scales.y), __uint_as_float(scales.z)};
            multiply_trio<NT, ROWS, TRIO>(stage, near, steps, token_bytes, lane, three, acc, [&] { queue.pop(); });
            near += TRIO * Images::STAGE, steps += TRIO * IMAGE_TAIL_BYTES;
        } else {
#pragma unroll 1
            for (int i = 0; i < count; i++) {
                const float one[1] = {__uint_as_float(i ? scales.y : scales.x)};
                multiply_trio<NT, ROWS, 1>(stage, near, steps, token_bytes, lane, one, acc, [] {});
                stage += Layout<FP8_EXPERTS>::BYTES, near += Images::STAGE, steps += IMAGE_TAIL_BYTES;
            }
            queue.pop();
        }
        count -= TRIO;
    }
}

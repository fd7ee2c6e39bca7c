// The slots of a row of many tokens that are for experts here, and their weighted sum: what travels back to the row's owner.
#pragma once
#include "../ptx.cuh"

// Lane j < k has slot j's sorted row or ABSENT, and its weight; all lanes which slots there are.
struct RowSlots {
    uint32_t sorted;
    float weight;
    unsigned present;
};

// `rows` and `weights`: [k], of the row. By a whole warp.
DEVICE RowSlots slots_of(const uint32_t *rows, const float *weights, int k, int lane) {
    RowSlots slots{0xffffffffu, 0.f, 0};
    if (lane < k) slots.sorted = rows[lane], slots.weight = weights[lane];
    slots.present = __ballot_sync(ALL_LANES, slots.sorted != 0xffffffffu);
    return slots;
}

// The weighted sum of unit `u`'s eight values of those slots, in the order of slots, rounded to BF16. By whole warps; beyond
// the `hidden` values of a row it is zero.
DEVICE uint4 sum_slots(const RowSlots &slots, const __nv_bfloat16 *sorted, int hidden, int u) {
    constexpr int AHEAD = 4;
    float sum[8] = {};
    for (unsigned rest = slots.present; rest;) {
        uint4 v[AHEAD];
        float w[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const int slot = rest ? __ffs(rest) - 1 : 0;
            const size_t from = static_cast<size_t>(__shfl_sync(ALL_LANES, slots.sorted, slot)) * hidden;
            w[a] = __shfl_sync(ALL_LANES, slots.weight, slot);
            v[a] = make_uint4(0, 0, 0, 0);
            if (rest && u * 8 < hidden) v[a] = __ldg(reinterpret_cast<const uint4 *>(sorted + from + u * 8));
            rest &= rest - 1;
        }
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const uint32_t words[4] = {v[a].x, v[a].y, v[a].z, v[a].w};
#pragma unroll
            for (int e = 0; e < 4; e++) {
                sum[2 * e] = fmaf(w[a], bf16_low(words[e]), sum[2 * e]);
                sum[2 * e + 1] = fmaf(w[a], bf16_high(words[e]), sum[2 * e + 1]);
            }
        }
    }
    return make_uint4(pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]), pack_bf16(sum[4], sum[5]), pack_bf16(sum[6], sum[7]));
}

// sum += eight values of a row that came back.
DEVICE void add_eight(float (&sum)[8], const uint4 &v) {
    sum[0] += bf16_low(v.x), sum[1] += bf16_high(v.x), sum[2] += bf16_low(v.y), sum[3] += bf16_high(v.y);
    sum[4] += bf16_low(v.z), sum[5] += bf16_high(v.z), sum[6] += bf16_low(v.w), sum[7] += bf16_high(v.w);
}

// Which units of which groups a block of the kernels of groups works on: neighbours, as many as make equal shares of the time.
#pragma once
#include "experts.cuh"

// Units of groups of more than four rows take p.heavy / EVEN of the time of others.
constexpr int EVEN = 16;

struct ShareMemory {
    uint32_t heavy[GEMV_WARPS];
    int begin, end;
};

struct Share {
    int begin, end;  // units
    int group, unit;  // of the first one: its group, and its number there
    int last;         // the last unit's group

    // In equal numbers.
    DEVICE void split(int count, int units_per_group) {
        const unsigned units = count * units_per_group;  // times the blocks: far from 2^32
        set(units * blockIdx.x / gridDim.x, units * (blockIdx.x + 1) / gridDim.x, units_per_group);
    }

    DEVICE void set(int from, int to, int units_per_group) {
        begin = from, end = to;
        group = from / units_per_group, unit = from % units_per_group, last = (to - 1) / units_per_group;
    }

    // In shares of equal time, of at most GEMV_THREADS groups; `rows`: of the group of the thread's own number, 0 behind the last one. A group has at least
    // gridDim.x / EVEN units: no share is without a part of time, or nobody would say where the first one ends.
    DEVICE void split_by_time(ShareMemory &s, int rows, int count, int units_per_group, int heavy) {
        const int warp = threadIdx.x / WARP, lane = threadIdx.x & 31, mine = threadIdx.x;
        const uint32_t votes = __ballot_sync(ALL_LANES, rows > 4);
        if (lane == 0) s.heavy[warp] = __popc(votes);
        __syncthreads();
        int before = 0, all = 0;
#pragma unroll
        for (int w = 0; w < GEMV_WARPS; w++) {
            const int n = s.heavy[w];
            before += w < warp ? n : 0, all += n;
        }
        before += __popc(votes & ((1u << lane) - 1));
        const unsigned total = (count * EVEN + all * (heavy - EVEN)) * units_per_group;  // likewise
        const unsigned each = rows > 4 ? heavy : EVEN, from = (mine * EVEN + before * (heavy - EVEN)) * units_per_group, to = from + each * units_per_group;
        const unsigned mark = total * blockIdx.x / gridDim.x, next = total * (blockIdx.x + 1) / gridDim.x;
        if (mine < count && mark >= from && mark < to) s.begin = mine * units_per_group + ceil_div(mark - from, each);
        if (mine < count && next > from && next <= to) s.end = mine * units_per_group + ceil_div(next - from, each);
        __syncthreads();
        set(s.begin, s.end, units_per_group);
    }

    // By the whole block; leaves its groups at `listed`, which is moved so that they have their own numbers there. Ends with a barrier.
    DEVICE void take(const ExpertParams &p, ShareMemory &s, int units_per_group, Group *&listed) {
        const int mine = threadIdx.x;
        const int4 *groups = reinterpret_cast<const int4 *>(p.groups.group);
        // Most groups are requested with their number, not after it.
        const int4 early = mine < p.most ? __ldcg(groups + mine) : make_int4(0, 0, 0, 0);
        const int count = __ldcg(p.groups.count);
        const int rows = mine < count ? early.z : 0;
        if (p.heavy && count <= GEMV_THREADS && __syncthreads_or(rows > 4))
            split_by_time(s, rows, count, units_per_group, p.heavy);
        else
            split(count, units_per_group);
        int4 *to = reinterpret_cast<int4 *>(listed);
        if (mine >= group && mine <= last) to[mine - group] = early;
        for (int i = mine + GEMV_THREADS; i <= last; i += GEMV_THREADS)
            if (i >= group) to[i - group] = __ldcg(groups + i);
        listed -= group;
        __syncthreads();
    }
};

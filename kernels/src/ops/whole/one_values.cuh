// How blocks of `one.cu` leave values for each other without meeting.
//
// The last bit of a value's mantissa says in which layer it was written: it changes from layer to layer, steps included
// (`OneState`). Readers see it as 0, so that results do not depend on it. Each value has one place and is written once a layer;
// who needs it reads until the bit is right. So no fence stands between a value and its readers; a counter only tells them when
// it is worth while to look, because reads by all blocks of all that they wait for would crowd the cache. A place may be
// written again because its writer has waited until all blocks had announced a later op, which they do when they have read all
// that it needs.
#pragma once
#include "one.cuh"

DEVICE void publish(float *to, float v, uint32_t turn) {
    const uint32_t bits = (__float_as_uint(v) & ~1u) | turn;
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(bits) : "memory");
}

DEVICE uint32_t peek(const void *from) {
    uint32_t v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}

DEVICE uint4 peek_quad(const float *from) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
    return v;
}

DEVICE uint2 peek_pair(const void *from) {
    uint2 v;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from) : "memory");
    return v;
}

// An address that is made once, and not again for each load of what lies behind it.
template <class T> DEVICE void hold(const T *&base) { asm("" : "+l"(base)); }
template <class T> DEVICE const T *behind(const T *base, uint32_t count) {
    return reinterpret_cast<const T *>(reinterpret_cast<uint64_t>(base) + static_cast<uint64_t>(count * static_cast<uint32_t>(sizeof(T))));
}

// A value read in its turn: as it was published, but for the last bit, which is 0 if it is there.
DEVICE uint4 turned_quad(uint4 v, uint32_t turn) { return make_uint4(v.x ^ turn, v.y ^ turn, v.z ^ turn, v.w ^ turn); }

DEVICE float4 as_floats(uint4 v) {
    return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}

// Of bits that were put together: said once for all of them, or the compiler asks for each.
DEVICE bool none_set(uint32_t bits) {
    asm("" : "+r"(bits));
    return bits == 0;
}

// v[i] = the quad at offset `at(i)`, once all of them are there. `check`: 0 for memory without turns. All loads are on their
// way together: so there are no conditions, and what is not needed is read twice instead.
template <int N, class At> DEVICE void receive(float4 (&v)[N], const float *from, uint32_t turn, uint32_t check, const At &at) {
    uint4 got[N];
    hold(from);
    while (true) {
#pragma unroll
        for (int i = 0; i < N; i++) got[i] = peek_quad(behind(from, at(i)));
        uint32_t wrong = 0;
#pragma unroll
        for (int i = 0; i < N; i++) {
            got[i] = turned_quad(got[i], turn & check);
            wrong |= got[i].x | got[i].y | got[i].z | got[i].w;
        }
        if (none_set(wrong & check)) break;
    }
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = as_floats(got[i]);
}

// All computing warps of the block.
DEVICE void meet() { asm volatile("bar.sync 1, %0;" ::"n"(GEMV_THREADS) : "memory"); }

// Says that this block has made all products of an op, and has read all that it needs for it: what it makes follows. A hint
// for others when to look, not a promise. By one thread.
DEVICE void announce(const OneParams &p, int op) {
    asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(p.announced + op * LINE_WORDS) : "memory");
}

constexpr int LISTENER = GEMV_THREADS - WARP;  // a thread

// Until all blocks have announced an op of layer `epoch`. By one thread of a block: more would crowd the counter's place.
DEVICE void listen(const OneParams &p, int op, unsigned epoch) {
    const unsigned target = epoch * gridDim.x;
    while (static_cast<int>(peek(p.announced + op * LINE_WORDS) - target) < 0) {}
}

// The same for all computing warps.
DEVICE void listen_together(const OneParams &p, int op, unsigned epoch) {
    if (thread_here() == LISTENER) listen(p, op, epoch);
    meet();
}

// The instructions that C++ has no word for: tensor-core products, shared-memory matrix loads, bulk copies with
// their barriers, and dependent launch. Every kernel includes this; nothing here knows a layout.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#define DEVICE __device__ __forceinline__

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// ---- dependent launch -------------------------------------------------------------------------------------------

// Every kernel calls wait_for_inputs, then allow_next_kernel, once each. So when a kernel starts, the one before it has
// passed its own wait: all kernels before that one have ended. Before its wait a kernel may read weights and what was
// written by the kernel before last or earlier (past the first-level cache, __ldcg); it writes nothing.
// Small kernels of decode steps (rope_few, norm_few, combine_few) allow the next one before they wait, so that it is there and has asked
// for what it knows when they end. What follows one of them may read only weights and what is older by one kernel than said above:
// attention reads the step's plan and page tables, which lie further back.

// Everything that the kernels before this one wrote is visible after this.
DEVICE void wait_for_inputs() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The next kernel may be brought onto the device; it still waits for this one to end before it goes on.
DEVICE void allow_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- shared memory addresses, barriers and bulk copies -----------------------------------------------------------

DEVICE uint32_t shared_address(const void *p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

DEVICE void barrier_init(uint32_t barrier, unsigned arrivals) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory"); }
DEVICE void barrier_init(uint64_t *barrier, unsigned arrivals) { barrier_init(shared_address(barrier), arrivals); }

// After barrier_init and before another thread or the copy engine uses the barrier.
DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void barrier_expect(uint64_t *barrier, uint32_t bytes) { barrier_expect(shared_address(barrier), bytes); }

DEVICE void barrier_arrive(uint32_t barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
DEVICE void barrier_arrive(uint64_t *barrier) { barrier_arrive(shared_address(barrier)); }

DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}
DEVICE void barrier_wait(uint64_t *barrier, uint32_t parity) { barrier_wait(shared_address(barrier), parity); }

// All THREADS threads of the block meet, from wherever their warps are.
template <int THREADS> DEVICE void block_barrier() { asm volatile("barrier.sync 1, %0;" ::"n"(THREADS) : "memory"); }

// Addresses and size are multiples of 16.
DEVICE void bulk_copy(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
DEVICE void bulk_copy(void *to, const void *from, uint32_t bytes, uint64_t *barrier) {
    bulk_copy(shared_address(to), from, bytes, shared_address(barrier));
}

// For copies of data that is read once: it leaves the L2 first.
DEVICE uint64_t evict_first_policy() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// `bulk_copy` with such a policy.
DEVICE void bulk_copy_once(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier, uint64_t policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to), "l"(from), "r"(bytes),
                 "r"(barrier), "l"(policy)
                 : "memory");
}

// Shared memory written by ordinary stores becomes visible to tensor cores (wgmma) and the copy engine.
DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- loads ------------------------------------------------------------------------------------------------------

DEVICE uint4 load_shared16(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}

DEVICE int2 load_shared8(uint32_t address) {
    int2 v;
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
    return v;
}

DEVICE uint32_t load_shared_u16(uint32_t address) {
    uint32_t v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}

DEVICE int load_shared_u8(uint32_t address) {
    int v;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}

DEVICE float load_shared_f32(uint32_t address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address));
    return v;
}

// Adds four results where they lie.
DEVICE void add_results(float *to, float4 v) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

DEVICE void add_results(float *to, uint4 v) {
    add_results(to, make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)));
}

DEVICE void load_matrix4(uint32_t (&m)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address)
                 : "memory");
}

DEVICE void load_matrix4_transposed(uint32_t (&m)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address)
                 : "memory");
}

// The four 8x8 matrices of 16-bit values whose rows the lanes' addresses name, eight lanes a matrix; lane l has row l / 4's pair l % 4 of each.
DEVICE void store_matrix4(uint32_t address, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(m0), "r"(m1), "r"(m2), "r"(m3) : "memory");
}

// The same of each matrix turned: the addresses name its columns.
DEVICE void store_matrix4_transposed(uint32_t address, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(m0), "r"(m1), "r"(m2), "r"(m3) : "memory");
}

DEVICE void store_shared8(uint32_t address, float a, float b) { asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(a), "f"(b) : "memory"); }

// ---- tensor cores: D[16,8] += A[16,16] B[16,8] ---------------------------------------------------------------------
// Lane l holds, with g = l / 4 and t = l % 4:  A: (g, 2t..), (g+8, 2t..), (g, 2t+8..), (g+8, 2t+8..)
//                                              B: (2t.., g), (2t+8.., g)     D: (g, 2t..), (g+8, 2t..)

DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// D[16,8] += A[16,32] B[32,8], unsigned times signed bytes: A: (g, 4t..), (g+8, 4t..), (g, 4t+16..), (g+8, 4t+16..)
DEVICE void mma_bytes(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- numbers ----------------------------------------------------------------------------------------------------

DEVICE uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&v);
}

DEVICE uint32_t pack_f16(float low, float high) {
    __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&v);
}

DEVICE float bf16_low(uint32_t v) { return __uint_as_float(v << 16); }
DEVICE float bf16_high(uint32_t v) { return __uint_as_float(v & 0xffff0000u); }

// x = high + low with 16 bits of mantissa: two bf16 products give an almost-f32 one.
DEVICE void split_bf16(float x0, float x1, uint32_t &high, uint32_t &low) {
    high = pack_bf16(x0, x1);
    low = pack_bf16(x0 - bf16_low(high), x1 - bf16_high(high));
}

DEVICE void split_f16(float x0, float x1, uint32_t &high, uint32_t &low) {
    __half2 h = __floats2half2_rn(x0, x1);
    high = *reinterpret_cast<uint32_t *>(&h);
    low = pack_f16(x0 - __low2float(h), x1 - __high2float(h));
}

// ---- warps ------------------------------------------------------------------------------------------------------

DEVICE float warp_sum(float v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(ALL_LANES, v, offset);
    return v;
}

DEVICE float warp_max(float v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, offset));
    return v;
}

// Sum over the block in a fixed order; every thread gets it. `scratch` holds one float per warp.
DEVICE float block_sum(float v, float *scratch) {
    v = warp_sum(v);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x / WARP] = v;
    __syncthreads();
    float sum = 0.f;
    for (int w = 0; w < static_cast<int>(blockDim.x / WARP); w++) sum += scratch[w];
    return sum;
}

template <class T> DEVICE T ceil_div(T a, T b) { return (a + b - 1) / b; }

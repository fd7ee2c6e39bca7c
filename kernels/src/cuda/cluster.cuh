// Blocks that run together and reach each other's shared memory: a cluster.
#pragma once
#include "ptx.cuh"

DEVICE uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// All threads of all blocks of the cluster meet; what they wrote to shared memory before is visible after.
DEVICE void cluster_sync() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same in two steps, for what others need not see: that all blocks run.
DEVICE void cluster_arrive() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
DEVICE void cluster_wait() {
    __syncwarp();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The place in block `rank` of what lies at `address` in this one.
DEVICE uint32_t in_block(uint32_t address, uint32_t rank) {
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

// To a place in another block, as `in_block` gives it.
DEVICE void store_in(uint32_t place, float v) { asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(place), "f"(v) : "memory"); }
DEVICE void store_in(uint32_t place, float2 v) {
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(place), "f"(v.x), "f"(v.y) : "memory");
}

// The same, counted by a barrier of that block as four bytes that it expects.
DEVICE void store_counted_in(uint32_t place, float v, uint32_t barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(place), "f"(v), "r"(barrier) : "memory");
}

// `barrier`: as `in_block` gives it.
DEVICE void barrier_arrive_in(uint32_t barrier) { asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory"); }


// A bulk copy to the same place in every block whose bit is set in `blocks`; each block's barrier at that place gets its bytes.
DEVICE void bulk_copy_to(uint16_t blocks, uint32_t to, const void *from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(to), "l"(from),
                 "r"(bytes), "r"(barrier), "h"(blocks)
                 : "memory");
}
DEVICE void bulk_copy_to(uint16_t blocks, void *to, const void *from, uint32_t bytes, uint64_t *barrier) {
    bulk_copy_to(blocks, shared_address(to), from, bytes, shared_address(barrier));
}

// Attention of up to four decode tokens, made from what the projections leave: two small blocks a multiprocessor, one of which fits beside a block
// of the projection that runs before it.
#define DECODE_HELD_WARPS 4
#define DECODE_RING 16384
#define DECODE_MAKES_QUERIES true
#include "decode_body.cuh"

#define DECODE(NAME, KV, HD)                                                                                           \
    extern "C" __global__ void __launch_bounds__(DECODE_THREADS, 2)                                                    \
        attention_decode_inline_##NAME##_##HD(const __grid_constant__ AttentionParams p) { attention_decode<KV, HD>(p); }

KV_KERNELS(DECODE)

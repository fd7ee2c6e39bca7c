// Attention of few tokens whose queries and newest keys the kernel before it leaves, BF16 keys: one block a multiprocessor.
#include "decode_body.cuh"

#define DECODE(NAME, KV, HD)                                                                                           \
    extern "C" __global__ void __launch_bounds__(DECODE_THREADS, 1)                                                    \
        attention_decode_##NAME##_##HD(const __grid_constant__ AttentionParams p) { attention_decode<KV, HD>(p); }

DECODE(bf16, KV_BF16, 128)
DECODE(bf16, KV_BF16, 64)

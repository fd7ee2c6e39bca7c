// The same for FP8 keys, which take as long to convert as to copy: two small blocks a multiprocessor, one of which multiplies while the other one's
// warps meet.
#define DECODE_HELD_WARPS 4
#define DECODE_RING 16384
#define DECODE_MAKES_QUERIES false
#include "decode_body.cuh"

#define DECODE(NAME, KV, HD)                                                                                           \
    extern "C" __global__ void __launch_bounds__(DECODE_THREADS, 2)                                                    \
        attention_decode_##NAME##_##HD(const __grid_constant__ AttentionParams p) { attention_decode<KV, HD>(p); }

FP8_KV_KERNELS(DECODE)

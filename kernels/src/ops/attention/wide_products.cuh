// Attention's warpgroup products, 64 x 128, of BF16 (keys and values as they lie) or F16 (converted FP8).
#pragma once
#include "../../cuda/wgmma.cuh"
#include "../../cuda/wgmma_lists.cuh"

template <bool F16> struct WideProducts;

// `from_shared`: D = A B (+ D if `add`), A and B both K-major in shared memory. `from_registers`: D += A B, A in registers, B in
// shared memory, its rows (the K index) holding the N index contiguously.
#define WIDE_PRODUCTS(is_f16, type)                                                                                             \
    template <> struct WideProducts<is_f16> {                                                                                   \
        static __device__ __forceinline__ void from_shared(float (&d)[64], uint64_t a, uint64_t b, bool add) {                  \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                          \
                         "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" WGMMA_NAMES_64                       \
                         "}, %64, %65, p, 1, 1, 0, 0;\n}\n"                                                                     \
                         : WGMMA_SUMS_64                                                                                        \
                         : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                                         \
        }                                                                                                                       \
        static __device__ __forceinline__ void from_registers(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {             \
            asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" WGMMA_NAMES_64                       \
                         "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                                            \
                         : WGMMA_SUMS_64                                                                                        \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                 \
        }                                                                                                                       \
    };
WIDE_PRODUCTS(false, "bf16")
WIDE_PRODUCTS(true, "f16")
#undef WIDE_PRODUCTS

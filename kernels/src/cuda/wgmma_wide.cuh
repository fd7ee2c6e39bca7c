// Warpgroup products 64 x up to 256 with the weights in registers: D[64, N] += A[64, 16] B[16, N], where N is a multiple of 32 and D the first N / 2
// of 128 registers. See wgmma.cuh.
#pragma once
#include "wgmma.cuh"

constexpr int WIDE_SUMS = 128;

template <int N> struct WideProduct;

// The instruction names every register, so lists grow by sixteen: the sums' names in the text, and the sums themselves.
#define WIDE_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WIDE_NAMES_32 WIDE_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WIDE_NAMES_48 WIDE_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WIDE_NAMES_64 WIDE_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WIDE_NAMES_80 WIDE_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define WIDE_NAMES_96 WIDE_NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WIDE_NAMES_112 WIDE_NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define WIDE_NAMES_128 WIDE_NAMES_112 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WIDE_FOUR(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define WIDE_SIXTEEN(i) WIDE_FOUR(i), WIDE_FOUR((i) + 4), WIDE_FOUR((i) + 8), WIDE_FOUR((i) + 12)
#define WIDE_SUMS_16 WIDE_SIXTEEN(0)
#define WIDE_SUMS_32 WIDE_SUMS_16, WIDE_SIXTEEN(16)
#define WIDE_SUMS_48 WIDE_SUMS_32, WIDE_SIXTEEN(32)
#define WIDE_SUMS_64 WIDE_SUMS_48, WIDE_SIXTEEN(48)
#define WIDE_SUMS_80 WIDE_SUMS_64, WIDE_SIXTEEN(64)
#define WIDE_SUMS_96 WIDE_SUMS_80, WIDE_SIXTEEN(80)
#define WIDE_SUMS_112 WIDE_SUMS_96, WIDE_SIXTEEN(96)
#define WIDE_SUMS_128 WIDE_SUMS_112, WIDE_SIXTEEN(112)

#define WIDE_PRODUCT(n, names, sums, weights_and_tokens)                                                                        \
    template <> struct WideProduct<n> {                                                                                         \
        static __device__ __forceinline__ void run(float (&d)[WIDE_SUMS], const uint32_t (&a)[4], uint64_t b) {                 \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" names "}, " weights_and_tokens            \
                         ", 1, 1, 1, 0;"                                                                                        \
                         : sums                                                                                                 \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                 \
        }                                                                                                                       \
    };

WIDE_PRODUCT(32, WIDE_NAMES_16, WIDE_SUMS_16, "{%16, %17, %18, %19}, %20")
WIDE_PRODUCT(64, WIDE_NAMES_32, WIDE_SUMS_32, "{%32, %33, %34, %35}, %36")
WIDE_PRODUCT(96, WIDE_NAMES_48, WIDE_SUMS_48, "{%48, %49, %50, %51}, %52")
WIDE_PRODUCT(128, WIDE_NAMES_64, WIDE_SUMS_64, "{%64, %65, %66, %67}, %68")
WIDE_PRODUCT(160, WIDE_NAMES_80, WIDE_SUMS_80, "{%80, %81, %82, %83}, %84")
WIDE_PRODUCT(192, WIDE_NAMES_96, WIDE_SUMS_96, "{%96, %97, %98, %99}, %100")
WIDE_PRODUCT(224, WIDE_NAMES_112, WIDE_SUMS_112, "{%112, %113, %114, %115}, %116")
WIDE_PRODUCT(256, WIDE_NAMES_128, WIDE_SUMS_128, "{%128, %129, %130, %131}, %132")

#undef WIDE_PRODUCT

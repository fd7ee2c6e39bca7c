// Lists of registers for the text and the operands of a wgmma instruction whose sums are `d`.
#pragma once

// The instruction names every register, so lists grow by sixteen: the sums' names in the text, and the sums themselves.
#define WGMMA_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_NAMES_32 WGMMA_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_NAMES_48 WGMMA_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_NAMES_64 WGMMA_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_NAMES_80 WGMMA_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_NAMES_96 WGMMA_NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_NAMES_100 WGMMA_NAMES_96 ", %96, %97, %98, %99"
#define WGMMA_NAMES_112 WGMMA_NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define WGMMA_NAMES_120 WGMMA_NAMES_112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define WGMMA_NAMES_128 WGMMA_NAMES_112 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_FOUR(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define WGMMA_SIXTEEN(i) WGMMA_FOUR(i), WGMMA_FOUR((i) + 4), WGMMA_FOUR((i) + 8), WGMMA_FOUR((i) + 12)
#define WGMMA_SUMS_16 WGMMA_SIXTEEN(0)
#define WGMMA_SUMS_32 WGMMA_SUMS_16, WGMMA_SIXTEEN(16)
#define WGMMA_SUMS_48 WGMMA_SUMS_32, WGMMA_SIXTEEN(32)
#define WGMMA_SUMS_64 WGMMA_SUMS_48, WGMMA_SIXTEEN(48)
#define WGMMA_SUMS_80 WGMMA_SUMS_64, WGMMA_SIXTEEN(64)
#define WGMMA_SUMS_96 WGMMA_SUMS_80, WGMMA_SIXTEEN(80)
#define WGMMA_SUMS_100 WGMMA_SUMS_96, WGMMA_FOUR(96)
#define WGMMA_SUMS_112 WGMMA_SUMS_96, WGMMA_SIXTEEN(96)
#define WGMMA_SUMS_120 WGMMA_SUMS_112, WGMMA_FOUR(112), WGMMA_FOUR(116)
#define WGMMA_SUMS_128 WGMMA_SUMS_112, WGMMA_SIXTEEN(112)

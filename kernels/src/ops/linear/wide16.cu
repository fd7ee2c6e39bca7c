// The same as wide.cu with results as BF16, which leave while the next tile is multiplied: a block's 128 outputs of each token lie in shared memory,
// and each thread sends those of one token off by a bulk copy. (A block's stores go out at 23 bytes a cycle, while its tensor cores would wait.)
// Widths are multiples of 8.
#define WIDE_STAGED_BYTES (256 * 272)
#include "wide_tiles.cuh"
#include "../experts/many.cuh"

struct LeaveBf16 {
    // A token's outputs and 16 bytes, so that the words of eight tokens lie in all banks.
    static constexpr int STRIDE = 272;
    uint8_t *staged;
    int warp, lane;
    __device__ __forceinline__ LeaveBf16(uint8_t *rest, int warp, int lane) : staged(rest), warp(warp), lane(lane) {}

    DEVICE static void consumers_sync() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

    template <int N> DEVICE void sums(const GemmParams &p, int first_tile, int first, const float *acc) {
        // The tile before is out of shared memory.
        asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        consumers_sync();
        const int g = lane >> 2, t = lane & 3;
        uint8_t *to = staged + g * STRIDE + warp * 32 + t * 4;
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
            *reinterpret_cast<uint32_t *>(to + j * 8 * STRIDE) = transpose8(pack_bf16(acc[4 * j], acc[4 * j + 1]));
            *reinterpret_cast<uint32_t *>(to + j * 8 * STRIDE + 16) = transpose8(pack_bf16(acc[4 * j + 2], acc[4 * j + 3]));
        }
        fence_async_proxy();
        consumers_sync();
        const int token = warp * WARP + lane, row = first_tile * TILE_ROWS, rows = min(WIDE_TILES * TILE_ROWS, p.width - row);
        if (token < N && first + token < p.tokens && rows > 0) {
            const uint8_t *y = reinterpret_cast<const uint8_t *>(p.y) + (static_cast<size_t>(first + token) * p.width + row) * 2;
            asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(y), "r"(shared_address(staged + token * STRIDE)), "r"(rows * 2)
                         : "memory");
        }
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }

    DEVICE void end() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
};

#define WIDE(NAME, FORMAT)                                                                                             \
    extern "C" __global__ void __cluster_dims__(WIDE_BLOCKS, 1, 1) __launch_bounds__(WIDE_THREADS, 1)                  \
        linear_wide16_##NAME(const __grid_constant__ GemmParams p) { linear_wide<FORMAT, LeaveBf16>(p); }
WIDE(int4_g128, INT4_G128)
WIDE(int4_g32, INT4_G32)
WIDE(fp8, FP8)

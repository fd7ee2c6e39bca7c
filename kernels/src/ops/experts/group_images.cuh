// The activations of a group's rows in shared memory, as images (image.cuh), and those of the group behind it, which come while the last units of this one are
// multiplied. The two lie at the two ends of one room; what belongs to their blocks of 128 values (INT4's tails, FP8's steps) lies apart, by block and row.
#pragma once
#include "experts.cuh"

// The kernels of groups meet FP8 as F16: the images have steps.
template <int F> constexpr bool STEPS = F == FP8_EXPERTS;

// ROWS: all values are BF16.
template <int F, bool ROWS> struct GroupImages {
    static constexpr int ROW_TAIL = INT4<F> ? IMAGE_TAIL_BYTES : STEPS<F> ? sizeof(float) : 0, BLOCK_TAILS = GROUP_ROWS * ROW_TAIL;
    uint8_t *image, *tails;
    int padded;
    int room;  // rows of the room
    int place;

    DEVICE uint32_t bytes() const { return INT4<F> || ROWS ? padded * 2 : padded * 4; }
    // Of a group's tails.
    DEVICE int held() const { return padded / IMAGE_BLOCK * BLOCK_TAILS; }
    // Rows whose images are read for a group's: those behind its own count for nothing.
    static DEVICE int read(int rows) { return ROWS || rows > 4 ? 8 : 4; }
    // Whether the images of two neighbours have room beside each other.
    DEVICE bool fit(int rows, int next) const { return read(rows) + read(next) <= room; }
    DEVICE uint8_t *at(int end, int rows) const { return image + (end ? room - read(rows) : 0) * bytes(); }

    // The addresses of the group's first row's.
    DEVICE uint32_t images_of(int rows) const { return shared_address(at(place, rows)); }
    DEVICE uint32_t tails_of() const { return shared_address(tails + place * held()); }

    // A warp stores a block of row r, of a group of `rows`.
    DEVICE void store(int end, int rows, int r, int block, const float4 &v, int lane) const {
        uint8_t *to = at(end, rows) + r * bytes(), *tail = tails + end * held() + block * BLOCK_TAILS + r * ROW_TAIL;
        if constexpr (INT4<F>)
            image_store_bytes(to, tail, block, v, lane);
        else if constexpr (STEPS<F> && ROWS)
            row_image_store_f16(to, reinterpret_cast<float *>(tail), r, block, v, lane);
        else if constexpr (STEPS<F>)
            image_store_f16(to, reinterpret_cast<float *>(tail), block, v, lane);
        else if constexpr (ROWS)
            row_image_store_block(to, r, block, v, lane);
        else
            image_store_block<false>(to, padded, block, v, lane);
    }

    // This group's, by the whole block; nobody may read images any more. Ends with a barrier.
    template <class Row> DEVICE void fill(const Row &row, int rows, int k) const {
        const int lane = threadIdx.x & 31;
        fill_blocks(row, rows, k, 0, padded, [&](int r, int block, const float4 &v) { store(place, rows, r, block, v, lane); });
    }
};

// Rows of the group that is next, on their way in registers while the last UNITS units of this one are multiplied: a part of them with each, EACH blocks of
// 128 values a warp.
template <int EACH, int UNITS> struct RowsAhead {
    float4 v[EACH];
    uint32_t per_row;  // 2^32 / blocks of a row
    int first;         // the warp's first block of this part

    static constexpr int PARTS = UNITS;

    // Whether the next group's rows can come so.
    template <class Images> static DEVICE bool fits(const Images &images, int rows, int next) {
        return images.fit(rows, next) && next * (images.padded / IMAGE_BLOCK) <= UNITS * EACH * GEMV_WARPS;
    }

    template <class Row> DEVICE void load(int part, const Row &row, int rows, int k, int padded) {
        const int lane = threadIdx.x & 31, blocks = padded / IMAGE_BLOCK;
        per_row = 0xffffffffu / blocks + 1, first = part * EACH * GEMV_WARPS + threadIdx.x / WARP;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int task = first + i * GEMV_WARPS, r = row_of(task, blocks), at = (task - r * blocks) * IMAGE_BLOCK + 4 * lane;
            v[i] = task < rows * blocks ? load_quad(row(r) + at, at < k) : make_float4(0.f, 0.f, 0.f, 0.f);
        }
    }

    template <class Images> DEVICE void store(const Images &images, int rows) const {
        const int lane = threadIdx.x & 31, blocks = images.padded / IMAGE_BLOCK;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int task = first + i * GEMV_WARPS, r = row_of(task, blocks);
            if (task < rows * blocks) images.store(images.place ^ 1, rows, r, task - r * blocks, v[i], lane);
        }
    }

  private:
    DEVICE int row_of(int task, int blocks) const { return blocks == 1 ? task : __umulhi(task, per_row); }
};

// The shares of a dense product by pairs of blocks (wide.cuh): 256 rows times up to 256 tokens.
//
// Where tiles of 256 tokens would leave many pairs of blocks without one in the last round, the tiles of some rows are cut smaller, so that those blocks have
// one, too, and all of the last round are smaller (`cut_of` of cuda/plane.rs). Cut tiles come last.
#pragma once
#include "../../cuda/wide.cuh"
#include "linear_params.cuh"

struct WideShare {
    int pair, first, columns;  // the pair of 128 rows, the first token, how many
};

struct WideShares {
    int pairs, tiles, tokens, all;  // pairs of 128 rows; tiles of 256 tokens; shares
    WideCut cut;

    __device__ __forceinline__ explicit WideShares(const GemmParams &p)
        : pairs(ceil_div(p.tiles, WIDE_BLOCKS * WIDE_TILES)), tiles(ceil_div(p.tokens, WIDE_COLUMNS)), tokens(p.tokens),
          all(pairs * tiles + p.cut.pairs * (p.cut.cuts + p.cut.whole - tiles)), cut(p.cut) {}

    // Of `count` pairs from `begin` on, `tiles` each: those of a band, the same tokens of all its rows next to each other, then the next band's.
    DEVICE WideShare whole(int w, int begin, int count, int tiles) const {
        const int before = w / (cut.band * tiles) * cut.band, band = min(cut.band, count - before), tile = (w - before * tiles) / band;
        return {begin + before + (w - before * tiles) % band, tile * WIDE_COLUMNS, min(WIDE_COLUMNS, tokens - tile * WIDE_COLUMNS)};
    }

    DEVICE WideShare operator[](int w) const {
        const int uncut = pairs - cut.pairs;
        if (w < uncut * tiles) return whole(w, 0, uncut, tiles);
        w -= uncut * tiles;
        if (w < cut.pairs * cut.whole) return whole(w, uncut, cut.pairs, cut.whole);
        w -= cut.pairs * cut.whole;
        const int begin = cut.whole * WIDE_COLUMNS, each = ceil_div(tokens - begin, cut.cuts * PLANE_ROWS) * PLANE_ROWS, first = begin + w % cut.cuts * each;
        return {uncut + w / cut.cuts, first, min(each, tokens - first)};
    }
};

//! How a dense product of many tokens is shared out between pairs of blocks (`linear/wide_shares.cuh`): where tiles of 256 tokens would leave many
//! pairs without one in the last round, tiles of some rows are cut smaller, so that the whole last round is.

use super::plane::{PLANE_ROWS, WIDE_COLUMNS};

/// Most tokens of a cut tile: the widest product below 256 that the kernels have.
const MOST_CUT: usize = 240;

/// Mirrors `WideCut` of `linear/linear_params.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct WideCut {
    band: i32,
    pairs: i32,
    whole: i32,
    cuts: i32,
}

impl WideCut {
    /// Shares in all, where there are `pairs` of rows and `tokens`.
    pub(crate) fn shares(&self, pairs: usize, tokens: usize) -> usize {
        let (pairs_cut, whole, cuts) = (self.pairs as usize, self.whole as usize, self.cuts as usize);
        (pairs - pairs_cut) * tokens.div_ceil(WIDE_COLUMNS) + pairs_cut * (whole + cuts)
    }

    /// Of `pairs` pairs of 128 rows times `tokens`, for so many pairs of blocks; `band`: of how many pairs of rows all tokens come before the next ones.
    pub(crate) fn new(pairs: usize, tokens: usize, blocks: usize, band: usize) -> Self {
        let (pairs_cut, whole, cuts) = best_cut(pairs, tokens, blocks).unwrap_or((0, 0, 1));
        Self {
            band: band as i32,
            pairs: pairs_cut as i32,
            whole: whole as i32,
            cuts: cuts as i32,
        }
    }
}

/// How many pairs of rows are cut, what they keep of whole tiles, and into how many shares the rest goes: with the narrowest shares.
fn best_cut(pairs: usize, tokens: usize, blocks: usize) -> Option<(usize, usize, usize)> {
    let tiles = tokens.div_ceil(WIDE_COLUMNS);
    // Tiles that the last round has, and those that it has room for beside them.
    let left = pairs * tiles % blocks;
    let room = blocks - left;
    if left == 0 || !tokens.is_multiple_of(WIDE_COLUMNS) {
        return None;
    }
    (1..=pairs)
        .filter_map(|cut| {
            // Of each pair of rows that is cut, so many tiles become so many shares: all in the last round are such.
            let (tiles_cut, more) = (left.div_ceil(cut), room / cut);
            let cuts = tiles_cut + more;
            let width = (tiles_cut * WIDE_COLUMNS)
                .div_ceil(cuts)
                .next_multiple_of(PLANE_ROWS);
            let fits = more > 0 && tiles_cut <= tiles && width <= MOST_CUT;
            // Rounded up, the last share of a pair may have no token.
            let used = (cuts - 1) * width < tiles_cut * WIDE_COLUMNS;
            (fits && used).then_some((width, (cut, tiles - tiles_cut, cuts)))
        })
        .min_by_key(|(width, _)| *width)
        .map(|(_, cut)| cut)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens of each share of a pair of rows, and of the busiest pair of blocks, as `WideShares` deals them out.
    fn shares(pairs: usize, tokens: usize, blocks: usize) -> (Vec<Vec<(usize, usize)>>, usize) {
        let cut = WideCut::new(pairs, tokens, blocks, 8);
        let (pairs_cut, whole, cuts) = (cut.pairs as usize, cut.whole as usize, cut.cuts as usize);
        let tiles = tokens.div_ceil(WIDE_COLUMNS);
        let of_tile = |tile: usize| {
            (
                tile * WIDE_COLUMNS,
                (tokens - tile * WIDE_COLUMNS).min(WIDE_COLUMNS),
            )
        };
        let mut of_pair = vec![Vec::new(); pairs];
        let mut order = Vec::new();
        for (pair, shares) in of_pair.iter_mut().enumerate() {
            let count = if pair < pairs - pairs_cut { tiles } else { whole };
            shares.extend((0..count).map(of_tile));
            order.extend((0..count).map(|tile| of_tile(tile).1));
        }
        let begin = whole * WIDE_COLUMNS;
        let each = tokens.saturating_sub(begin).div_ceil(cuts * PLANE_ROWS) * PLANE_ROWS;
        for shares in of_pair.iter_mut().skip(pairs - pairs_cut) {
            for part in 0..cuts {
                let first = begin + part * each;
                let share = (first, each.min(tokens - first));
                shares.push(share);
                order.push(share.1);
            }
        }
        let most = (0..blocks)
            .map(|block| order.iter().skip(block).step_by(blocks).sum())
            .max();
        assert_eq!(order.len(), cut.shares(pairs, tokens));
        (of_pair, most.unwrap_or(0))
    }

    #[test]
    fn shares_cover_all_tokens_once() {
        for pairs in [1, 2, 5, 12, 20, 32, 64] {
            for tokens in [129, 256, 300, 1024, 2048, 3840, 4096, 8192] {
                for blocks in [3, 57, 66] {
                    for shares in shares(pairs, tokens, blocks).0 {
                        let mut at = 0;
                        for (first, count) in shares {
                            assert_eq!(first, at, "{pairs} pairs, {tokens} tokens, {blocks} blocks");
                            assert!(count > 0 && count <= WIDE_COLUMNS);
                            at += count;
                        }
                        assert_eq!(at, tokens, "{pairs} pairs, {tokens} tokens, {blocks} blocks");
                    }
                }
            }
        }
    }

    #[test]
    fn the_last_round_is_shorter_at_the_model_shapes() {
        // q k v and the output projection of 4,096 tokens; 2,048 and 768 without cuts, 1,986 and 745 at best.
        assert_eq!(shares(32, 4096, 66).1, 1992);
        assert_eq!(shares(12, 4096, 66).1, 752);
        // Whole rounds stay whole.
        assert_eq!(
            WideCut::new(33, 4096, 66, 8),
            WideCut {
                band: 8,
                pairs: 0,
                whole: 0,
                cuts: 1
            }
        );
    }
}

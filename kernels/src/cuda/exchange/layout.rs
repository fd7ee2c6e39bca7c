//! What stands where in the memory that a rank opens to its peers, and the parameter structs that say it to the kernels.

use super::halves::{CHANNELS, channel_bytes};
use super::{ExchangeShape, MAX_RANKS, Wire};
use crate::backend::Result;
use crate::cuda::format::padded;
use crate::cuda::shape;
use crate::ops::rmsnorm::cuda::{NormInput, NormRows};
use crate::ops::route::cuda::{Groups, MAX_TOP_K, RouteParams};

/// Tokens of the many-token family whose results are announced together.
pub(super) const CHUNK: usize = 2;
/// Bytes of a unit of the few-token family.
pub(super) const UNIT: usize = 16;
/// Most rows of the few-token family together: what one block marks in shared memory.
pub(super) const MOST_FEW_ROWS: usize = 1024;

/// Mirrors `Area`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Area {
    pub(super) few_header: u64,
    pub(super) few_meta: u64,
    pub(super) few_rows: u64,
    pub(super) few_back: u64,
    pub(super) few_done: u64,
    pub(super) many_header: u64,
    pub(super) many_rows: u64,
    pub(super) many_ids: u64,
    pub(super) many_weights: u64,
    pub(super) many_back: u64,
    pub(super) many_done: u64,
    pub(super) many_chunks: u64,
}

impl ExchangeShape {
    /// Sizes for `ranks` ranks of which none has more than `most_tokens` tokens in a step.
    pub fn new(
        ranks: usize,
        hidden: usize,
        top_k: usize,
        most_tokens: usize,
        deterministic: bool,
    ) -> ExchangeShape {
        ExchangeShape {
            ranks,
            hidden,
            top_k,
            few_tokens: (MOST_FEW_ROWS / ranks.max(1)).clamp(1, 128),
            many_tokens: match deterministic {
                true => 0,
                false => most_tokens
                    .min((8192 / ranks.max(1)).max(512))
                    .next_multiple_of(128),
            },
            exact: deterministic,
            deterministic,
            wire: Wire::Bf16,
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        const OP: &str = "exchange";
        if self.ranks == 0 || self.ranks > MAX_RANKS {
            return Err(shape(OP, "ranks", self.ranks, format!("1 to {MAX_RANKS}")));
        }
        if self.top_k == 0 || self.top_k > MAX_TOP_K {
            return Err(shape(
                OP,
                "experts of a token",
                self.top_k,
                format!("1 to {MAX_TOP_K}"),
            ));
        }
        if self.hidden == 0 || !self.hidden.is_multiple_of(8) || self.hidden > 16 * 1024 {
            return Err(shape(OP, "hidden", self.hidden, "a multiple of 8, at most 16384"));
        }
        if self.few_tokens == 0 || self.few_tokens > 128 || self.few_tokens * self.ranks > MOST_FEW_ROWS {
            let most = (MOST_FEW_ROWS / self.ranks).min(128);
            return Err(shape(OP, "few_tokens", self.few_tokens, format!("1 to {most}")));
        }
        if !self.many_tokens.is_multiple_of(128) || self.many_tokens > 1 << 16 {
            return Err(shape(
                OP,
                "many_tokens",
                self.many_tokens,
                "a multiple of 128, at most 65536",
            ));
        }
        if self.deterministic && !self.exact {
            return Err(shape(OP, "exact", false, "true with deterministic"));
        }
        Ok(())
    }

    /// Rows that the few-token family may bring here.
    pub(crate) fn few_rows(&self) -> usize {
        self.ranks * self.few_tokens
    }

    /// The same for the many-token family.
    pub(crate) fn many_rows(&self) -> usize {
        self.ranks * self.many_tokens
    }

    pub(crate) fn row_bytes(&self) -> usize {
        let padded = padded(self.hidden);
        match self.wire {
            Wire::Bf16 => padded * 2,
            Wire::Fp8 => (padded + padded / 128 * 4).next_multiple_of(16),
        }
    }

    /// Bytes of a rank's area, and of the channels behind it ([`super::halves`]).
    pub fn area_bytes(&self) -> usize {
        Area::new(self).1 + CHANNELS * channel_bytes(self)
    }

    /// Bytes that one token's row takes on its way in the few-token family, and in the many-token family.
    pub fn wire_bytes(&self) -> (usize, usize) {
        (self.row_units() * UNIT, self.row_bytes())
    }

    pub(super) fn row_units(&self) -> usize {
        self.hidden.div_ceil(if self.exact { 3 } else { 6 })
    }
}

impl Area {
    pub(super) fn new(shape: &ExchangeShape) -> (Area, usize) {
        let mut end = 0;
        let mut place = |bytes: usize| {
            let at = end;
            end = (end + bytes).next_multiple_of(1024);
            at as u64
        };
        let &ExchangeShape {
            ranks,
            hidden,
            top_k,
            few_tokens,
            deterministic,
            ..
        } = shape;
        let (few, many) = (shape.few_rows(), shape.many_rows());
        let row = shape.row_units() * UNIT;
        let back_rows = if deterministic { few_tokens * top_k } else { few };
        let area = Area {
            few_header: place(ranks * UNIT),
            few_meta: place(few * top_k.div_ceil(2) * UNIT),
            few_rows: place(few * row),
            few_back: place(back_rows * row),
            few_done: place(ranks * 8),
            many_header: place(ranks * UNIT),
            many_rows: place(many * shape.row_bytes()),
            many_ids: place(many * top_k * 4),
            many_weights: place(many * top_k * 4),
            many_back: place(many * hidden * 2),
            many_done: place(ranks * 8),
            many_chunks: place(many / CHUNK * 8),
        };
        (area, end)
    }
}

/// Mirrors `ExchangeParams`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ExchangeParams {
    pub(super) area: [u64; MAX_RANKS],
    pub(super) at: Area,
    pub(super) state: u64,
    pub(super) host: u64,
    pub(super) placement: u64,
    pub(super) loads: u64,
    pub(super) owner: u64,
    pub(super) counts: u64,
    pub(super) ids: u64,
    pub(super) weights: u64,
    pub(super) ranks: i32,
    pub(super) rank: i32,
    pub(super) hidden: i32,
    pub(super) k: i32,
    pub(super) experts: i32,
    pub(super) few_tokens: i32,
    pub(super) many_tokens: i32,
    pub(super) row_bytes: i32,
    pub(super) deterministic: i32,
    pub(super) alone: i32,
    pub(super) staged: i32,
    pub(super) trace: u64,
}

/// Mirrors `ExchangeTokens`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ExchangeTokens {
    pub(super) ids: u64,
    pub(super) weights: u64,
    pub(super) count: i32,
    pub(super) layer: i32,
}

/// Mirrors `GroupRows`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct GroupRows {
    pub(super) groups: Groups,
    pub(super) rows: u64,
    pub(super) experts: i32,
    pub(super) words: i32,
}

/// Mirrors `DispatchFew`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct DispatchFew {
    pub(super) exchange: ExchangeParams,
    pub(super) tokens: ExchangeTokens,
    pub(super) normed: u64,
    pub(super) x: u64,
    pub(super) group: GroupRows,
    pub(super) route: RouteParams,
    pub(super) ids: u64,
    pub(super) weights: u64,
    pub(super) norm: NormInput,
}

/// Mirrors `CombineFew`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct CombineFew {
    pub(super) exchange: ExchangeParams,
    pub(super) tokens: ExchangeTokens,
    pub(super) y: u64,
    pub(super) norm: NormRows,
    pub(super) part_bits: i32,
}

/// Mirrors `DispatchMany`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct DispatchMany {
    pub(super) exchange: ExchangeParams,
    pub(super) tokens: ExchangeTokens,
    pub(super) plane: u64,
    pub(super) plane_blocks: i32,
    pub(super) padded: i32,
    pub(super) fp8: i32,
    pub(super) rows: u64,
}

/// Mirrors `CombineMany`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct CombineMany {
    pub(super) exchange: ExchangeParams,
    pub(super) tokens: ExchangeTokens,
    pub(super) sorted: u64,
    pub(super) row_of_slot: u64,
    pub(super) hidden: u64,
    pub(super) senders: i32,
    pub(super) ahead: i32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_do_not_overlap_and_fit() {
        for ranks in [1, 2, 3, 8, 64] {
            for deterministic in [false, true] {
                let shape = ExchangeShape::new(ranks, 3072, 8, 8192, deterministic);
                shape.check().unwrap();
                let (area, bytes) = Area::new(&shape);
                let starts = [
                    area.few_header,
                    area.few_meta,
                    area.few_rows,
                    area.few_back,
                    area.few_done,
                    area.many_header,
                    area.many_rows,
                    area.many_ids,
                    area.many_weights,
                    area.many_back,
                    area.many_done,
                    area.many_chunks,
                ];
                assert!(starts.is_sorted() && starts.iter().all(|at| at % 1024 == 0));
                assert!(bytes as u64 >= area.many_chunks);
                assert_eq!(
                    (area.few_back - area.few_rows) as usize,
                    shape.few_rows() * shape.wire_bytes().0
                );
            }
        }
    }

    #[test]
    fn what_the_kernels_cannot_hold_is_refused() {
        let good = ExchangeShape::new(8, 3072, 8, 4096, false);
        let bad = [
            ExchangeShape { ranks: 65, ..good },
            ExchangeShape { top_k: 17, ..good },
            ExchangeShape { hidden: 3076, ..good },
            ExchangeShape {
                few_tokens: 129,
                ..good
            },
            ExchangeShape {
                many_tokens: 100,
                ..good
            },
            ExchangeShape {
                deterministic: true,
                ..good
            },
        ];
        good.check().unwrap();
        for shape in bad {
            assert!(shape.check().is_err(), "{shape:?}");
        }
    }
}

//! What stands where in the memory that a rank opens to its peers, and the parameter structs that say it to the kernels.

use super::{ExchangeShape, MAX_RANKS, Wire};
use crate::backend::Result;
use crate::cuda::format::padded;
use crate::cuda::shape;
use crate::ops::rmsnorm::cuda::NormRows;
use crate::ops::route::cuda::{Groups, MAX_TOP_K};

/// Bytes of a unit of the few-token family.
const UNIT: usize = 16;
/// Most rows of the few-token family together: what one block marks in shared memory.
pub(super) const MOST_FEW_ROWS: usize = 1024;

/// Mirrors `Area`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Area {
    pub(super) few_header: u64,
    few_meta: u64,
    few_rows: u64,
    few_back: u64,
    few_done: u64,
    many_header: u64,
    pub(super) many_rows: u64,
    pub(super) many_ids: u64,
    many_weights: u64,
    many_back: u64,
    many_done: u64,
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

    /// Bytes of a rank's area.
    pub fn area_bytes(&self) -> usize {
        Area::new(self, false).1
    }

    /// Bytes that one token's row takes on its way in the few-token family, and in the many-token family.
    pub fn wire_bytes(&self) -> (usize, usize) {
        (self.row_units() * UNIT, self.row_bytes())
    }

    fn row_units(&self) -> usize {
        self.hidden.div_ceil(if self.exact { 3 } else { 6 })
    }
}

impl Area {
    /// `staged`: what comes is carried here from staging areas, so no two ranks share a place.
    pub(super) fn new(shape: &ExchangeShape, staged: bool) -> (Area, usize) {
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
        let back_rows = match (deterministic, staged) {
            (false, _) => few,
            (true, false) => few_tokens * top_k,
            (true, true) => few * top_k,
        };
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
}

/// Mirrors `Phase`.
#[repr(i32)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Whole,
    Send,
    Receive,
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
    pub(super) phase: Phase,
}

/// Mirrors `CombineFew`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct CombineFew {
    pub(super) exchange: ExchangeParams,
    pub(super) tokens: ExchangeTokens,
    pub(super) y: u64,
    pub(super) norm: NormRows,
    pub(super) phase: Phase,
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
                let (area, bytes) = Area::new(&shape, false);
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
                ];
                assert!(starts.is_sorted() && starts.iter().all(|at| at % 1024 == 0));
                assert!(bytes as u64 > area.many_done);
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

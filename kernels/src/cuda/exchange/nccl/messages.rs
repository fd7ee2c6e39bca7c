//! Where the messages of an exchange over NCCL lie, and what is sent of them; the parameters of the kernels that write and
//! read them (`messages.cuh`).

use crate::cuda::exchange::halves::channel_shape;
use crate::cuda::exchange::layout::{ExchangeParams, ExchangeTokens, GroupRows};
use crate::cuda::exchange::{ExchangeShape, Wire};
use crate::cuda::plane::{PLANE_BLOCK, PLANE_ROWS};
use crate::ops::rmsnorm::cuda::{NormInput, NormRows};
use crate::ops::route::cuda::RouteParams;

/// Bytes in front of the rows.
pub(super) const HEAD: usize = 64;
/// Rows begin at a multiple of so many: they may be a plane.
const ALIGNED: usize = PLANE_BLOCK;

/// Sizes of the messages of an epoch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    top_k: usize,
    /// Of a row, in the family of few tokens and of many, and of its results.
    pub(super) few_row: usize,
    few_back: usize,
    pub(super) many_row: usize,
    many_back: usize,
    /// There is room for a multiple of so many rows: those of a plane.
    pub(super) many_block: usize,
    /// From one rank's message to the next, and from one rank's results to the next.
    pub(super) there_stride: usize,
    back_stride: usize,
    ranks: usize,
}

impl Sizes {
    pub(super) fn new(shape: &ExchangeShape) -> Sizes {
        let value = if shape.exact { 4 } else { 2 };
        let per_row = if shape.deterministic { shape.top_k } else { 1 };
        let mut sizes = Sizes {
            top_k: shape.top_k,
            few_row: shape.hidden * value,
            few_back: shape.hidden * value * per_row,
            many_row: shape.row_bytes(),
            many_back: shape.hidden * 2,
            many_block: match shape.wire {
                Wire::Bf16 => PLANE_ROWS,
                Wire::Fp8 => 1,
            },
            there_stride: 0,
            back_stride: 0,
            ranks: shape.ranks,
        };
        let (few, many) = (shape.few_tokens, shape.many_tokens);
        let there = sizes.few_bytes(few).max(sizes.many_bytes(many));
        let back = sizes.few_back_bytes(few).max(sizes.many_back_bytes(many));
        sizes.there_stride = there.next_multiple_of(1024);
        sizes.back_stride = back.next_multiple_of(1024);
        sizes
    }

    /// Of all messages and results.
    pub(super) fn bytes(&self) -> usize {
        ALIGNED + self.ranks * (self.there_stride + 2 * self.back_stride)
    }

    fn message(&self, rows: usize, row: usize) -> usize {
        HEAD + rows * row + 2 * (rows * self.top_k * 4).next_multiple_of(16)
    }

    /// Of a message of `rows` rows, and of the results that come back for it.
    pub(super) fn few_bytes(&self, rows: usize) -> usize {
        self.message(rows, self.few_row)
    }

    /// Where in such a message the experts of the slots are, and their weights.
    pub(super) fn few_slots(&self, rows: usize) -> (usize, usize) {
        let ids = HEAD + rows * self.few_row;
        (ids, ids + (rows * self.top_k * 4).next_multiple_of(16))
    }

    pub(super) fn few_back_bytes(&self, rows: usize) -> usize {
        HEAD + rows * self.few_back
    }

    pub(super) fn many_bytes(&self, rows: usize) -> usize {
        self.message(rows.next_multiple_of(self.many_block), self.many_row)
    }

    pub(super) fn many_back_bytes(&self, rows: usize) -> usize {
        HEAD + rows * self.many_back
    }

    /// In memory of [`Sizes::bytes`] at `address`, a multiple of [`ALIGNED`].
    pub(super) fn at(&self, address: u64) -> Places {
        let out = address + (ALIGNED + self.ranks * self.there_stride) as u64;
        Places {
            there: address + Places::THERE,
            out,
            back: out + (self.ranks * self.back_stride) as u64,
            sizes: *self,
        }
    }
}

/// The shape of the pieces of odd number, for which there is memory of its own; `None`: no two are under way at once.
pub(super) fn second_shape(shape: &ExchangeShape) -> Option<ExchangeShape> {
    (shape.ranks > 1 && shape.many_tokens > 0).then(|| channel_shape(shape))
}

impl ExchangeShape {
    /// Bytes of the messages that NCCL carries, and of the lists of their slots.
    pub fn message_bytes(&self) -> (usize, usize) {
        let second = second_shape(self);
        let bytes = second.map_or(0, |second| Sizes::new(&second).bytes());
        let lists = 1 + usize::from(second.is_some());
        (
            Sizes::new(self).bytes() + bytes,
            lists * self.many_rows() * self.top_k * 4,
        )
    }
}

/// Addresses of the messages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Places {
    pub(super) there: u64,
    out: u64,
    back: u64,
    pub(super) sizes: Sizes,
}

impl Places {
    /// Where what the ranks say begins, from the beginning of the memory on.
    pub(super) const THERE: u64 = (ALIGNED - HEAD) as u64;

    /// What `rank` says.
    pub(super) fn message(&self, rank: u32) -> u64 {
        self.there + u64::from(rank) * self.sizes.there_stride as u64
    }

    /// Results for `rank`.
    pub(super) fn results_for(&self, rank: u32) -> u64 {
        self.out + u64::from(rank) * self.sizes.back_stride as u64
    }

    /// Results from `rank`.
    pub(super) fn results_of(&self, rank: u32) -> u64 {
        self.back + u64::from(rank) * self.sizes.back_stride as u64
    }

    /// For kernels of few tokens, with `carried` rows in every message.
    pub(super) fn few(&self, carried: usize) -> Messages {
        self.messages(self.sizes.few_row, self.sizes.few_back, carried)
    }

    pub(super) fn many(&self) -> Messages {
        self.messages(self.sizes.many_row, self.sizes.many_back, 0)
    }

    fn messages(&self, row_bytes: usize, back_bytes: usize, carried: usize) -> Messages {
        Messages {
            there: self.there,
            out: self.out,
            back: self.back,
            there_stride: self.sizes.there_stride as u64,
            back_stride: self.sizes.back_stride as u64,
            row_bytes: row_bytes as i32,
            back_bytes: back_bytes as i32,
            carried: carried as i32,
            block: self.sizes.many_block as i32,
            straight: 0,
        }
    }
}

/// Mirrors `Messages`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Messages {
    there: u64,
    out: u64,
    back: u64,
    there_stride: u64,
    back_stride: u64,
    row_bytes: i32,
    back_bytes: i32,
    pub(super) carried: i32,
    block: i32,
    /// A bit of each rank.
    pub(super) straight: u64,
}

/// Mirrors `PackFew`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct PackFew {
    pub(super) exchange: ExchangeParams,
    pub(super) messages: Messages,
    pub(super) tokens: ExchangeTokens,
    pub(super) normed: u64,
    pub(super) rows: u64,
}

/// Mirrors `ChooseFew`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct ChooseFew {
    pub(super) exchange: ExchangeParams,
    pub(super) messages: Messages,
    pub(super) route: RouteParams,
    pub(super) ids: u64,
    pub(super) weights: u64,
    pub(super) norm: NormInput,
    pub(super) rows: u64,
}

/// Mirrors `ArriveFew`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct ArriveFew {
    pub(super) exchange: ExchangeParams,
    pub(super) messages: Messages,
    pub(super) x: u64,
    pub(super) group: GroupRows,
    pub(super) layer: i32,
}

/// Mirrors `ReturnFew`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct ReturnFew {
    pub(super) exchange: ExchangeParams,
    pub(super) messages: Messages,
    pub(super) y: u64,
}

/// Mirrors `SumFew`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct SumFew {
    pub(super) exchange: ExchangeParams,
    pub(super) messages: Messages,
    pub(super) tokens: ExchangeTokens,
    pub(super) norm: NormRows,
}

/// Mirrors `PackMany`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct PackMany {
    pub(super) exchange: ExchangeParams,
    pub(super) messages: Messages,
    pub(super) tokens: ExchangeTokens,
    pub(super) plane: u64,
    pub(super) rows: u64,
    pub(super) plane_blocks: i32,
    pub(super) padded: i32,
    pub(super) fp8: i32,
    pub(super) parts: i32,
    pub(super) picks: i32,
}

/// Mirrors `ArriveMany`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct ArriveMany {
    pub(super) exchange: ExchangeParams,
    pub(super) messages: Messages,
    pub(super) local: u64,
    pub(super) layer: i32,
}

/// Mirrors `ResultsMany`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct ResultsMany {
    pub(super) exchange: ExchangeParams,
    pub(super) messages: Messages,
    pub(super) tokens: ExchangeTokens,
    pub(super) sorted: u64,
    pub(super) row_of_slot: u64,
    pub(super) hidden: u64,
    pub(super) parts: i32,
    pub(super) own: i32,
}

/// Bytes of `bytes` that the library carries to or from `rank`, if `straight` is written straight.
pub(super) fn carried(straight: u64, rank: u32, bytes: usize) -> usize {
    match straight >> rank & 1 {
        1 => HEAD,
        _ => bytes,
    }
}

/// Whose rows are summed; mirrors `Rows`.
#[derive(Clone, Copy)]
pub(super) enum Rows {
    Others,
    Own,
    All,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_do_not_overlap_and_fit() {
        for (ranks, deterministic) in [
            (1, false),
            (2, false),
            (2, true),
            (3, false),
            (8, true),
            (64, false),
        ] {
            let shape = ExchangeShape::new(ranks, 3072, 8, 8192, deterministic);
            let sizes = Sizes::new(&shape);
            let places = sizes.at(1 << 20);
            assert!((places.message(1) + HEAD as u64).is_multiple_of(PLANE_BLOCK as u64));
            let few = shape.few_tokens;
            assert!(
                sizes.few_bytes(few) <= sizes.there_stride && sizes.few_back_bytes(few) <= sizes.back_stride
            );
            if !deterministic {
                let many = shape.many_tokens;
                assert!(sizes.many_bytes(many) <= sizes.there_stride);
                assert!(sizes.many_back_bytes(many) <= sizes.back_stride);
            }
            let last = ranks as u32 - 1;
            assert!(places.message(last) + sizes.there_stride as u64 <= places.results_for(0));
            assert!(places.results_for(last) + sizes.back_stride as u64 <= places.results_of(0));
            let end = places.results_of(last) + sizes.back_stride as u64;
            assert_eq!(end, (1 << 20) + sizes.bytes() as u64);
            // Of two pieces under way each has messages of its own.
            let second = second_shape(&shape);
            assert_eq!(second.is_some(), ranks > 1 && !deterministic);
            let both = sizes.bytes() + second.map_or(0, |second| Sizes::new(&second).bytes());
            assert_eq!(shape.message_bytes().0, both);
        }
    }
}

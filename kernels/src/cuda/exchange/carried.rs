//! What is carried between areas where the kernels do not write into the peers' themselves: by the copy engines.

use super::ExchangeShape;
use super::layout::{Area, UNIT};

/// What is carried of each rank's place in an array of an area, from a staging area to the area it is for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Carried {
    /// Where the array begins, how far a rank's place is from the one before, and what is carried of each.
    at: u64,
    stride: usize,
    pub(super) bytes: usize,
}

impl Carried {
    pub(super) fn of(&self, rank: u32) -> u64 {
        self.at + u64::from(rank) * self.stride as u64
    }
}

impl Area {
    /// A dispatch of the first `tokens` tokens of many: header, rows, ids, weights.
    pub(super) fn dispatch_many(&self, shape: &ExchangeShape, tokens: usize) -> [Carried; 4] {
        let rows = |at, bytes: usize| Carried {
            at,
            stride: shape.many_tokens * bytes,
            bytes: tokens * bytes,
        };
        let header = Carried {
            at: self.many_header,
            stride: UNIT,
            bytes: UNIT,
        };
        let slots = shape.top_k * 4;
        [
            header,
            rows(self.many_rows, shape.row_bytes()),
            rows(self.many_ids, slots),
            rows(self.many_weights, slots),
        ]
    }

    /// The results of the first `tokens` tokens, and the stamp.
    pub(super) fn combine_many(&self, shape: &ExchangeShape, tokens: usize) -> [Carried; 2] {
        let row = shape.hidden * 2;
        let back = Carried {
            at: self.many_back,
            stride: shape.many_tokens * row,
            bytes: tokens * row,
        };
        [back, done(self.many_done)]
    }
}

/// A stamp of each rank.
fn done(at: u64) -> Carried {
    Carried {
        at,
        stride: 8,
        bytes: 8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_carried_stays_within_its_place() {
        let shape = ExchangeShape::new(4, 3072, 8, 8192, false);
        let (area, bytes) = Area::new(&shape);
        let mut all = Vec::new();
        all.extend(area.dispatch_many(&shape, shape.many_tokens));
        all.extend(area.combine_many(&shape, shape.many_tokens));
        all.sort_by_key(|carried| carried.at);
        let mut end = 0;
        for carried in all {
            assert!(carried.at >= end, "{carried:?} begins before {end}");
            for rank in 1..4 {
                assert!(carried.of(rank - 1) + carried.bytes as u64 <= carried.of(rank));
            }
            end = carried.of(3) + carried.bytes as u64;
        }
        assert!(end <= bytes as u64);
    }
}

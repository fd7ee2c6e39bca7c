//! What came in for this rank's experts, cut into pieces of work that fit the staging buffer.

use conclave_kernels::backend::{Backend, Buffer, ExpertRow};

use super::frame::PAIR_BYTES;
use crate::transport::routing::LayerRoutes;
use crate::transport::{Capacity, Result, TransportError};

/// Rows and pairs from one rank.
#[derive(Debug, Default)]
pub(super) struct Source {
    pub(super) rank: u32,
    /// A dispatch's body.
    pub(super) body: Vec<u8>,
    /// (row, local expert), ascending in the row.
    pub(super) pairs: Vec<(u32, u32)>,
}

/// A stretch of one source's pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) source: usize,
    pub(super) count: usize,
}

/// All sources of a layer and how far they are done.
#[derive(Debug, Default)]
pub(super) struct Intake {
    pub(super) sources: Vec<Source>,
    /// The next pair to compute.
    source: usize,
    pair: usize,
    pub(super) rows: Vec<ExpertRow>,
    /// What the last piece of work was made of.
    pub(super) spans: Vec<Span>,
}

impl Source {
    /// Checks a dispatch: rows that exist, in order, and experts that are here.
    pub(super) fn new(
        rank: u32,
        body: Vec<u8>,
        (rows, pairs): (usize, usize),
        routes: &LayerRoutes,
        top_k: usize,
    ) -> Result<Source> {
        let fault = |problem: String| TransportError::Protocol { rank, problem };
        let mut checked = Vec::with_capacity(pairs);
        let (mut last, mut of_row) = (0, 0);
        // The header said so many rows and pairs, and the body has just their bytes.
        for pair in body[..pairs * PAIR_BYTES].as_chunks::<PAIR_BYTES>().0 {
            let row = u32::from_le_bytes([pair[0], pair[1], pair[2], pair[3]]);
            let expert = u32::from_le_bytes([pair[4], pair[5], pair[6], pair[7]]);
            if row as usize >= rows || row < last {
                return Err(fault(format!("row {row} after row {last}, of {rows}")));
            }
            of_row = if row == last { of_row + 1 } else { 1 };
            if of_row > top_k {
                return Err(fault(format!("row {row} for more than {top_k} experts")));
            }
            last = row;
            let local = routes
                .local(expert)
                .ok_or_else(|| fault(format!("a row for expert {expert}, which is not here")))?;
            checked.push((row, local));
        }
        Ok(Source {
            rank,
            body,
            pairs: checked,
        })
    }

    fn row<'a>(&'a self, row: usize, capacity: &Capacity) -> &'a [u8] {
        let bytes = capacity.row_bytes();
        let start = self.pairs.len() * PAIR_BYTES + row * bytes;
        &self.body[start..start + bytes]
    }
}

impl Intake {
    pub(super) fn begin(&mut self, sources: Vec<Source>) -> Vec<Source> {
        (self.source, self.pair) = (0, 0);
        std::mem::replace(&mut self.sources, sources)
    }

    /// Stages the next rows; false if there are none.
    pub(super) fn stage(
        &mut self,
        backend: &mut dyn Backend,
        staging: &Buffer,
        capacity: &Capacity,
    ) -> Result<bool> {
        self.rows.clear();
        self.spans.clear();
        let mut staged = 0;
        while let Some(source) = self.sources.get(self.source) {
            let first = self.pair;
            let mut last_row = None;
            while let Some(&(row, expert)) = source.pairs.get(self.pair) {
                if last_row != Some(row) {
                    if staged == capacity.max_tokens {
                        break;
                    }
                    let bytes = source.row(row as usize, capacity);
                    backend.write(staging, staged * capacity.row_bytes(), bytes)?;
                    staged += 1;
                    last_row = Some(row);
                }
                self.rows.push(ExpertRow {
                    row: staged as u32 - 1,
                    expert,
                });
                self.pair += 1;
            }
            if self.pair > first {
                self.spans.push(Span {
                    source: self.source,
                    count: self.pair - first,
                });
            }
            if self.pair < source.pairs.len() {
                break;
            }
            (self.source, self.pair) = (self.source + 1, 0);
        }
        Ok(!self.rows.is_empty())
    }
}

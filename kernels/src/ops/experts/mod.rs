//! Experts: `out[r] = w2(silu(w1 x) * w3 x)` with `x = input[rows[r].row]` and expert `rows[r].expert`.
//!
//! Each of the three products is a linear (see `ops::linear`); silu is `u / (1 + e^-u)`. A row's result depends on
//! its own input and expert only. Rows are sorted by expert (stably), so that a weight is read once for all its rows.

mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod hidden;
#[cfg(feature = "cuda")]
pub(crate) mod many;
#[cfg(test)]
mod tests;
mod weights;

pub(crate) use cpu::Sorted;
pub(crate) use hidden::Hidden;
pub(crate) use weights::CpuExperts;

/// Rows in the workspace at a time.
pub(crate) const CHUNK_ROWS: usize = 1024;

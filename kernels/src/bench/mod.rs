//! Measures: what the machine can do (read bandwidth, multiply-add peak), and what each op makes of it.
//!
//! Figures are data; the caller prints them. Must stay true: floors are measured in the same run, with the same
//! threads, as what is compared with them.

mod floor;
mod model;
mod ops;

pub use floor::{Floors, fma_peak, read_bandwidth};
pub use ops::{OpBench, Shape, bench_ops};

//! The ops of a decoder, one folder each: formula and shapes, the CPU code (the definition of correct), the CUDA
//! launch beside its `.cu` file, and tests over one shape table for every backend.
//!
//! What this crate is: a [`backend::Backend`] trait cut at the fused op, and its implementations. What it may
//! touch: memory it was given or allocated at start, and the device. What must stay true:
//! - no op allocates once the workspace exists;
//! - on the CPU every output element has one reduction order, fixed by the op's formula, whatever the batch, the
//!   instruction set, the number of threads or the rank (invariant K1, "exact");
//! - shapes are checked once, before any op runs on them; an op never reads or writes out of bounds.

pub mod backend;
pub mod bench;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod dummy;
mod ops;
mod simd;
#[cfg(test)]
mod testing;
pub mod weight;

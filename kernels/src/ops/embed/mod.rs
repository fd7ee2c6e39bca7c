//! Embedding: `hidden[t] = table[ids[t]]`, as F32, each value of a quantised table rounded once.

mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;

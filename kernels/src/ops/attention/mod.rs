//! Attention: `out = softmax(q k / sqrt(head_dim)) v` of each token over its sequence's positions up to its own.
//!
//! Query head h reads KV head `h / (heads / kv_heads)`. Positions are taken in blocks of [`BLOCK`] from 0, whatever
//! the page size and however the prompt is cut into steps, by online softmax:
//! `m' = max(m, max s); a = e^(m - m'); p = e^(s - m'); l = l a + p; o = o a + sum of p v` (ascending positions, fused
//! multiply-add), at the end `o / l`. A score is a dot product in the lanes of `ops::linear` (BF16: pairs, e4m3: FP8
//! order, F32 and e5m2: natural) of the key with `q * (1 / sqrt(head_dim))`; l has 16 lanes, position mod 16, added
//! by the fixed tree.

mod block;
mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod rows;
#[cfg(test)]
mod tests;

pub(crate) use block::Scratch;

/// Positions per step of the online softmax.
pub(crate) const BLOCK: usize = 64;
/// Longest head.
pub(crate) const MAX_HEAD_DIM: usize = 512;
/// Most query heads per KV head.
pub(crate) const MAX_GROUP: usize = 64;
/// Tokens of one sequence that share a pass over keys and values.
pub(crate) const TASK_TOKENS: usize = 16;

//! QKV: `x = rmsnorm(hidden); q, k, v = x Wq, x Wk, x Wv; q, k = rope(norm(q)), rope(norm(k))`.
//!
//! The q/k norm is an RMSNorm over the whole projection or over each head. Rope rotates the first `rotary_dim`
//! values of a head in pairs (i, i + rotary_dim / 2) by the angle `position * theta^(-2 i / rotary_dim)`:
//! `a' = fma(-b, sin, a * cos)`, `b' = fma(a, sin, b * cos)`; cosine and sine are computed in F64 (by the same code on
//! every machine) and rounded to F32. k and v are rounded to the cache's type, to nearest even, saturating, and
//! written to the pages of the token's position.

mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod rope;
#[cfg(test)]
mod tests;

//! RMSNorm: `y[i] = x[i] * (1 / sqrt(mean(x^2) + eps)) * w[i]`.
//!
//! The sum of squares is a dot product in natural order (see `ops::linear`); the rest is F32, one rounding per
//! operation, from left to right.

mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

pub(crate) use cpu::{rmsnorm, rmsnorm_all, rmsnorm_in_place};

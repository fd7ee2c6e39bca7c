//! Combine: `hidden[t] += sum over j = 0..k of weights[t, j] * y[t k + j]`.
//!
//! The sum starts at 0 and takes the slots in order by fused multiply-add; then it is added to `hidden`. So a
//! token's result does not depend on where its experts are.

mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

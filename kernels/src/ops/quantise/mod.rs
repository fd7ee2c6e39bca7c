//! Activations as FP8: for each token, for each 128 inputs, a scale `s = max(|x|, 1e-10) / 448` and e4m3 codes of `x / s`, rounded
//! to nearest even. A product then sees `e4m3 * s`.
//!
//! Only in front of FP8 weights and only if `Backend::set_fp8_activations` asks for it; without it activations keep their
//! precision and FP8 is a format of weights alone.

mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

pub(crate) use cpu::{QUANTISED, quantised};

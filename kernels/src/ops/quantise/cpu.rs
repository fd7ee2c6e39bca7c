//! The definition: what a product sees of 128 activations.

use crate::cpu::float8::{e4m3_to_f32, f32_to_e4m3};

/// Inputs that share a scale.
pub(crate) const QUANTISED: usize = 128;
/// The largest e4m3.
const LARGEST: f32 = 448.0;
/// Keeps the scale of zeros from being zero.
const LEAST: f32 = 1e-10;

/// At most [`QUANTISED`] values as they are after quantisation.
pub(crate) fn quantised(values: &[f32], to: &mut [f32]) {
    let largest = values.iter().fold(LEAST, |most, x| most.max(x.abs()));
    let scale = largest * (1.0 / LARGEST);
    for (to, x) in to.iter_mut().zip(values) {
        *to = e4m3_to_f32(f32_to_e4m3(x / scale)) * scale;
    }
}

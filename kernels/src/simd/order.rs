//! The lane orders of the packed formats, in plain Rust.

use super::LANES;

/// Even values, then odd ones.
#[inline(always)]
pub(super) fn pairs(x: &[f32; 32]) -> [[f32; LANES]; 2] {
    [0, 1].map(|n| std::array::from_fn(|lane| x[2 * lane + n]))
}

/// Lane `4 i + j` of vector `n` is value `16 i + 2 j + [0, 1, 8, 9][n]`.
#[inline(always)]
pub(super) fn e4m3(x: &[f32; 64]) -> [[f32; LANES]; 4] {
    [0, 1, 8, 9].map(|first| std::array::from_fn(|lane| x[16 * (lane / 4) + 2 * (lane % 4) + first]))
}

/// Pair `d` of vector `n` is the low halves of values `8 d + n` and `8 d + n + 4`.
#[inline(always)]
pub(super) fn int4(x: &[[f32; LANES]; 8]) -> [[i32; LANES]; 4] {
    let x = x.as_flattened();
    std::array::from_fn(|n| {
        std::array::from_fn(|d| (x[8 * d + n].to_bits() & 0xffff | x[8 * d + n + 4].to_bits() << 16) as i32)
    })
}

//! One op at a time against the CPU backend, over tables of shapes: bounds here, checks by subject.

pub mod attention;
pub mod experts;
pub mod fold;
pub mod linear;
pub mod loading;
pub mod sample;

use crate::host::Kind;

pub const KINDS: [Kind; 8] = [
    Kind::Bf16,
    Kind::F16,
    Kind::F32,
    Kind::Fp8,
    Kind::Int4(128, true),
    Kind::Int4(128, false),
    Kind::Int4(32, false),
    Kind::Int4(64, true),
];

/// Few-token kernels keep activations to 16 bits of mantissa and accumulate in F32.
pub const EXACT: f64 = 2e-4;
/// The CPU rounds INT4's activations to 16 bits of a row's largest.
const INT4: f64 = 1e-3;
/// Matrix products on bf16 operands.
pub const ROUNDED: f64 = 1e-2;

pub fn bound(kind: Kind) -> f64 {
    if matches!(kind, Kind::Int4(..)) {
        INT4
    } else {
        EXACT
    }
}

//! Functions over sixteen lanes, built of the same operations on every instruction set.

use super::Simd;

/// Adding it to |x| < 2^22 rounds x to an integer, to nearest even, that stands in the low bits.
const ROUND: f32 = 12_582_912.0;
/// ln 2 in two parts; the first has few bits, so that n * LN2_HIGH is exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// Inputs are clamped to these: 2^-126 and just below f32::MAX.
const EXP_MIN: f32 = -87.33;
const EXP_MAX: f32 = 88.37;
/// e^r for |r| <= ln 2 / 2, relative error below 2e-7 (the polynomial of the Cephes library).
const EXP: [f32; 8] = [
    1.0,
    1.0,
    0.5,
    0.166_666_65,
    0.041_665_796,
    8.333_452e-3,
    1.398_2e-3,
    1.987_569_1e-4,
];

/// `e^x`; exactly 1 at 0; at least 2^-126 (softmax over finite scores never divides by zero); NaN stays NaN.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    let x = s.min(s.splat(EXP_MAX), s.max(s.splat(EXP_MIN), x));
    let magic = s.fma(x, s.splat(std::f32::consts::LOG2_E), s.splat(ROUND));
    let n = s.sub(magic, s.splat(ROUND));
    let r = s.fma(n, s.splat(-LN2_HIGH), x);
    let r = s.fma(n, s.splat(-LN2_LOW), r);
    let mut p = s.splat(EXP[7]);
    for c in EXP[..7].iter().rev() {
        p = s.fma(p, r, s.splat(*c));
    }
    s.scale(p, magic)
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), x))))
}

/// `x * sigmoid(x)`, as `x / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn silu<S: Simd>(s: S, x: S::F) -> S::F {
    s.div(x, s.add(s.splat(1.0), exp(s, s.sub(s.splat(0.0), x))))
}

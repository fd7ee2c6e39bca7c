//! Rotary position embedding of the first values of each head.

use conclave_plan::model::AttentionSpec;

use crate::ops::attention::MAX_HEAD_DIM;
use crate::simd::{Isa, Kernel, LANES, Simd, run};

/// `theta^(-2 i / rotary_dim)` of each pair i.
pub(super) fn frequencies(spec: &AttentionSpec) -> [f64; MAX_HEAD_DIM / 2] {
    let mut frequencies = [0.0; MAX_HEAD_DIM / 2];
    for (i, frequency) in frequencies[..spec.rotary_dim / 2].iter_mut().enumerate() {
        *frequency = libm::pow(spec.rope_theta, -2.0 * i as f64 / spec.rotary_dim as f64);
    }
    frequencies
}

/// Writes the cosines, then the sines, of each pair of one position; `table` has `rotary_dim` values.
pub(super) fn angles(frequencies: &[f64], position: u32, table: &mut [f32]) {
    let (cosines, sines) = table.split_at_mut(table.len() / 2);
    for ((cosine, sine), frequency) in cosines.iter_mut().zip(sines).zip(frequencies) {
        let (s, c) = libm::sincos(f64::from(position) * frequency);
        (*cosine, *sine) = (c as f32, s as f32);
    }
}

/// Rotates each head of one token in place.
pub(super) fn rotate(isa: Isa, head_dim: usize, table: &[f32], x: &mut [f32]) {
    run(isa, Rotate { head_dim, table, x });
}

struct Rotate<'a> {
    head_dim: usize,
    table: &'a [f32],
    x: &'a mut [f32],
}

impl Kernel for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let half = self.table.len() / 2;
        let (cosines, sines) = self.table.split_at(half);
        for head in self.x.chunks_exact_mut(self.head_dim) {
            let (low, high) = head[..2 * half].split_at_mut(half);
            let (lows, low_rest) = low.as_chunks_mut::<LANES>();
            let (highs, high_rest) = high.as_chunks_mut::<LANES>();
            let (cos, cos_rest) = cosines.as_chunks::<LANES>();
            let (sin, sin_rest) = sines.as_chunks::<LANES>();
            for i in 0..lows.len() {
                let (a, b) = (s.load(&lows[i]), s.load(&highs[i]));
                let (c, n) = (s.load(&cos[i]), s.load(&sin[i]));
                s.store(s.fma(s.sub(s.splat(-0.0), b), n, s.mul(a, c)), &mut lows[i]);
                s.store(s.fma(a, n, s.mul(b, c)), &mut highs[i]);
            }
            for i in 0..low_rest.len() {
                let (a, b) = (low_rest[i], high_rest[i]);
                low_rest[i] = (-b).mul_add(sin_rest[i], a * cos_rest[i]);
                high_rest[i] = a.mul_add(sin_rest[i], b * cos_rest[i]);
            }
        }
    }
}

//! The order in which a weight's format reads its inputs: which lane of which vector each one is in.

use crate::cpu::weights::{Format, INT4_BLOCK};
use crate::simd::{LANES, Simd};

/// Order of inputs in lanes; see the table of `ops::linear`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Natural,
    Pairs,
    Fp8,
    Int4,
}

impl Order {
    pub(crate) fn of(format: &Format) -> Order {
        match format {
            Format::F32 | Format::F16 => Order::Natural,
            Format::Bf16 => Order::Pairs,
            Format::Fp8 { .. } => Order::Fp8,
            Format::Int4 { .. } => Order::Int4,
        }
    }

    /// Inputs per chunk.
    pub(crate) const fn chunk(self) -> usize {
        match self {
            Order::Natural => 16,
            Order::Pairs => 32,
            Order::Fp8 => 64,
            Order::Int4 => INT4_BLOCK,
        }
    }

    /// Vectors of a packed token: 16 F32 each, or 32 integers for INT4.
    pub(crate) const fn vectors(self, columns: usize) -> usize {
        let chunks = columns.div_ceil(self.chunk());
        match self {
            Order::Int4 => chunks * INT4_VECTORS,
            _ => chunks * self.chunk() / LANES,
        }
    }

    /// Place of input `k` of a chunk among the chunk's values: vector * 16 + lane; for INT4 vector * 32 + 2 lane + half.
    pub(crate) const fn place(self, k: usize) -> usize {
        match self {
            Order::Natural => k,
            Order::Pairs => k % 2 * LANES + k / 2,
            Order::Fp8 => (k % 16 / 8 * 2 + k % 2) * LANES + k / 16 * 4 + k % 8 / 2,
            Order::Int4 => k % 4 * 2 * LANES + k / 8 * 2 + k % 8 / 4,
        }
    }
}

/// Vectors of an INT4 chunk: four of i16 pairs, and -8 times the sum of each lane's inputs as i32.
pub(crate) const INT4_VECTORS: usize = 5;

/// `x * factor` in the order of a float format, with zeros up to the end of the last chunk.
#[inline(always)]
pub(crate) fn permute<S: Simd>(s: S, order: Order, x: &[f32], factor: f32, to: &mut [[f32; LANES]]) {
    let factor = s.splat(factor);
    match order {
        Order::Natural => {
            for (x, to) in x.chunks(LANES).zip(to) {
                s.store(s.mul(s.load_some(x), factor), to);
            }
        }
        Order::Pairs => {
            for (x, to) in x.chunks(32).zip(to.as_chunks_mut::<2>().0) {
                let chunk = s.pairs_order(&filled(x));
                for (v, to) in chunk.into_iter().zip(to) {
                    s.store(s.mul(v, factor), to);
                }
            }
        }
        Order::Fp8 | Order::Int4 => {
            for (x, to) in x.chunks(64).zip(to.as_chunks_mut::<4>().0) {
                let chunk = s.e4m3_order(&filled(x));
                for (v, to) in chunk.into_iter().zip(to) {
                    s.store(s.mul(v, factor), to);
                }
            }
        }
    }
}

/// A chunk, the last one of a row filled up with zeros.
#[inline(always)]
fn filled<const C: usize>(x: &[f32]) -> [f32; C] {
    match x.first_chunk() {
        Some(x) => *x,
        None => {
            let mut filled = [0.0; C];
            filled[..x.len()].copy_from_slice(x);
            filled
        }
    }
}

/// The opposite of [`permute`], without the factor.
#[inline(always)]
pub(crate) fn restore(order: Order, from: &[[f32; LANES]], to: &mut [f32]) {
    match order {
        Order::Natural => chunks_back::<16>(Order::Natural, from, to),
        Order::Pairs => chunks_back::<32>(Order::Pairs, from, to),
        Order::Fp8 => chunks_back::<64>(Order::Fp8, from, to),
        Order::Int4 => chunks_back::<128>(Order::Int4, from, to),
    }
}

#[inline(always)]
fn chunks_back<const C: usize>(order: Order, from: &[[f32; LANES]], to: &mut [f32]) {
    let from = from.as_flattened().as_chunks::<C>().0;
    for (from, to) in from.iter().zip(to.chunks_mut(C)) {
        for (k, to) in to.iter_mut().enumerate() {
            *to = from[order.place(k)];
        }
    }
}

/// Below this the reciprocal of the scale overflows; such a chunk counts as zero.
const SMALLEST: f32 = 1e-30;

/// Rounds one token to i16 with a scale per chunk.
#[inline(always)]
pub(super) fn integers<S: Simd>(s: S, x: &[f32], to: &mut [[f32; LANES]], scales: &mut [f32]) {
    let to = to.as_chunks_mut::<INT4_VECTORS>().0;
    for ((x, to), scale) in x.chunks(INT4_BLOCK).zip(to).zip(scales) {
        *scale = quantize(s, &filled(x), to);
    }
}

/// Rounds one chunk to i16 pairs in INT4 order; returns the scale.
#[inline(always)]
fn quantize<S: Simd>(s: S, chunk: &[f32; INT4_BLOCK], to: &mut [[f32; LANES]; INT4_VECTORS]) -> f32 {
    let zero = s.splat(0.0);
    let mut x = [zero; INT4_BLOCK / LANES];
    let (mut largest, mut finite) = (zero, zero);
    for (x, chunk) in x.iter_mut().zip(chunk.as_chunks::<LANES>().0) {
        *x = s.load(chunk);
        largest = s.max(*x, s.max(s.sub(zero, *x), largest));
        // 0 as long as x is finite, NaN from then on.
        finite = s.fma(*x, zero, finite);
    }
    let largest = s.largest(largest);
    let finite = s.sum(finite) == 0.0;
    if !finite || largest < SMALLEST {
        *to = [[0.0; LANES]; INT4_VECTORS];
        return if finite { 0.0 } else { f32::NAN };
    }
    let inverse = s.splat(32767.0 / largest);
    // Adding 1.5 * 2^23 leaves the nearest integer, ties to even, in the low bits.
    let magic = s.splat(12_582_912.0);
    for x in &mut x {
        *x = s.add(s.mul(*x, inverse), magic);
    }
    let [pairs @ .., sums] = to;
    // Both halves -8.
    let minus_8 = s.splat_i32(0xfff8_fff8_u32 as i32);
    let mut sum = s.splat_i32(0);
    for (pair, to) in s.int4_order(&x).into_iter().zip(pairs) {
        sum = s.dot_i16(sum, pair, minus_8);
        s.store(s.as_floats(pair), to);
    }
    s.store(s.as_floats(sum), sums);
    largest / 32767.0
}

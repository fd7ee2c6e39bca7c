//! Activations in the order that a weight's format reads them.
//!
//! Must stay true: the packed form of a token depends on nothing but its own inputs.

use std::ops::Range;

use crate::backend::Result;
use crate::cpu::engine::Rows;
use crate::cpu::memory::Memory;
use crate::cpu::weights::{Format, INT4_BLOCK};
use crate::simd::{Isa, Kernel, LANES, Simd, run};

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

/// Scratch for the packed activations of one op.
pub(crate) struct Packed {
    values: Memory,
    /// INT4: `[tokens, chunks]`.
    scales: Memory,
}

/// Packed tokens.
#[derive(Clone, Copy)]
pub(crate) struct Tokens<'a> {
    pub(crate) order: Order,
    /// `[tokens, vectors]`; for INT4 the bits of i16 pairs.
    pub(crate) values: &'a [[f32; LANES]],
    /// INT4: `[tokens, chunks]`.
    pub(crate) scales: &'a [f32],
    pub(crate) count: usize,
    /// Vectors of a token.
    pub(crate) stride: usize,
}

impl<'a> Tokens<'a> {
    /// Tokens `first..first + count`.
    pub(crate) fn slice(&self, first: usize, count: usize) -> Tokens<'a> {
        let scales = self.scales.len() / self.count.max(1);
        Tokens {
            values: &self.values[first * self.stride..(first + count) * self.stride],
            scales: &self.scales[first * scales..(first + count) * scales],
            count,
            ..*self
        }
    }
}

/// Packed tokens to be filled.
pub(crate) struct TokensMut<'a> {
    order: Order,
    values: &'a mut [[f32; LANES]],
    scales: &'a mut [f32],
    stride: usize,
}

impl<'a> TokensMut<'a> {
    /// For tasks that fill different tokens.
    pub(crate) fn shared(self) -> SharedTokens<'a> {
        let chunks = self.scales.len() * self.stride / self.values.len().max(1);
        SharedTokens {
            order: self.order,
            stride: self.stride,
            values: Rows::new(self.values, self.stride),
            scales: Rows::new(self.scales, chunks),
        }
    }

    /// Fills the one token from input `first` on, with zeros up to the end of the last chunk. `first` is a multiple
    /// of the chunk.
    #[inline(always)]
    pub(crate) fn put<S: Simd>(&mut self, s: S, first: usize, values: &[f32]) {
        let order = self.order;
        let at = order.vectors(first);
        let to = &mut self.values[at..at + order.vectors(values.len())];
        match order {
            Order::Int4 => integers(s, values, to, &mut self.scales[first / INT4_BLOCK..]),
            order => permute(s, order, values, 1.0, to),
        }
    }
}

/// Packed tokens that tasks fill.
pub(crate) struct SharedTokens<'a> {
    order: Order,
    values: Rows<'a, [f32; LANES]>,
    scales: Rows<'a, f32>,
    stride: usize,
}

impl SharedTokens<'_> {
    /// Some tokens, to be filled.
    ///
    /// # Safety
    /// No token may be taken twice while it is being filled.
    pub(crate) unsafe fn take(&self, tokens: Range<usize>) -> TokensMut<'_> {
        TokensMut {
            order: self.order,
            // SAFETY: the caller's promise.
            values: unsafe { self.values.take(tokens.clone()) },
            // SAFETY: the caller's promise.
            scales: unsafe { self.scales.take(tokens) },
            stride: self.stride,
        }
    }

    /// Inputs `first..first + count` of one token as a token of its own. `first` is a multiple of the chunk.
    ///
    /// # Safety
    /// No chunk may be taken twice while it is being filled.
    pub(crate) unsafe fn take_part(&self, token: usize, first: usize, count: usize) -> TokensMut<'_> {
        let (order, start) = (self.order, self.order.vectors(first));
        let vectors = order.vectors(count);
        let scales = if order == Order::Int4 {
            count.div_ceil(INT4_BLOCK)
        } else {
            0
        };
        TokensMut {
            order,
            // SAFETY: the caller's promise.
            values: unsafe { self.values.take_part(token, start..start + vectors) },
            // SAFETY: the caller's promise.
            scales: unsafe {
                self.scales
                    .take_part(token, first / INT4_BLOCK..first / INT4_BLOCK + scales)
            },
            stride: vectors,
        }
    }
}

impl Packed {
    /// Room for `tokens` of `columns` inputs in any order.
    pub(crate) fn new(tokens: usize, columns: usize) -> Result<Packed> {
        let padded = columns.next_multiple_of(INT4_BLOCK);
        let words = tokens.saturating_mul(padded);
        Ok(Packed {
            values: Memory::words(words, "packed activations")?,
            scales: Memory::words(words / INT4_BLOCK, "activation scales")?,
        })
    }

    /// The first `count` tokens, to be written.
    pub(crate) fn tokens_mut(&mut self, order: Order, columns: usize, count: usize) -> TokensMut<'_> {
        let stride = order.vectors(columns);
        let scales = if order == Order::Int4 {
            columns.div_ceil(INT4_BLOCK)
        } else {
            0
        };
        TokensMut {
            order,
            values: &mut self.values.f32_mut().as_chunks_mut().0[..count * stride],
            scales: &mut self.scales.f32_mut()[..count * scales],
            stride,
        }
    }

    /// The first `count` tokens.
    pub(crate) fn tokens(&self, order: Order, columns: usize, count: usize) -> Tokens<'_> {
        let stride = order.vectors(columns);
        let scales = if order == Order::Int4 {
            columns.div_ceil(INT4_BLOCK)
        } else {
            0
        };
        Tokens {
            order,
            values: &self.values.f32().as_chunks().0[..count * stride],
            scales: &self.scales.f32()[..count * scales],
            count,
            stride,
        }
    }
}

/// Packs the rows of `x` (`[tokens, columns]`).
pub(crate) fn pack(isa: Isa, x: &[f32], columns: usize, to: TokensMut<'_>) {
    run(isa, Pack { x, columns, to });
}

struct Pack<'a> {
    x: &'a [f32],
    columns: usize,
    to: TokensMut<'a>,
}

impl Kernel for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Pack { x, columns, to } = self;
        let scales = to.scales.len() / (x.len() / columns.max(1)).max(1);
        for (t, x) in x.chunks_exact(columns).enumerate() {
            let mut token = TokensMut {
                order: to.order,
                values: &mut to.values[t * to.stride..][..to.stride],
                scales: &mut to.scales[t * scales..][..scales],
                stride: to.stride,
            };
            token.put(s, 0, x);
        }
    }
}

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
fn integers<S: Simd>(s: S, x: &[f32], to: &mut [[f32; LANES]], scales: &mut [f32]) {
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

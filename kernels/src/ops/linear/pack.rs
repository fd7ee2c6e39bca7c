//! Activations in the order that a weight's format reads them.
//!
//! Must stay true: the packed form of a token depends on nothing but its own inputs.

use std::ops::Range;

use super::order::{Order, integers, permute};
use crate::backend::Result;
use crate::cpu::engine::Rows;
use crate::cpu::memory::Memory;
use crate::cpu::weights::INT4_BLOCK;
use crate::ops::quantise::{QUANTISED, quantised};
use crate::simd::{Isa, Kernel, LANES, Simd, run};

/// Scratch for the packed activations of one op.
pub(crate) struct Packed {
    values: Memory,
    /// INT4: `[tokens, chunks]`.
    scales: Memory,
    /// Tokens in front of FP8 weights are quantised (`ops::quantise`).
    quantise: bool,
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
    quantise: bool,
}

impl<'a> TokensMut<'a> {
    /// For tasks that fill different tokens.
    pub(crate) fn shared(self) -> SharedTokens<'a> {
        let chunks = self.scales.len() * self.stride / self.values.len().max(1);
        SharedTokens {
            order: self.order,
            stride: self.stride,
            quantise: self.quantise,
            values: Rows::new(self.values, self.stride),
            scales: Rows::new(self.scales, chunks),
        }
    }

    /// Fills the one token from input `first` on, with zeros up to the end of the last chunk. `first` is a multiple
    /// of the chunk, and of the quantised blocks if there are any.
    #[inline(always)]
    pub(crate) fn put<S: Simd>(&mut self, s: S, first: usize, values: &[f32]) {
        let order = self.order;
        let at = order.vectors(first);
        let to = &mut self.values[at..at + order.vectors(values.len())];
        match order {
            Order::Int4 => integers(s, values, to, &mut self.scales[first / INT4_BLOCK..]),
            Order::Fp8 if self.quantise => {
                let mut block = [0.0; QUANTISED];
                for (values, to) in values.chunks(QUANTISED).zip(to.chunks_mut(QUANTISED / LANES)) {
                    let block = &mut block[..values.len()];
                    quantised(values, block);
                    permute(s, order, block, 1.0, to);
                }
            }
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
    quantise: bool,
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
            quantise: self.quantise,
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
            quantise: self.quantise,
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
            quantise: false,
        })
    }

    /// Other room in the same mode.
    pub(crate) fn resized(&self, tokens: usize, columns: usize) -> Result<Packed> {
        let quantise = self.quantise;
        Packed::new(tokens, columns).map(|packed| Packed { quantise, ..packed })
    }

    /// Whether tokens in front of FP8 weights are quantised from now on.
    pub(crate) fn set_quantise(&mut self, on: bool) {
        self.quantise = on;
    }

    /// Inputs that are packed as one in this order: parts of a token begin at a multiple.
    pub(crate) fn whole(&self, order: Order) -> usize {
        match order {
            Order::Fp8 if self.quantise => QUANTISED,
            order => order.chunk(),
        }
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
            quantise: self.quantise,
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
                quantise: to.quantise,
            };
            token.put(s, 0, x);
        }
    }
}

//! Activations in the order that a weight's format reads them.
//!
//! Must stay true: the packed form of a token depends on nothing but its own inputs (and, for FP8, on the scales of
//! the weight's row block).

use crate::backend::Result;
use crate::cpu::memory::Memory;
use crate::cpu::weights::{Format, INT4_BLOCK};
use crate::simd::LANES;

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
    pub(crate) fn chunk(self) -> usize {
        match self {
            Order::Natural => 16,
            Order::Pairs => 32,
            Order::Fp8 => 64,
            Order::Int4 => INT4_BLOCK,
        }
    }

    /// Place of input `k` of a chunk among the chunk's values: vector * 16 + lane.
    fn place(self, k: usize) -> usize {
        match self {
            Order::Natural | Order::Int4 => k,
            Order::Pairs => k % 2 * LANES + k / 2,
            Order::Fp8 => (k % 16 / 8 * 2 + k % 2) * LANES + k / 16 * 4 + k % 8 / 2,
        }
    }
}

/// Scratch for the packed activations of one op.
pub(crate) struct Packed {
    /// `[tokens, padded]` F32 in lane order; for INT4 the first half holds 16-bit integers.
    values: Memory,
    /// INT4: `[tokens, chunks]`.
    scales: Memory,
}

/// Widest row of any order: inputs padded to the longest chunk.
pub(crate) fn padded(columns: usize) -> usize {
    columns.next_multiple_of(INT4_BLOCK)
}

impl Packed {
    pub(crate) fn new(tokens: usize, columns: usize) -> Result<Packed> {
        let padded = padded(columns);
        Ok(Packed {
            values: Memory::words(tokens * padded, "packed activations")?,
            scales: Memory::words(tokens * padded / INT4_BLOCK, "activation scales")?,
        })
    }

    /// Room, in tokens of `columns` inputs.
    pub(crate) fn fits(&self, tokens: usize, columns: usize) -> bool {
        tokens * padded(columns) * 4 <= self.values.len()
    }

    /// Packs one token for a float format; `scale(k / 128)` multiplies.
    pub(crate) fn pack(&mut self, order: Order, x: &[f32], scale: impl Fn(usize) -> f32) -> &[[f32; LANES]] {
        let chunk = order.chunk();
        let padded = x.len().next_multiple_of(chunk);
        let out = &mut self.values.f32_mut()[..padded];
        out[padded - chunk..].fill(0.0);
        for (k, x) in x.iter().enumerate() {
            out[k / chunk * chunk + order.place(k % chunk)] = x * scale(k / 128);
        }
        out.as_chunks::<LANES>().0
    }

    /// Rounds one token to 16-bit integers with a scale per chunk.
    pub(crate) fn quantize(&mut self, x: &[f32]) -> (&[[i16; INT4_BLOCK]], &[f32]) {
        let chunks = x.len().div_ceil(INT4_BLOCK);
        let values = &mut self.values.i16_mut()[..chunks * INT4_BLOCK];
        let scales = &mut self.scales.f32_mut()[..chunks];
        values[(chunks - 1) * INT4_BLOCK..].fill(0);
        for (c, x) in x.chunks(INT4_BLOCK).enumerate() {
            let largest = x.iter().fold(0u32, |m, x| m.max(x.to_bits() & 0x7fff_ffff));
            let largest = f32::from_bits(largest);
            let values = &mut values[c * INT4_BLOCK..][..x.len()];
            // Below this the reciprocal overflows; such a chunk is zero for every purpose.
            if largest < 1e-30 || !largest.is_finite() {
                values.fill(0);
                scales[c] = if largest.is_finite() { 0.0 } else { f32::NAN };
                continue;
            }
            let inverse = 32767.0 / largest;
            for (value, x) in values.iter_mut().zip(x) {
                *value = (x * inverse).round_ties_even() as i16;
            }
            scales[c] = largest / 32767.0;
        }
        (values.as_chunks::<INT4_BLOCK>().0, scales)
    }
}

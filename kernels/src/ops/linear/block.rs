//! Some rows of a weight times packed tokens: tokens cut into parts that stay in the cache, then the format's loop.

use std::ops::Range;

use super::floats::Floats;
use super::integers::Integers;
use super::order::Order;
use super::out::Out;
use super::pack::Tokens;
use super::tile::{Bf16, E4m3, F16, F32};
use crate::backend::Result;
use crate::cpu::memory::Memory;
use crate::cpu::weights::{CpuLinear, FP8_BLOCK, Format};
use crate::simd::{Kernel, LANES, Simd};

/// Bytes of packed tokens that run over one set of rows: half a second-level cache.
const TOKEN_BYTES: usize = 512 << 10;
/// Tokens of such a part are a multiple of every tile's.
const TILE_TOKENS: usize = 12;
/// Rows that are decoded at a time.
pub(super) const PANEL_ROWS: usize = 4;

/// Scratch of one thread.
pub(crate) struct Scratch {
    /// FP8: tokens times the scales of a block of rows.
    scaled: Memory,
    /// Decoded rows.
    panel: Memory,
}

impl Scratch {
    /// For weights of at most `columns` inputs.
    pub(crate) fn new(columns: usize) -> Result<Scratch> {
        let padded = columns.next_multiple_of(Order::Fp8.chunk());
        Ok(Scratch {
            scaled: Memory::words((TILE_TOKENS * padded).max(TOKEN_BYTES / 4), "scaled activations")?,
            panel: Memory::words(PANEL_ROWS * padded, "decoded rows")?,
        })
    }
}

/// Tokens of `vectors` vectors that fit into `TOKEN_BYTES`.
fn part_tokens(vectors: usize) -> usize {
    (TOKEN_BYTES / (vectors * LANES * 4).max(1) / TILE_TOKENS * TILE_TOKENS).max(TILE_TOKENS)
}

/// Some rows of a weight times all tokens, into `out`.
pub(crate) struct Block<'a> {
    pub(crate) weight: &'a CpuLinear,
    pub(crate) rows: Range<usize>,
    pub(crate) x: Tokens<'a>,
    pub(crate) scratch: &'a mut Scratch,
    pub(crate) out: &'a Out<'a>,
}

impl Kernel for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Block {
            weight,
            rows,
            x: all,
            scratch,
            out,
        } = self;
        assert!(rows.start <= rows.end && rows.end <= weight.out_features);
        assert!(
            all.order == Order::of(&weight.format) && all.stride == all.order.vectors(weight.in_features)
        );
        let row_bytes = weight.row_bytes();
        let bytes = weight.bytes();
        let step = part_tokens(all.stride);
        for first in (0..all.count).step_by(step) {
            let x = all.slice(first, step.min(all.count - first));
            let panel = &mut scratch.panel;
            macro_rules! floats {
                ($decode:ty, $bytes:literal, $vectors:literal, $rows:expr, $x:expr) => {{
                    let rows: Range<usize> = $rows;
                    let data = &bytes[rows.start * row_bytes..rows.end * row_bytes];
                    let row = rows.start;
                    Floats::<$decode, $bytes, $vectors>::new(data, row_bytes, row, $x, first, panel, out)
                        .outlined(s)
                }};
            }
            match &weight.format {
                Format::F32 => floats!(F32, 64, 1, rows.clone(), x),
                Format::F16 => floats!(F16, 32, 1, rows.clone(), x),
                Format::Bf16 => floats!(Bf16, 64, 2, rows.clone(), x),
                Format::Fp8 { scales } => {
                    let blocks = weight.in_features.div_ceil(FP8_BLOCK);
                    let mut next = rows.start;
                    while next < rows.end {
                        let block = next / FP8_BLOCK;
                        let end = rows.end.min((block + 1) * FP8_BLOCK);
                        let scaled = scale(s, x, &scales[block * blocks..][..blocks], &mut scratch.scaled);
                        floats!(E4m3, 64, 4, next..end, scaled);
                        next = end;
                    }
                }
                Format::Int4 {
                    scales,
                    zeros,
                    per_chunk,
                } => {
                    let groups = weight.in_features.div_ceil(Order::Int4.chunk()) * per_chunk;
                    Integers {
                        data: &bytes[rows.start * row_bytes..rows.end * row_bytes],
                        bytes: row_bytes,
                        scales: &scales[rows.start * groups..rows.end * groups],
                        zeros: if zeros.is_empty() {
                            &[]
                        } else {
                            &zeros[rows.start * groups..rows.end * groups]
                        },
                        per_chunk: *per_chunk,
                        row: rows.start,
                        x,
                        first,
                        out,
                    }
                    .outlined(s);
                }
            }
        }
    }
}

/// `tokens * (scales * 256)`, per 128 inputs; the factor makes up for decoded e4m3 being 2^-8 of its value.
#[inline(always)]
fn scale<'a, S: Simd>(s: S, tokens: Tokens<'_>, scales: &[f32], to: &'a mut Memory) -> Tokens<'a> {
    const VECTORS: usize = FP8_BLOCK / LANES;
    let values = &mut to.f32_mut().as_chunks_mut::<LANES>().0[..tokens.values.len()];
    let rows = values
        .chunks_exact_mut(tokens.stride)
        .zip(tokens.values.chunks_exact(tokens.stride));
    for (to, from) in rows {
        for ((to, from), scale) in to.chunks_mut(VECTORS).zip(from.chunks(VECTORS)).zip(scales) {
            let scale = s.splat(scale * 256.0);
            for (to, from) in to.iter_mut().zip(from) {
                s.store(s.mul(s.load(from), scale), to);
            }
        }
    }
    Tokens {
        values,
        scales: &[],
        ..tokens
    }
}

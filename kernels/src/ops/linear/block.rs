//! Some rows of a weight times packed tokens, cut into tiles.
//!
//! Few tokens: the rows are decoded on the fly, tile by tile. Many: four rows at a time are decoded once into a
//! panel of F32 that stays in the nearest cache, and all tokens run over it.

use std::ops::Range;

use super::int4::{self, Groups};
use super::pack::{INT4_VECTORS, Order, Tokens};
use super::tile::{self, Bf16, Decode, E4m3, F16, F32};
use crate::backend::Result;
use crate::cpu::memory::Memory;
use crate::cpu::weights::{CpuLinear, FP8_BLOCK, Format, INT4_BLOCK};
use crate::ops::linear::out::Out;
use crate::simd::{Kernel, LANES, Simd};

/// From so many tokens on a panel pays.
const PANEL_TOKENS: usize = 12;
/// Bytes of packed tokens that run over one set of rows: half a second-level cache.
const TOKEN_BYTES: usize = 384 << 10;
/// Rows of a panel.
const PANEL_ROWS: usize = 4;

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
        let padded = columns.next_multiple_of(64);
        Ok(Scratch {
            scaled: Memory::words((12 * padded).max(TOKEN_BYTES / 4), "scaled activations")?,
            panel: Memory::words(PANEL_ROWS * padded, "decoded rows")?,
        })
    }
}

/// Tokens of `vectors` vectors that fit into `TOKEN_BYTES`, a multiple of the widest tile.
fn block_tokens(vectors: usize) -> usize {
    (TOKEN_BYTES / (vectors * LANES * 4).max(1) / 12 * 12).max(12)
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
            x,
            scratch,
            out,
        } = self;
        block(s, weight, rows, x, scratch, out);
    }
}

#[inline(always)]
fn block<S: Simd>(
    s: S,
    weight: &CpuLinear,
    rows: Range<usize>,
    x: Tokens<'_>,
    scratch: &mut Scratch,
    out: &Out<'_>,
) {
    debug_assert_eq!(Order::of(&weight.format), x.order);
    assert!(rows.end <= weight.out_features && x.stride == x.order.vectors(weight.in_features));
    let step = block_tokens(x.stride);
    for first in (0..x.count).step_by(step) {
        let tokens = x.slice(first, step.min(x.count - first));
        match &weight.format {
            Format::F32 => {
                floats::<S, F32, 64, 1>(s, weight, rows.clone(), tokens, first, &mut scratch.panel, out)
            }
            Format::F16 => {
                floats::<S, F16, 32, 1>(s, weight, rows.clone(), tokens, first, &mut scratch.panel, out)
            }
            Format::Bf16 => {
                floats::<S, Bf16, 64, 2>(s, weight, rows.clone(), tokens, first, &mut scratch.panel, out)
            }
            Format::Fp8 { scales } => {
                let blocks = weight.in_features.div_ceil(FP8_BLOCK);
                let mut next = rows.start;
                while next < rows.end {
                    let block = next / FP8_BLOCK;
                    let end = rows.end.min((block + 1) * FP8_BLOCK);
                    let scaled = scale(
                        s,
                        tokens,
                        &scales[block * blocks..][..blocks],
                        &mut scratch.scaled,
                    );
                    floats::<S, E4m3, 64, 4>(s, weight, next..end, scaled, first, &mut scratch.panel, out);
                    next = end;
                }
            }
            Format::Int4 {
                scales,
                zeros,
                per_chunk,
            } => {
                let groups = weight.in_features.div_ceil(INT4_BLOCK) * per_chunk;
                let of_row = |row: usize| Groups {
                    scales: &scales[row * groups..][..groups],
                    zeros: if zeros.is_empty() {
                        &[]
                    } else {
                        &zeros[row * groups..][..groups]
                    },
                    per_chunk: *per_chunk,
                };
                if zeros.is_empty() {
                    integers::<S, false>(s, weight, rows.clone(), tokens, first, &of_row, out);
                } else {
                    integers::<S, true>(s, weight, rows.clone(), tokens, first, &of_row, out);
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

/// Rows of a float format.
#[inline(always)]
fn floats<S, D, const N: usize, const V: usize>(
    s: S,
    weight: &CpuLinear,
    rows: Range<usize>,
    x: Tokens<'_>,
    first: usize,
    panel: &mut Memory,
    out: &Out<'_>,
) where
    S: Simd,
    D: Decode<S, N, V>,
{
    let bytes = weight.row_bytes();
    let mut rest = &weight.bytes()[rows.start * bytes..rows.end * bytes];
    let mut row = rows.start;
    while rest.len() >= 4 * bytes {
        let (four, later) = rest.split_at(4 * bytes);
        if x.count >= PANEL_TOKENS {
            let panel = &mut panel.f32_mut().as_chunks_mut::<LANES>().0[..4 * x.stride];
            for (row, panel) in four.chunks_exact(bytes).zip(panel.chunks_exact_mut(x.stride)) {
                decode_row::<S, D, N, V>(s, row, panel);
            }
            let panel = panel.as_flattened();
            // SAFETY: any f32 is four bytes.
            let panel = unsafe { std::slice::from_raw_parts(panel.as_ptr().cast(), panel.len() * 4) };
            some_rows::<S, F32, 64, 1, 4>(s, panel, x.stride * LANES * 4, None, row, x, first, out);
        } else if V == 4 && x.count > 1 {
            // Four decoded vectors per row: two rows at a time leave registers for sums.
            for (i, pair) in four.chunks_exact(2 * bytes).enumerate() {
                some_rows::<S, D, N, V, 2>(s, pair, bytes, Some(ahead(bytes)), row + 2 * i, x, first, out);
            }
        } else {
            some_rows::<S, D, N, V, 4>(s, four, bytes, Some(ahead(bytes)), row, x, first, out);
        }
        rest = later;
        row += 4;
    }
    for one in rest.chunks_exact(bytes) {
        some_rows::<S, D, N, V, 1>(s, one, bytes, None, row, x, first, out);
        row += 1;
    }
}

/// How far ahead of the row that is read weights are asked for: the next rows, in the order of memory, so that the
/// machine's own prefetcher sees one stream.
#[inline(always)]
fn ahead(row_bytes: usize) -> usize {
    (4 * row_bytes).clamp(4096, 8192)
}

/// Decodes one row.
#[inline(always)]
fn decode_row<S, D, const N: usize, const V: usize>(s: S, row: &[u8], to: &mut [[f32; LANES]])
where
    S: Simd,
    D: Decode<S, N, V>,
{
    let to = to.as_chunks_mut::<V>().0;
    let (chunks, rest) = row.as_chunks::<N>();
    let mut last = [0; N];
    last[..rest.len()].copy_from_slice(rest);
    for (chunk, to) in chunks.iter().chain([&last]).zip(to) {
        let decoded = D::decode(s, chunk);
        for v in 0..V {
            s.store(decoded[v], &mut to[v]);
        }
    }
}

/// `R` rows times all tokens.
#[inline(always)]
fn some_rows<S, D, const N: usize, const V: usize, const R: usize>(
    s: S,
    data: &[u8],
    bytes: usize,
    ahead: Option<usize>,
    row: usize,
    x: Tokens<'_>,
    first: usize,
    out: &Out<'_>,
) where
    S: Simd,
    D: Decode<S, N, V>,
{
    assert!(data.len() == R * bytes && x.stride * N >= bytes * V && x.values.len() == x.count * x.stride);
    let mut rows = [data.as_ptr(); R];
    for (r, row) in rows.iter_mut().enumerate() {
        *row = data[r * bytes..].as_ptr();
    }
    let mut token = 0;
    let mut ahead = ahead;
    macro_rules! tiles {
        ($($tokens:literal),*) => {$(
            while x.count - token >= $tokens {
                let mut at = [x.values.as_ptr(); $tokens];
                for (t, at) in at.iter_mut().enumerate() {
                    *at = x.values[(token + t) * x.stride..].as_ptr();
                }
                // SAFETY: lengths were asserted above.
                let sums = unsafe { tile::tile::<S, D, N, V, R, $tokens>(s, rows, bytes, at, ahead) };
                for (r, sums) in sums.iter().enumerate() {
                    for (t, sum) in sums.iter().enumerate() {
                        out.put(row + r, first + token + t, *sum);
                    }
                }
                token += $tokens;
                ahead = None;
            }
        )*};
    }
    // As many sums as registers hold beside the decoded vectors.
    if S::WIDE && (V == 1 || R == 2) {
        tiles!(6, 4, 2, 1);
    } else if S::WIDE && V == 2 {
        tiles!(4, 2, 1);
    } else if S::WIDE || R <= 2 {
        tiles!(2, 1);
    } else {
        tiles!(1);
    }
}

/// Rows of an INT4 weight.
#[inline(always)]
fn integers<'a, S: Simd, const Z: bool>(
    s: S,
    weight: &CpuLinear,
    rows: Range<usize>,
    x: Tokens<'_>,
    first: usize,
    groups: &impl Fn(usize) -> Groups<'a>,
    out: &Out<'_>,
) {
    let bytes = weight.row_bytes();
    let data = &weight.bytes()[rows.start * bytes..rows.end * bytes];
    let mut row = rows.start;
    let mut rest = data;
    // Few tokens: more rows, so that there are as many sums to work on at a time.
    while x.count < 4 && rest.len() >= 4 * bytes {
        let (four, later) = rest.split_at(4 * bytes);
        let groups = [groups(row), groups(row + 1), groups(row + 2), groups(row + 3)];
        some_integer_rows::<S, 4, Z>(s, four, bytes, groups, row, x, first, out);
        rest = later;
        row += 4;
    }
    while rest.len() >= 2 * bytes {
        let (pair, later) = rest.split_at(2 * bytes);
        some_integer_rows::<S, 2, Z>(s, pair, bytes, [groups(row), groups(row + 1)], row, x, first, out);
        rest = later;
        row += 2;
    }
    for one in rest.chunks_exact(bytes) {
        some_integer_rows::<S, 1, Z>(s, one, bytes, [groups(row)], row, x, first, out);
        row += 1;
    }
}

/// `R` rows times all tokens.
#[inline(always)]
fn some_integer_rows<S: Simd, const R: usize, const Z: bool>(
    s: S,
    data: &[u8],
    bytes: usize,
    groups: [Groups<'_>; R],
    row: usize,
    x: Tokens<'_>,
    first: usize,
    out: &Out<'_>,
) {
    let chunks = x.stride / INT4_VECTORS;
    assert!(data.len() == R * bytes && chunks * 64 >= bytes && x.values.len() == x.count * x.stride);
    assert!(x.scales.len() == x.count * chunks);
    let mut rows = [data.as_ptr(); R];
    for (r, row) in rows.iter_mut().enumerate() {
        *row = data[r * bytes..].as_ptr();
    }
    let mut token = 0;
    let mut ahead = Some(ahead(bytes));
    macro_rules! tiles {
        ($($tokens:literal),*) => {$(
            while x.count - token >= $tokens {
                let mut at = [x.values.as_ptr(); $tokens];
                let mut sx = [x.scales.as_ptr(); $tokens];
                for t in 0..$tokens {
                    at[t] = x.values[(token + t) * x.stride..].as_ptr();
                    sx[t] = x.scales[(token + t) * chunks..].as_ptr();
                }
                // SAFETY: lengths were asserted above.
                let sums = unsafe { int4::tile::<S, R, $tokens, Z>(s, rows, bytes, groups, at, sx, ahead) };
                for (r, sums) in sums.iter().enumerate() {
                    for (t, sum) in sums.iter().enumerate() {
                        out.put(row + r, first + token + t, *sum);
                    }
                }
                token += $tokens;
                ahead = None;
            }
        )*};
    }
    if S::WIDE && R == 4 {
        tiles!(2, 1);
    } else if S::WIDE {
        tiles!(6, 4, 2, 1);
    } else {
        tiles!(1);
    }
}

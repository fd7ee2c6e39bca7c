//! Rows of a float format times packed tokens, cut into tiles.
//!
//! Few tokens: rows are decoded on the fly, tile by tile. Many: four rows at a time are decoded once into a panel of
//! F32 that stays in the nearest cache, and all tokens run over it.

use std::marker::PhantomData;

use super::block::PANEL_ROWS;
use super::out::Out;
use super::pack::Tokens;
use super::tile::{self, Decode, F32};
use crate::cpu::memory::Memory;
use crate::simd::{Kernel, LANES, Simd, Tiles};

/// Whether a panel pays: from so many tokens on, and not for BF16, which is decoded as fast as it is read where there
/// are registers for it.
#[inline(always)]
fn panel_pays<S: Simd>(vectors: usize, tokens: usize) -> bool {
    if matches!(S::TILES, Tiles::Large) {
        vectors != 2 && tokens >= 12
    } else {
        tokens >= 4
    }
}

/// Rows that follow each other, times tokens.
pub(super) struct Floats<'a, D, const N: usize, const V: usize> {
    /// `[rows, bytes]`.
    data: &'a [u8],
    bytes: usize,
    /// Number of the first row.
    row: usize,
    x: Tokens<'a>,
    /// Number of the first token.
    first: usize,
    panel: &'a mut Memory,
    out: &'a Out<'a>,
    decode: PhantomData<D>,
}

/// The same, for one token: a function of its own, so that its registers are its own.
struct OneToken<'a, D, const N: usize, const V: usize>(Floats<'a, D, N, V>);

/// The same, for several tokens.
struct ManyTokens<'a, D, const N: usize, const V: usize>(Floats<'a, D, N, V>);

impl<'a, D, const N: usize, const V: usize> Floats<'a, D, N, V> {
    /// Rows `row..` of `bytes` bytes each, tokens `first..`.
    pub(super) fn new(
        data: &'a [u8],
        bytes: usize,
        row: usize,
        x: Tokens<'a>,
        first: usize,
        panel: &'a mut Memory,
        out: &'a Out<'a>,
    ) -> Self {
        // What the tiles rely on: whole rows, and enough vectors for each token.
        assert!(data.len().is_multiple_of(bytes) && bytes.div_ceil(N) * V == x.stride);
        assert!(x.values.len() == x.count * x.stride);
        Floats {
            data,
            bytes,
            row,
            x,
            first,
            panel,
            out,
            decode: PhantomData,
        }
    }

    /// Computes all results.
    #[inline(always)]
    pub(super) fn outlined<S: Simd>(self, s: S)
    where
        D: Decode<N, V>,
    {
        if self.x.count == 1 {
            s.outlined(OneToken(self))
        } else {
            s.outlined(ManyTokens(self))
        }
    }
}

/// How far ahead of the row that is read weights are asked for: the next rows, in the order of memory, so that the
/// machine's own prefetcher sees one stream.
#[inline(always)]
pub(super) fn ahead(row_bytes: usize) -> usize {
    (4 * row_bytes).clamp(4096, 8192)
}

/// Rows that are taken four at a time.
#[inline(always)]
pub(super) fn in_fours<S: Simd>(rows: usize) -> usize {
    if matches!(S::TILES, Tiles::Single) {
        0
    } else {
        rows / 4 * 4
    }
}

impl<D: Decode<N, V>, const N: usize, const V: usize> Kernel for OneToken<'_, D, N, V> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Floats {
            data,
            bytes,
            mut row,
            x,
            first,
            out,
            ..
        } = self.0;
        let token = [x.values.as_ptr()];
        let (fours, rest) = data.split_at(in_fours::<S>(data.len() / bytes) * bytes);
        for four in fours.chunks_exact(4 * bytes) {
            if matches!(S::TILES, Tiles::Single) {
                break;
            }
            // SAFETY: four rows; the token's length was checked by `new`.
            let sums =
                unsafe { tile::tile::<S, D, N, V, 4, 1>(s, four.as_ptr(), bytes, token, Some(ahead(bytes))) };
            for (r, sum) in sums.iter().enumerate() {
                out.put(row + r, first, sum[0]);
            }
            row += 4;
        }
        for one in rest.chunks_exact(bytes) {
            // SAFETY: one row; the token's length was checked by `new`.
            let sums = unsafe { tile::tile::<S, D, N, V, 1, 1>(s, one.as_ptr(), bytes, token, None) };
            out.put(row, first, sums[0][0]);
            row += 1;
        }
    }
}

impl<D: Decode<N, V>, const N: usize, const V: usize> Kernel for ManyTokens<'_, D, N, V> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Floats {
            data,
            bytes,
            mut row,
            x,
            first,
            panel,
            out,
            ..
        } = self.0;
        let (fours, rest) = data.split_at(in_fours::<S>(data.len() / bytes) * bytes);
        for four in fours.chunks_exact(4 * bytes) {
            if matches!(S::TILES, Tiles::Single) {
                break;
            }
            if panel_pays::<S>(V, x.count) {
                let panel = &mut panel.f32_mut().as_chunks_mut::<LANES>().0[..PANEL_ROWS * x.stride];
                for (row, panel) in four.chunks_exact(bytes).zip(panel.chunks_exact_mut(x.stride)) {
                    decode_row::<S, D, N, V>(s, row, panel);
                }
                let (panel, bytes) = (panel.as_ptr().cast(), x.stride * LANES * 4);
                // SAFETY: the panel holds four rows of as many vectors as a token.
                unsafe { panel_rows(s, panel, bytes, row, x, first, out) };
            } else if V == 4 || !matches!(S::TILES, Tiles::Large) {
                // Two rows at a time leave registers for sums.
                for (i, pair) in four.chunks_exact(2 * bytes).enumerate() {
                    // SAFETY: two rows; the tokens' lengths were checked by `new`.
                    unsafe {
                        rows::<S, D, N, V, 2>(
                            s,
                            pair.as_ptr(),
                            bytes,
                            Some(ahead(bytes)),
                            row + 2 * i,
                            x,
                            first,
                            out,
                        )
                    };
                }
            } else {
                // SAFETY: four rows; the tokens' lengths were checked by `new`.
                unsafe {
                    rows::<S, D, N, V, 4>(s, four.as_ptr(), bytes, Some(ahead(bytes)), row, x, first, out)
                };
            }
            row += 4;
        }
        for one in rest.chunks_exact(bytes) {
            // SAFETY: one row; the tokens' lengths were checked by `new`.
            unsafe { rows::<S, D, N, V, 1>(s, one.as_ptr(), bytes, None, row, x, first, out) };
            row += 1;
        }
    }
}

/// Four decoded rows times all tokens.
///
/// # Safety
/// Four rows of `bytes` readable bytes at `panel`, as many vectors per token.
#[inline(always)]
unsafe fn panel_rows<S: Simd>(
    s: S,
    panel: *const u8,
    bytes: usize,
    row: usize,
    x: Tokens<'_>,
    first: usize,
    out: &Out<'_>,
) {
    if matches!(S::TILES, Tiles::Large) {
        // SAFETY: the caller's promise.
        unsafe { rows::<S, F32, 64, 1, 4>(s, panel, bytes, None, row, x, first, out) };
    } else {
        for i in [0, 2] {
            // SAFETY: two of the four rows.
            unsafe { rows::<S, F32, 64, 1, 2>(s, panel.add(i * bytes), bytes, None, row + i, x, first, out) };
        }
    }
}

/// Decodes one row.
#[inline(always)]
fn decode_row<S: Simd, D: Decode<N, V>, const N: usize, const V: usize>(
    s: S,
    row: &[u8],
    to: &mut [[f32; LANES]],
) {
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

/// `R` rows from `data` on times all tokens.
///
/// # Safety
/// `R * bytes` readable bytes at `data`; `V` vectors per token for every `N` bytes of a row, rounded up.
#[inline(always)]
#[expect(
    clippy::too_many_arguments,
    reason = "an inner loop: all of it stays in registers"
)]
unsafe fn rows<S: Simd, D: Decode<N, V>, const N: usize, const V: usize, const R: usize>(
    s: S,
    data: *const u8,
    bytes: usize,
    ahead: Option<usize>,
    row: usize,
    x: Tokens<'_>,
    first: usize,
    out: &Out<'_>,
) {
    let mut token = 0;
    let mut ahead = ahead;
    macro_rules! tiles {
        ($($tokens:literal),*) => {{$(
            // Eight are better taken as twice four than as six and two.
            while x.count - token >= $tokens && !($tokens == 6 && x.count - token == 8) {
                let mut at = [x.values.as_ptr(); $tokens];
                for (t, at) in at.iter_mut().enumerate() {
                    *at = x.values[(token + t) * x.stride..].as_ptr();
                }
                // SAFETY: the caller's promise.
                let sums = unsafe { tile::tile::<S, D, N, V, R, $tokens>(s, data, bytes, at, ahead) };
                for (r, sums) in sums.iter().enumerate() {
                    for (t, sum) in sums.iter().enumerate() {
                        out.put(row + r, first + token + t, *sum);
                    }
                }
                token += $tokens;
                ahead = None;
            }
        )*}};
    }
    // As many sums as registers hold beside the decoded vectors.
    match S::TILES {
        Tiles::Large if R > 1 && (V == 1 || R == 2) => tiles!(6, 4, 2, 1),
        Tiles::Large if R > 1 => tiles!(4, 2, 1),
        Tiles::Small if R == 2 && V == 1 => tiles!(3, 1),
        Tiles::Small if R == 2 => tiles!(2, 1),
        _ => tiles!(1),
    }
}

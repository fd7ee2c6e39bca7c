//! Rows of an INT4 weight times packed tokens, cut into tiles.

use super::floats::{ahead, in_fours};
use super::int4::{self, Groups};
use super::order::INT4_VECTORS;
use super::out::Out;
use super::pack::Tokens;
use crate::simd::{Kernel, Simd, Tiles};

/// Rows that follow each other, times tokens.
#[derive(Clone, Copy)]
pub(super) struct Integers<'a> {
    /// `[rows, bytes]`.
    pub(super) data: &'a [u8],
    pub(super) bytes: usize,
    /// `[rows, chunks, per_chunk]`.
    pub(super) scales: &'a [f32],
    /// The same, or empty: all 8.
    pub(super) zeros: &'a [i32],
    pub(super) per_chunk: usize,
    /// Number of the first row.
    pub(super) row: usize,
    pub(super) x: Tokens<'a>,
    /// Number of the first token.
    pub(super) first: usize,
    pub(super) out: &'a Out<'a>,
}

/// `Z`: the rows have zeros. `G`: a chunk has several groups. A function of its own for one token and for several.
struct OneToken<'a, const Z: bool, const G: bool>(Integers<'a>);
struct ManyTokens<'a, const Z: bool, const G: bool>(Integers<'a>);

impl<'a> Integers<'a> {
    /// Computes all results.
    #[inline(always)]
    pub(super) fn outlined<S: Simd>(self, s: S) {
        match (!self.zeros.is_empty(), self.per_chunk > 1) {
            (false, false) => self.of_kind::<S, false, false>(s),
            (false, true) => self.of_kind::<S, false, true>(s),
            (true, false) => self.of_kind::<S, true, false>(s),
            (true, true) => self.of_kind::<S, true, true>(s),
        }
    }

    #[inline(always)]
    fn of_kind<S: Simd, const Z: bool, const G: bool>(self, s: S) {
        if self.x.count == 1 {
            s.outlined(OneToken::<Z, G>(self))
        } else {
            s.outlined(ManyTokens::<Z, G>(self))
        }
    }

    /// Chunks of a row, after a look at the lengths that tiles rely on.
    #[inline(always)]
    fn chunks<const Z: bool>(&self) -> usize {
        let Integers {
            data,
            bytes,
            scales,
            zeros,
            per_chunk,
            x,
            ..
        } = *self;
        let chunks = x.stride / INT4_VECTORS;
        let rows = data.len() / bytes;
        assert!(
            chunks * 64 >= bytes
                && x.values.len() == x.count * x.stride
                && x.scales.len() == x.count * chunks
        );
        let places = rows * chunks * per_chunk;
        assert!(data.len() == rows * bytes && scales.len() == places && (!Z || zeros.len() == places));
        chunks
    }

    /// Scales and zeros of row `row` of these.
    #[inline(always)]
    fn groups<const Z: bool>(&self, row: usize, chunks: usize) -> Groups<'a> {
        let these = row * chunks * self.per_chunk..(row + 1) * chunks * self.per_chunk;
        Groups {
            scales: &self.scales[these.clone()],
            zeros: if Z { &self.zeros[these] } else { &[] },
            per_chunk: self.per_chunk,
        }
    }
}

impl<const Z: bool, const G: bool> Kernel for OneToken<'_, Z, G> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let all = self.0;
        let chunks = all.chunks::<Z>();
        let (x, sx, bytes) = ([all.x.values.as_ptr()], [all.x.scales], all.bytes);
        let mut row = 0;
        let (fours, rest) = all.data.split_at(in_fours::<S>(all.data.len() / bytes) * bytes);
        for four in fours.chunks_exact(4 * bytes) {
            if matches!(S::TILES, Tiles::Single) {
                break;
            }
            let groups = [0, 1, 2, 3].map(|r| all.groups::<Z>(row + r, chunks));
            // SAFETY: four rows; `chunks` checked the lengths.
            let sums = unsafe {
                int4::tile::<S, 4, 1, Z, G>(s, four.as_ptr(), bytes, groups, x, sx, Some(ahead(bytes)))
            };
            for (r, sum) in sums.iter().enumerate() {
                all.out.put(all.row + row + r, all.first, sum[0]);
            }
            row += 4;
        }
        for one in rest.chunks_exact(bytes) {
            let groups = [all.groups::<Z>(row, chunks)];
            // SAFETY: one row; `chunks` checked the lengths.
            let sums = unsafe { int4::tile::<S, 1, 1, Z, G>(s, one.as_ptr(), bytes, groups, x, sx, None) };
            all.out.put(all.row + row, all.first, sums[0][0]);
            row += 1;
        }
    }
}

impl<const Z: bool, const G: bool> Kernel for ManyTokens<'_, Z, G> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let all = self.0;
        let chunks = all.chunks::<Z>();
        let bytes = all.bytes;
        let mut row = 0;
        let pairs = if matches!(S::TILES, Tiles::Single) {
            0
        } else {
            all.data.len() / (2 * bytes)
        };
        let (pairs, rest) = all.data.split_at(pairs * 2 * bytes);
        for pair in pairs.chunks_exact(2 * bytes) {
            if matches!(S::TILES, Tiles::Single) {
                break;
            }
            let groups = [0, 1].map(|r| all.groups::<Z>(row + r, chunks));
            // SAFETY: two rows; `chunks` checked the lengths.
            unsafe { rows::<S, 2, Z, G>(s, pair.as_ptr(), &all, groups, chunks, row) };
            row += 2;
        }
        for one in rest.chunks_exact(bytes) {
            let groups = [all.groups::<Z>(row, chunks)];
            // SAFETY: one row; `chunks` checked the lengths.
            unsafe { rows::<S, 1, Z, G>(s, one.as_ptr(), &all, groups, chunks, row) };
            row += 1;
        }
    }
}

/// `R` rows from `data` on times all tokens.
///
/// # Safety
/// `R` rows at `data`; lengths as `Integers::chunks` checks them.
#[inline(always)]
unsafe fn rows<S: Simd, const R: usize, const Z: bool, const G: bool>(
    s: S,
    data: *const u8,
    all: &Integers<'_>,
    groups: [Groups<'_>; R],
    chunks: usize,
    row: usize,
) {
    let x = all.x;
    let mut token = 0;
    let mut ahead = Some(ahead(all.bytes));
    macro_rules! tiles {
        ($($tokens:literal),*) => {{$(
            // Eight are better taken as twice four than as six and two.
            while x.count - token >= $tokens && !($tokens == 6 && x.count - token == 8) {
                let mut at = [x.values.as_ptr(); $tokens];
                let mut sx = [x.scales; $tokens];
                for t in 0..$tokens {
                    at[t] = x.values[(token + t) * x.stride..].as_ptr();
                    sx[t] = &x.scales[(token + t) * chunks..][..chunks];
                }
                // SAFETY: the caller's promise.
                let sums = unsafe { int4::tile::<S, R, $tokens, Z, G>(s, data, all.bytes, groups, at, sx, ahead) };
                for (r, sums) in sums.iter().enumerate() {
                    for (t, sum) in sums.iter().enumerate() {
                        all.out.put(all.row + row + r, all.first + token + t, *sum);
                    }
                }
                token += $tokens;
                ahead = None;
            }
        )*}};
    }
    match S::TILES {
        Tiles::Large if R == 2 => tiles!(6, 4, 2, 1),
        _ => tiles!(1),
    }
}

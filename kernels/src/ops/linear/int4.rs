//! Tiles of an INT4 weight: exact integer sums per lane and chunk, scaled into F32 sums.

use super::order::INT4_VECTORS;
use super::tile::reduce;
use crate::cpu::weights::INT4_BLOCK;
use crate::simd::{LANES, Simd};

/// Bytes of a chunk.
const N: usize = INT4_BLOCK / 2;

/// Scales and zeros of a row, `per_chunk` of each for every chunk.
#[derive(Clone, Copy)]
pub(crate) struct Groups<'a> {
    pub(crate) scales: &'a [f32],
    /// Empty: all 8.
    pub(crate) zeros: &'a [i32],
    pub(crate) per_chunk: usize,
}

/// `R` rows of `bytes` bytes times `T` tokens (`x`: packed integers, `sx`: their scales, one per chunk). `Z`: the rows
/// have zeros; `G`: a chunk has several groups.
///
/// # Safety
/// `R * bytes` readable bytes at `data`; each token `INT4_VECTORS` vectors for every 64 bytes, rounded up.
#[inline(always)]
pub(crate) unsafe fn tile<S: Simd, const R: usize, const T: usize, const Z: bool, const G: bool>(
    s: S,
    data: *const u8,
    bytes: usize,
    groups: [Groups<'_>; R],
    x: [*const [f32; LANES]; T],
    sx: [&[f32]; T],
    ahead: Option<usize>,
) -> [[f32; T]; R] {
    let mut sums = [[s.splat(0.0); T]; R];
    let chunks = bytes.div_ceil(N);
    for groups in groups {
        let places = chunks * if G { groups.per_chunk } else { 1 };
        assert!(groups.scales.len() >= places && (!Z || groups.zeros.len() >= places));
    }
    assert!(sx.iter().all(|sx| sx.len() >= chunks));
    let mut next = data.wrapping_add(ahead.unwrap_or(0));
    // The scale of a row's group times that of a token's chunk, for 16 chunks at a time.
    let mut factors = [[[0.0; LANES]; T]; R];
    for first in (0..chunks).step_by(LANES) {
        let end = chunks.min(first + LANES);
        if products::<T, G>() {
            for t in 0..T {
                let sx = s.load_some(&sx[t][first..end]);
                for r in 0..R {
                    s.store(
                        s.mul(s.load_some(&groups[r].scales[first..end]), sx),
                        &mut factors[r][t],
                    );
                }
            }
        }
        for chunk in first..end {
            let mut at = [data; R];
            for (r, at) in at.iter_mut().enumerate() {
                *at = data.wrapping_add(r * bytes + chunk * N);
            }
            if ahead.is_some() {
                for r in 0..R {
                    s.prefetch(next.wrapping_add(r * N));
                }
                next = next.wrapping_add(R * N);
            }
            let whole = chunk * N + N <= bytes;
            if whole {
                // SAFETY: a whole chunk of each row; the caller vouches for the token's vectors; scales were
                // asserted above.
                unsafe { step::<S, R, T, Z, G>(s, &mut sums, at, groups, x, sx, &factors, chunk) };
            } else {
                let mut last = [[0; N]; R];
                let rest = bytes % N;
                for (last, at) in last.iter_mut().zip(at) {
                    // SAFETY: the row has `rest` bytes after its whole chunks.
                    last[..rest].copy_from_slice(unsafe { std::slice::from_raw_parts(at, rest) });
                }
                let at = last.each_ref().map(|last| last.as_ptr());
                // SAFETY: `last` has 64 bytes; the rest as above.
                unsafe { step::<S, R, T, Z, G>(s, &mut sums, at, groups, x, sx, &factors, chunk) };
            }
        }
    }
    reduce(s, sums)
}

/// Whether products of scales are prepared for several chunks; for one token, and where a chunk has several groups,
/// they are made as they are needed.
const fn products<const T: usize, const G: bool>() -> bool {
    T > 1 && !G
}

/// Adds one chunk.
///
/// # Safety
/// 64 readable bytes at each of `rows`; each token has this chunk, and a scale for it; each row its groups.
#[expect(
    clippy::too_many_arguments,
    clippy::needless_range_loop,
    reason = "an inlined loop body: arrays of registers, indexed by constants"
)]
#[inline(always)]
unsafe fn step<S: Simd, const R: usize, const T: usize, const Z: bool, const G: bool>(
    s: S,
    sums: &mut [[S::F; T]; R],
    rows: [*const u8; R],
    groups: [Groups<'_>; R],
    x: [*const [f32; LANES]; T],
    sx: [&[f32]; T],
    factors: &[[[f32; LANES]; T]; R],
    chunk: usize,
) {
    let mut q = [[s.splat_i32(0); 4]; R];
    let mut scales = [s.splat(0.0); R];
    for r in 0..R {
        // SAFETY: the caller vouches for 64 bytes.
        q[r] = s.int4x128(unsafe { &*rows[r].cast() });
        let Groups {
            scales: all,
            zeros,
            per_chunk,
        } = groups[r];
        let per_chunk = if G { per_chunk } else { 1 };
        let these = chunk * per_chunk..(chunk + 1) * per_chunk;
        if !products::<T, G>() {
            // SAFETY: the caller vouches for the chunk's groups.
            let scale = unsafe { all.get_unchecked(these.clone()) };
            scales[r] = if G { s.spread(scale) } else { s.splat(scale[0]) };
        }
        if Z {
            // SAFETY: the caller vouches for the chunk's groups.
            let zero = unsafe { zeros.get_unchecked(these) };
            let zero = if G {
                s.spread_i32(zero)
            } else {
                s.splat_i32(zero[0])
            };
            for n in 0..4 {
                q[r][n] = s.sub_i16(q[r][n], zero);
            }
        }
    }
    for t in 0..T {
        let x = x[t].wrapping_add(chunk * INT4_VECTORS);
        // Without zeros of its own a row subtracts 8 from each q: -8 times the sum of the inputs, for all rows.
        // SAFETY: the caller vouches for the chunk's vectors; an i32 has the layout of an f32.
        let start = if Z {
            s.splat_i32(0)
        } else {
            // SAFETY: as above.
            s.load_i32(unsafe { &*x.add(4).cast() })
        };
        let mut dots = [start; R];
        let sx = if products::<T, G>() {
            s.splat(0.0)
        } else {
            // SAFETY: the caller vouches for the chunk's scale.
            s.splat(unsafe { *sx[t].get_unchecked(chunk) })
        };
        for n in 0..4 {
            // SAFETY: as above.
            let x = s.load_i32(unsafe { &*x.add(n).cast() });
            for r in 0..R {
                dots[r] = s.dot_i16(dots[r], q[r][n], x);
            }
        }
        for r in 0..R {
            let factor = if products::<T, G>() {
                s.splat(factors[r][t][chunk % LANES])
            } else {
                s.mul(scales[r], sx)
            };
            sums[r][t] = s.fma(s.to_f32(dots[r]), factor, sums[r][t]);
        }
    }
}

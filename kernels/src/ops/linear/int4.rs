//! Tiles of an INT4 weight: exact integer sums per lane and chunk, scaled into F32 sums.

use super::pack::INT4_VECTORS;
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

/// `Z`: the rows have zeros. `R` rows of `bytes` bytes times `T` tokens (`x`: packed integers, `sx`: their scales, one per chunk).
///
/// # Safety
/// Each row must have `bytes` readable bytes; each token `INT4_VECTORS` vectors and a scale for every 64 bytes, rounded up.
#[inline(always)]
pub(crate) unsafe fn tile<S: Simd, const R: usize, const T: usize, const Z: bool>(
    s: S,
    rows: [*const u8; R],
    bytes: usize,
    groups: [Groups<'_>; R],
    x: [*const [f32; LANES]; T],
    sx: [*const f32; T],
    ahead: Option<usize>,
) -> [[f32; T]; R] {
    let mut sums = [[s.splat(0.0); T]; R];
    let whole = bytes / N;
    let base = rows[0];
    let mut rows = rows;
    for chunk in 0..whole {
        if let Some(ahead) = ahead {
            let next = base.wrapping_add(ahead + chunk * R * N);
            for r in 0..R {
                s.prefetch(next.wrapping_add(r * N));
            }
        }
        // SAFETY: `chunk` is below the row's whole chunks, so that 64 bytes and the vectors are there.
        unsafe { step::<S, R, T, Z>(s, &mut sums, rows, groups, x, sx, chunk) };
        rows = rows.map(|row| row.wrapping_add(N));
    }
    let rest = bytes % N;
    if rest != 0 {
        let mut last = [[0; N]; R];
        for (last, row) in last.iter_mut().zip(rows) {
            // SAFETY: the row has `rest` bytes more.
            last[..rest].copy_from_slice(unsafe { std::slice::from_raw_parts(row, rest) });
        }
        // SAFETY: `last` has 64 bytes; the token has the vectors of the last, partial chunk too.
        unsafe {
            step::<S, R, T, Z>(
                s,
                &mut sums,
                last.each_ref().map(|last| last.as_ptr()),
                groups,
                x,
                sx,
                whole,
            )
        };
    }
    reduce(s, sums)
}

/// Adds one chunk.
///
/// # Safety
/// 64 readable bytes at each of `rows`; each token has this chunk.
#[inline(always)]
unsafe fn step<S: Simd, const R: usize, const T: usize, const Z: bool>(
    s: S,
    sums: &mut [[S::F; T]; R],
    rows: [*const u8; R],
    groups: [Groups<'_>; R],
    x: [*const [f32; LANES]; T],
    sx: [*const f32; T],
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
        let these = chunk * per_chunk..(chunk + 1) * per_chunk;
        scales[r] = if per_chunk == 1 {
            s.splat(all[chunk])
        } else {
            s.spread(&all[these.clone()])
        };
        if Z {
            let zero = if per_chunk == 1 {
                s.splat_i32(zeros[chunk])
            } else {
                s.spread_i32(&zeros[these])
            };
            for n in 0..4 {
                q[r][n] = s.sub_i16(q[r][n], zero);
            }
        }
    }
    for t in 0..T {
        // SAFETY: the caller vouches for the chunk's scale.
        let sx = s.splat(unsafe { *sx[t].add(chunk) });
        let mut values = [s.splat_i32(0); INT4_VECTORS];
        for n in 0..INT4_VECTORS {
            // SAFETY: the caller vouches for the chunk's vectors; an i32 has the layout of an f32.
            values[n] = s.load_i32(unsafe { &*x[t].add(chunk * INT4_VECTORS + n).cast() });
        }
        for r in 0..R {
            // Without zeros of its own a row subtracts 8 from each q: -8 times the sum of the inputs, for all rows.
            let mut dot = if Z { s.splat_i32(0) } else { values[4] };
            for n in 0..4 {
                dot = s.dot_i16(dot, q[r][n], values[n]);
            }
            sums[r][t] = s.fma(s.mul(s.to_f32(dot), sx), scales[r], sums[r][t]);
        }
    }
}

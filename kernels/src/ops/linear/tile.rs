//! Tiles: some rows of a weight times some tokens, sums kept in registers.
//!
//! Must stay true: an element's sum does not depend on the tile it is computed in.

use crate::simd::{LANES, Simd};

/// How a float format's bytes become vectors: `N` bytes, `V` vectors.
pub(crate) trait Decode<const N: usize, const V: usize>: Copy {
    fn decode<S: Simd>(s: S, bytes: &[u8; N]) -> [S::F; V];
}

#[derive(Clone, Copy)]
pub(crate) struct F32;
#[derive(Clone, Copy)]
pub(crate) struct F16;
#[derive(Clone, Copy)]
pub(crate) struct Bf16;
#[derive(Clone, Copy)]
pub(crate) struct E4m3;
#[derive(Clone, Copy)]
pub(crate) struct E5m2;

impl Decode<64, 1> for F32 {
    #[inline(always)]
    fn decode<S: Simd>(s: S, bytes: &[u8; 64]) -> [S::F; 1] {
        [s.f32x16(bytes)]
    }
}

impl Decode<32, 1> for F16 {
    #[inline(always)]
    fn decode<S: Simd>(s: S, bytes: &[u8; 32]) -> [S::F; 1] {
        [s.f16x16(bytes)]
    }
}

impl Decode<64, 2> for Bf16 {
    #[inline(always)]
    fn decode<S: Simd>(s: S, bytes: &[u8; 64]) -> [S::F; 2] {
        s.bf16x32(bytes)
    }
}

impl Decode<64, 4> for E4m3 {
    #[inline(always)]
    fn decode<S: Simd>(s: S, bytes: &[u8; 64]) -> [S::F; 4] {
        s.e4m3x64(bytes)
    }
}

impl Decode<16, 1> for E5m2 {
    #[inline(always)]
    fn decode<S: Simd>(s: S, bytes: &[u8; 16]) -> [S::F; 1] {
        [s.e5m2x16(bytes)]
    }
}

/// `R` rows of `bytes` bytes each, one after the other from `data` on, times `T` tokens that begin at `x`. `ahead`: so
/// many bytes further on the weight is read next.
///
/// # Safety
/// `R * bytes` readable bytes at `data`; each token `V` vectors for every `N` bytes of a row, rounded up.
#[inline(always)]
pub(crate) unsafe fn tile<S, D, const N: usize, const V: usize, const R: usize, const T: usize>(
    s: S,
    data: *const u8,
    bytes: usize,
    x: [*const [f32; LANES]; T],
    ahead: Option<usize>,
) -> [[f32; T]; R]
where
    S: Simd,
    D: Decode<N, V>,
{
    let mut rows = [data; R];
    for (r, row) in rows.iter_mut().enumerate() {
        *row = data.wrapping_add(r * bytes);
    }
    // SAFETY: the caller's promise.
    unsafe { tile_of::<S, D, N, V, R, T>(s, rows, bytes, x, ahead) }
}

/// The same with rows anywhere.
///
/// # Safety
/// `bytes` readable bytes at each of `rows`; tokens as for [`tile`].
#[inline(always)]
pub(crate) unsafe fn tile_of<S, D, const N: usize, const V: usize, const R: usize, const T: usize>(
    s: S,
    rows: [*const u8; R],
    bytes: usize,
    x: [*const [f32; LANES]; T],
    ahead: Option<usize>,
) -> [[f32; T]; R]
where
    S: Simd,
    D: Decode<N, V>,
{
    let mut sums = [[s.splat(0.0); T]; R];
    let whole = bytes / N;
    let mut next = rows[0].wrapping_add(ahead.unwrap_or(0));
    for at in 0..whole {
        if ahead.is_some() {
            for r in 0..R {
                s.prefetch(next.wrapping_add(r * N));
            }
            next = next.wrapping_add(R * N);
        }
        let rows = rows.map(|row| row.wrapping_add(at * N));
        // SAFETY: `at` is below the row's whole steps, so that `N` bytes and `V` vectors are there.
        unsafe { step::<S, D, N, V, R, T>(s, &mut sums, rows, x, at) };
    }
    let rest = bytes % N;
    if rest != 0 {
        let mut last = [[0; N]; R];
        for (last, row) in last.iter_mut().zip(rows) {
            let from = row.wrapping_add(whole * N);
            // SAFETY: the row has `rest` bytes after its whole steps.
            last[..rest].copy_from_slice(unsafe { std::slice::from_raw_parts(from, rest) });
        }
        let rows = last.each_ref().map(|last| last.as_ptr());
        // SAFETY: `last` has `N` bytes; the token has `V` vectors for the last, partial step too.
        unsafe { step::<S, D, N, V, R, T>(s, &mut sums, rows, x, whole) };
    }
    reduce(s, sums)
}

/// Adds step `at` of the rows: `N` bytes of each.
///
/// # Safety
/// `N` readable bytes at each of `rows`, `V` vectors at `x[t] + at * V`.
#[expect(
    clippy::needless_range_loop,
    reason = "an inlined loop body: arrays of registers, indexed by constants"
)]
#[inline(always)]
unsafe fn step<S, D, const N: usize, const V: usize, const R: usize, const T: usize>(
    s: S,
    sums: &mut [[S::F; T]; R],
    rows: [*const u8; R],
    x: [*const [f32; LANES]; T],
    at: usize,
) where
    S: Simd,
    D: Decode<N, V>,
{
    let mut w = [[s.splat(0.0); V]; R];
    for r in 0..R {
        // SAFETY: the caller vouches for `N` bytes.
        w[r] = D::decode(s, unsafe { &*rows[r].cast() });
    }
    for v in 0..V {
        for t in 0..T {
            // SAFETY: the caller vouches for `V` vectors.
            let x = s.load(unsafe { &*x[t].add(at * V + v) });
            for r in 0..R {
                sums[r][t] = s.fma(w[r][v], x, sums[r][t]);
            }
        }
    }
}

/// The fixed tree over the lanes of each sum.
#[inline(always)]
pub(super) fn reduce<S: Simd, const R: usize, const T: usize>(s: S, sums: [[S::F; T]; R]) -> [[f32; T]; R] {
    let mut out = [[0.0; T]; R];
    let sums = sums.as_flattened();
    let (fours, rest) = out.as_flattened_mut().as_chunks_mut::<4>();
    for (i, four) in fours.iter_mut().enumerate() {
        *four = s.sum4([sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]]);
    }
    let first = sums.len() - rest.len();
    for (i, rest) in rest.iter_mut().enumerate() {
        *rest = s.sum(sums[first + i]);
    }
    out
}

//! Rows of keys and values of one block: where they are, products with them.

use std::ops::Range;

use super::BLOCK;
use crate::cpu::kv::KvCache;
use crate::ops::linear::{Decode, tile_of};
use crate::simd::{LANES, Simd, Tiles};

/// Where the keys and values of a block are.
pub(super) struct BlockRows {
    pub(super) keys: [*const u8; BLOCK],
    pub(super) values: [*const u8; BLOCK],
    count: usize,
}

impl BlockRows {
    pub(super) fn keys(&self) -> &[*const u8] {
        &self.keys[..self.count]
    }
}

/// The rows of one KV head at some positions of one block.
pub(super) fn look_up(cache: &KvCache, pages: &[u32], kv_head: usize, positions: Range<usize>) -> BlockRows {
    let mut rows = BlockRows {
        keys: [std::ptr::null(); BLOCK],
        values: [std::ptr::null(); BLOCK],
        count: positions.len(),
    };
    let bytes = cache.row_bytes();
    let (keys, values) = (cache.keys.bytes(), cache.values.bytes());
    let mut j = 0;
    while j < positions.len() {
        // Within a page, rows follow each other.
        let position = positions.start + j;
        let first = cache.row(pages, position, kv_head);
        let count = (cache.page_tokens - position % cache.page_tokens).min(positions.len() - j);
        // The slices make sure that whole rows are there.
        let (keys, values) = (
            &keys[first..first + count * bytes],
            &values[first..first + count * bytes],
        );
        for i in 0..count {
            rows.keys[j + i] = keys[i * bytes..].as_ptr();
            rows.values[j + i] = values[i * bytes..].as_ptr();
        }
        j += count;
    }
    rows
}

/// Asks for a row of `bytes` bytes.
#[inline(always)]
fn prefetch_row<S: Simd>(s: S, row: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(64) {
        s.prefetch(row.wrapping_add(line));
    }
}

/// `scores[g][j] = key j . query g`. On the way, the rows of `ahead` are asked for.
///
/// # Safety
/// Each key must have `bytes` readable bytes, `vectors` vectors when decoded; `packed` is `[group, vectors]`.
#[inline(always)]
pub(super) unsafe fn dots<S, D, const N: usize, const V: usize>(
    s: S,
    keys: &[*const u8],
    bytes: usize,
    packed: &[[f32; LANES]],
    vectors: usize,
    scores: &mut [[f32; BLOCK]],
    ahead: &[*const u8],
) where
    S: Simd,
    D: Decode<N, V>,
{
    let group = scores.len();
    assert!(packed.len() == group * vectors && bytes / N * V == vectors);
    let (fours, rest) = keys.as_chunks::<4>();
    macro_rules! tiles {
        ($rows:expr, $r:literal, $first:expr, $($queries:literal),*) => {{
            let mut g = 0;
            $(while group - g >= $queries {
                let mut x = [packed.as_ptr(); $queries];
                for (t, x) in x.iter_mut().enumerate() {
                    *x = packed[(g + t) * vectors..].as_ptr();
                }
                // SAFETY: the caller's promise, and the assertion.
                let dots = unsafe { tile_of::<S, D, N, V, $r, $queries>(s, $rows, bytes, x, None) };
                for (r, dots) in dots.iter().enumerate() {
                    for (t, dot) in dots.iter().enumerate() {
                        scores[g + t][$first + r] = *dot;
                    }
                }
                g += $queries;
            })*
        }};
    }
    for (i, rows) in fours.iter().enumerate() {
        for row in ahead.iter().skip(4 * i).take(4) {
            prefetch_row(s, *row, bytes);
        }
        match S::TILES {
            Tiles::Large => tiles!(*rows, 4, 4 * i, 4, 2, 1),
            Tiles::Small => tiles!(*rows, 4, 4 * i, 1),
            Tiles::Single => {
                for (j, row) in rows.iter().enumerate() {
                    tiles!([*row], 1, 4 * i + j, 1);
                }
            }
        }
    }
    for (i, row) in rest.iter().enumerate() {
        tiles!([*row], 1, 4 * fours.len() + i, 1);
    }
}

/// `sums[g] += p[g][j] * value j`, ascending j. On the way, the rows of `ahead` are asked for.
///
/// # Safety
/// Each value must have `vectors` vectors when decoded; `sums` is `[group, vectors]`.
#[inline(always)]
pub(super) unsafe fn weighted<S, D, const N: usize, const V: usize>(
    s: S,
    values: &[*const u8],
    bytes: usize,
    p: &[[f32; BLOCK]],
    sums: &mut [[f32; LANES]],
    vectors: usize,
    ahead: &[*const u8],
) where
    S: Simd,
    D: Decode<N, V>,
{
    let chunks = vectors / V;
    assert!(sums.len() == p.len() * vectors && values.len() <= BLOCK);
    let mut g = 0;
    macro_rules! tiles {
        ($($queries:literal),*) => {{$(
            while p.len() - g >= $queries {
                let p: &[[f32; BLOCK]; $queries] = p[g..g + $queries].as_array().expect("the length of the slice");
                for chunk in 0..chunks {
                    // A part of the rows with each chunk.
                    let each = ahead.len().div_ceil(chunks);
                    for row in ahead.iter().skip(if g == 0 { chunk * each } else { BLOCK }).take(each) {
                        prefetch_row(s, *row, bytes);
                    }
                    // SAFETY: the caller's promise: chunk `chunk` of each value is there.
                    unsafe { weighted_tile::<S, D, N, V, $queries>(s, values, p, &mut sums[g * vectors..], vectors, chunk) };
                }
                g += $queries;
            }
        )*}};
    }
    match S::TILES {
        Tiles::Large => tiles!(4, 2, 1),
        Tiles::Small => tiles!(2, 1),
        Tiles::Single => tiles!(1),
    }
}

/// One chunk of all values into the sums of `T` queries.
///
/// # Safety
/// Chunk `chunk` of each value must be readable.
#[inline(always)]
unsafe fn weighted_tile<S, D, const N: usize, const V: usize, const T: usize>(
    s: S,
    values: &[*const u8],
    p: &[[f32; BLOCK]; T],
    sums: &mut [[f32; LANES]],
    vectors: usize,
    chunk: usize,
) where
    S: Simd,
    D: Decode<N, V>,
{
    let mut acc = [[s.splat(0.0); V]; T];
    for t in 0..T {
        for v in 0..V {
            acc[t][v] = s.load(&sums[t * vectors + chunk * V + v]);
        }
    }
    for (j, value) in values.iter().enumerate() {
        // SAFETY: the caller's promise.
        let value = D::decode(s, unsafe { &*value.add(chunk * N).cast() });
        for t in 0..T {
            let p = s.splat(p[t][j]);
            for v in 0..V {
                acc[t][v] = s.fma(p, value[v], acc[t][v]);
            }
        }
    }
    for t in 0..T {
        for v in 0..V {
            s.store(acc[t][v], &mut sums[t * vectors + chunk * V + v]);
        }
    }
}

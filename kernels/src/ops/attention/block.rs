//! Some tokens of one run and the query heads of one KV head.

use super::{BLOCK, TASK_TOKENS};
use crate::backend::{KvDtype, Result};
use crate::cpu::engine::Rows;
use crate::cpu::kv::KvCache;
use crate::cpu::memory::Memory;
use crate::ops::linear::{Bf16, Decode, E4m3, E5m2, F32, Order, permute, restore, tile_of};
use crate::simd::{Kernel, LANES, Simd, Tiles, math};

/// Scratch of one thread. A query is one head of one token.
pub(crate) struct Scratch {
    /// `[queries, vectors]`: scaled, in the order of the cache's type.
    queries: Memory,
    /// `[queries, vectors]`: running output.
    sums: Memory,
    /// `[queries, 16]`: running denominator.
    denominators: Memory,
    /// `[queries]`: running maximum.
    largest: Memory,
    /// `[group, BLOCK]`: scores, then probabilities, of one token.
    scores: Memory,
}

impl Scratch {
    /// For heads padded to `vectors` vectors, in groups of at most `super::MAX_GROUP`.
    pub(crate) fn new(vectors: usize) -> Result<Scratch> {
        let queries = if vectors == 0 {
            0
        } else {
            TASK_TOKENS * super::MAX_GROUP
        };
        let words = |count: usize| Memory::words(queries * count, "attention scratch");
        Ok(Scratch {
            queries: words(vectors * LANES)?,
            sums: words(vectors * LANES)?,
            denominators: words(LANES)?,
            largest: words(1)?,
            scores: words(BLOCK)?,
        })
    }

    /// Whether heads of so many vectors fit.
    pub(crate) fn fits(&self, vectors: usize) -> bool {
        vectors * LANES * 4 * TASK_TOKENS * super::MAX_GROUP <= self.queries.len()
    }
}

/// Lanes of a row of the cache.
pub(super) fn order(dtype: KvDtype) -> Order {
    match dtype {
        KvDtype::F32 | KvDtype::Fp8E5m2 => Order::Natural,
        KvDtype::Bf16 => Order::Pairs,
        KvDtype::Fp8E4m3 => Order::Fp8,
    }
}

/// Decoded values times this are the cache's.
fn unit(dtype: KvDtype) -> f32 {
    if dtype == KvDtype::Fp8E4m3 { 256.0 } else { 1.0 }
}

/// One task.
pub(super) struct Attend<'a> {
    pub(super) cache: &'a KvCache,
    pub(super) pages: &'a [u32],
    pub(super) kv_head: usize,
    /// Query heads of the KV head.
    pub(super) group: usize,
    /// Position of the first token.
    pub(super) position: usize,
    pub(super) tokens: usize,
    /// The first token's queries; the next token's are `stride` further on.
    pub(super) q: &'a [f32],
    pub(super) stride: usize,
    /// `[tokens * kv heads * group, head_dim]`.
    pub(super) out: &'a Rows<'a, f32>,
    /// Row of the first token's heads in `out`, in groups, and from there to the next token's.
    pub(super) first_row: usize,
    pub(super) row_step: usize,
    pub(super) scratch: &'a mut Scratch,
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.cache.dtype {
            KvDtype::F32 => attend::<S, F32, 64, 1>(s, self),
            KvDtype::Bf16 => attend::<S, Bf16, 64, 2>(s, self),
            KvDtype::Fp8E4m3 => attend::<S, E4m3, 64, 4>(s, self),
            KvDtype::Fp8E5m2 => attend::<S, E5m2, 16, 1>(s, self),
        }
    }
}

#[inline(always)]
fn attend<S, D, const N: usize, const V: usize>(s: S, task: Attend<'_>)
where
    S: Simd,
    D: Decode<N, V>,
{
    let Attend {
        cache,
        pages,
        kv_head,
        group,
        position,
        tokens,
        q,
        stride,
        out,
        first_row,
        row_step,
        scratch,
    } = task;
    let dim = cache.head_dim;
    let vectors = order(cache.dtype).vectors(dim);
    let queries = tokens * group;
    let packed = &mut scratch.queries.f32_mut().as_chunks_mut::<LANES>().0[..queries * vectors];
    let sums = &mut scratch.sums.f32_mut().as_chunks_mut::<LANES>().0[..queries * vectors];
    let denominators = &mut scratch.denominators.f32_mut().as_chunks_mut::<LANES>().0[..queries];
    let largest = &mut scratch.largest.f32_mut()[..queries];
    let scores = &mut scratch.scores.f32_mut().as_chunks_mut::<BLOCK>().0[..group];

    let factor = 1.0 / (dim as f32).sqrt() * unit(cache.dtype);
    for t in 0..tokens {
        let q = &q[t * stride..][..group * dim];
        for (q, packed) in q
            .chunks_exact(dim)
            .zip(packed[t * group * vectors..].chunks_exact_mut(vectors))
        {
            permute(s, order(cache.dtype), q, factor, packed);
        }
    }
    sums.as_flattened_mut().fill(0.0);
    denominators.as_flattened_mut().fill(0.0);
    largest.fill(f32::NEG_INFINITY);

    let bytes = cache.row_bytes();
    let end = position + tokens;
    let mut keys = [std::ptr::null(); BLOCK];
    let mut values = [std::ptr::null(); BLOCK];
    for first in (0..end).step_by(BLOCK) {
        let mut at = 0;
        for j in 0..BLOCK.min(end - first) {
            // Within a page, rows follow each other.
            at = if j == 0 || (first + j).is_multiple_of(cache.page_tokens) {
                cache.row(pages, first + j, kv_head)
            } else {
                at + bytes
            };
            // The slices make sure that a whole row is there.
            keys[j] = cache.keys.bytes()[at..at + bytes].as_ptr();
            values[j] = cache.values.bytes()[at..at + bytes].as_ptr();
        }
        for t in first.saturating_sub(position)..tokens {
            let count = (position + t + 1 - first).min(BLOCK);
            let these = t * group..(t + 1) * group;
            let packed = &packed[these.start * vectors..these.end * vectors];
            let sums = &mut sums[these.start * vectors..these.end * vectors];
            // SAFETY: `count` rows of keys and values were looked up; lengths are those of the cache.
            unsafe {
                dots::<S, D, N, V>(s, &keys[..count], bytes, packed, vectors, scores);
                softmax(
                    s,
                    count,
                    scores,
                    &mut largest[these.clone()],
                    &mut denominators[these],
                    sums,
                    vectors,
                );
                weighted::<S, D, N, V>(s, &values[..count], scores, sums, vectors);
            }
        }
    }
    // Rows of `out` are the outputs of one token's heads of one KV head.
    let unit = s.splat(unit(cache.dtype));
    let results = sums.chunks_exact_mut(vectors).zip(&*denominators);
    for (i, (sums, denominator)) in results.enumerate() {
        let l = s.splat(s.sum(s.load(denominator)));
        for sum in &mut *sums {
            s.store(s.div(s.mul(s.load(sum), unit), l), sum);
        }
        let row = (first_row + i / group * row_step) * group + i % group;
        // SAFETY: each token and KV head is in one task.
        restore(order(cache.dtype), sums, unsafe { out.take(row..row + 1) });
    }
}

/// `scores[g][j] = key j . query g`.
///
/// # Safety
/// Each key must have `bytes` readable bytes, `vectors` vectors when decoded; `packed` is `[group, vectors]`.
#[inline(always)]
unsafe fn dots<S, D, const N: usize, const V: usize>(
    s: S,
    keys: &[*const u8],
    bytes: usize,
    packed: &[[f32; LANES]],
    vectors: usize,
    scores: &mut [[f32; BLOCK]],
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

/// Scores become probabilities relative to the new maximum; sums and denominators are brought to it.
#[inline(always)]
fn softmax<S: Simd>(
    s: S,
    count: usize,
    scores: &mut [[f32; BLOCK]],
    largest: &mut [f32],
    denominators: &mut [[f32; LANES]],
    sums: &mut [[f32; LANES]],
    vectors: usize,
) {
    let states = largest
        .iter_mut()
        .zip(denominators)
        .zip(sums.chunks_exact_mut(vectors));
    for (scores, ((largest, denominator), sums)) in scores.iter_mut().zip(states) {
        let before = *largest;
        let mut after = before;
        for score in &scores[..count] {
            after = if *score > after { *score } else { after };
        }
        *largest = after;
        let mut l = s.load(denominator);
        if after != before {
            let scale = math::exp(s, s.sub(s.splat(before), s.splat(after)));
            l = s.mul(l, scale);
            for sum in sums {
                s.store(s.mul(s.load(sum), scale), sum);
            }
        }
        let chunks = scores.as_chunks_mut::<LANES>().0;
        for (i, chunk) in chunks[..count.div_ceil(LANES)].iter_mut().enumerate() {
            let p = math::exp(s, s.sub(s.load(chunk), s.splat(after)));
            s.store(p, chunk);
            // Positions after the token's own have no part in it.
            chunk[(count - i * LANES).min(LANES)..].fill(0.0);
            l = s.add(l, s.load(chunk));
        }
        s.store(l, denominator);
    }
}

/// `sums[g] += p[g][j] * value j`, ascending j.
///
/// # Safety
/// Each value must have `vectors` vectors when decoded; `sums` is `[group, vectors]`.
#[inline(always)]
unsafe fn weighted<S, D, const N: usize, const V: usize>(
    s: S,
    values: &[*const u8],
    p: &[[f32; BLOCK]],
    sums: &mut [[f32; LANES]],
    vectors: usize,
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

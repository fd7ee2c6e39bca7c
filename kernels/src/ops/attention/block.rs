//! Some tokens of one run and the query heads of one KV head.

use super::rows::{dots, look_up, weighted};
use super::{BLOCK, TASK_TOKENS};
use crate::backend::{KvDtype, Result};
use crate::cpu::engine::Rows;
use crate::cpu::kv::KvCache;
use crate::cpu::memory::Memory;
use crate::ops::linear::{Bf16, Decode, E4m3, E5m2, F32, Order, permute, restore};
use crate::simd::{Kernel, LANES, Simd, math};

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
    let mut rows = look_up(cache, pages, kv_head, 0..BLOCK.min(end));
    for first in (0..end).step_by(BLOCK) {
        let next = look_up(
            cache,
            pages,
            kv_head,
            end.min(first + BLOCK)..end.min(first + 2 * BLOCK),
        );
        let first_token = first.saturating_sub(position);
        for t in first_token..tokens {
            let count = (position + t + 1 - first).min(BLOCK);
            let these = t * group..(t + 1) * group;
            let packed = &packed[these.start * vectors..these.end * vectors];
            let sums = &mut sums[these.start * vectors..these.end * vectors];
            // The first token's way through a block asks for what comes next; later tokens find it in the cache.
            let fresh = t == first_token;
            let (values, keys) = if fresh {
                (&rows.values[..count], next.keys())
            } else {
                (&[][..], &[][..])
            };
            // SAFETY: `count` rows of keys and values were looked up; lengths are those of the cache.
            unsafe {
                dots::<S, D, N, V>(s, &rows.keys[..count], bytes, packed, vectors, scores, values);
                let (largest, denominators) = (&mut largest[these.clone()], &mut denominators[these]);
                softmax(s, count, scores, largest, denominators, sums, vectors);
                weighted::<S, D, N, V>(s, &rows.values[..count], bytes, scores, sums, vectors, keys);
            }
        }
        rows = next;
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

//! Attention: `out = softmax(q k / sqrt(head_dim)) v` of each token over its sequence's positions up to its own.
//!
//! Query head h reads KV head `h / (heads / kv_heads)`. Positions are taken in blocks of [`BLOCK`] from 0, whatever
//! the page size and however the prompt is cut into steps, by online softmax:
//! `m' = max(m, max s); a = e^(m - m'); p = e^(s - m'); l = l a + p; o = o a + sum of p v` (ascending positions, fused
//! multiply-add), at the end `o / l`. A score is a dot product as in `ops::linear` (BF16: pairs, e4m3: FP8 order, F32 and
//! e5m2: natural) of the key with `q * (1 / sqrt(head_dim))`; l has 16 lanes, position mod 16, added by the fixed tree.

use crate::backend::KvDtype;
use crate::cpu::kv::KvCache;
use crate::simd::{Isa, Kernel, LANES, Simd, math, run};

/// Positions per step of the online softmax.
pub(crate) const BLOCK: usize = 64;
/// Longest head, so that accumulators have a fixed size.
pub(crate) const MAX_HEAD_DIM: usize = 512;

/// One query head of one token at `position`.
pub(crate) struct Query<'a> {
    pub(crate) cache: &'a KvCache,
    pub(crate) pages: &'a [u32],
    pub(crate) position: usize,
    pub(crate) kv_head: usize,
    pub(crate) q: &'a [f32],
    pub(crate) out: &'a mut [f32],
}

pub(crate) fn attend(isa: Isa, query: Query<'_>) {
    run(isa, query);
}

/// Place of value `i` of a head among the decoded vectors.
fn place(dtype: KvDtype, i: usize) -> usize {
    match dtype {
        KvDtype::Bf16 => i / 32 * 32 + i % 2 * LANES + i % 32 / 2,
        KvDtype::Fp8E4m3 => i / 64 * 64 + (i % 16 / 8 * 2 + i % 2) * LANES + i % 64 / 16 * 4 + i % 8 / 2,
        KvDtype::F32 | KvDtype::Fp8E5m2 => i,
    }
}

/// Decodes a row of the cache to F32 vectors; e4m3 times 2^-8.
#[inline(always)]
fn decode<S: Simd>(s: S, dtype: KvDtype, row: &[u8], out: &mut [[f32; LANES]]) {
    match dtype {
        KvDtype::F32 => {
            for (chunk, out) in row.as_chunks::<64>().0.iter().zip(out) {
                s.store(s.f32x16(chunk), out);
            }
        }
        KvDtype::Bf16 => {
            for (chunk, out) in row.as_chunks::<64>().0.iter().zip(out.as_chunks_mut::<2>().0) {
                s.bf16x32(chunk)
                    .into_iter()
                    .zip(out)
                    .for_each(|(v, out)| s.store(v, out));
            }
        }
        KvDtype::Fp8E4m3 => {
            for (chunk, out) in row.as_chunks::<64>().0.iter().zip(out.as_chunks_mut::<4>().0) {
                s.e4m3x64(chunk)
                    .into_iter()
                    .zip(out)
                    .for_each(|(v, out)| s.store(v, out));
            }
        }
        KvDtype::Fp8E5m2 => {
            for (chunk, out) in row.as_chunks::<16>().0.iter().zip(out) {
                *out = chunk.map(crate::cpu::float8::e5m2_to_f32);
            }
        }
    }
}

impl Kernel for Query<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        const VECTORS: usize = MAX_HEAD_DIM / LANES;
        let Query {
            cache,
            pages,
            position,
            kv_head,
            q,
            out,
        } = self;
        let dtype = cache.dtype;
        let (row, dim) = (cache.row_bytes(), cache.head_dim);
        let vectors = dim.next_multiple_of(64) / LANES;
        let unit = if dtype == KvDtype::Fp8E4m3 { 256.0 } else { 1.0 };
        let factor = 1.0 / (dim as f32).sqrt() * unit;
        let mut packed = [[0.0; LANES]; VECTORS];
        for (i, q) in q.iter().enumerate() {
            packed.as_flattened_mut()[place(dtype, i)] = q * factor;
        }
        let mut decoded = [[0.0; LANES]; VECTORS];
        let mut sum = [[0.0; LANES]; VECTORS];
        let mut largest = f32::NEG_INFINITY;
        let mut l = s.splat(0.0);
        for first in (0..=position).step_by(BLOCK) {
            let count = (position + 1 - first).min(BLOCK);
            let mut p = [f32::NEG_INFINITY; BLOCK];
            for (j, p) in p[..count].iter_mut().enumerate() {
                let at = cache.row(pages, first + j, kv_head);
                decode(s, dtype, &cache.keys.bytes()[at..at + row], &mut decoded);
                let mut dot = s.splat(0.0);
                for (q, k) in packed[..vectors].iter().zip(&decoded) {
                    dot = s.fma(s.load(k), s.load(q), dot);
                }
                *p = s.sum(dot);
            }
            let before = largest;
            largest = p[..count]
                .iter()
                .fold(largest, |a, b| if *b > a { *b } else { a });
            let mut scaling = [0.0; LANES];
            s.store(
                math::exp(s, s.sub(s.splat(before), s.splat(largest))),
                &mut scaling,
            );
            let scaling = s.splat(scaling[0]);
            l = s.mul(l, scaling);
            for (i, chunk) in p.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                let e = math::exp(s, s.sub(s.load(chunk), s.splat(largest)));
                s.store(e, chunk);
                chunk[count.saturating_sub(i * LANES).min(LANES)..].fill(0.0);
                l = s.add(l, s.load(chunk));
            }
            for sum in &mut sum[..vectors] {
                s.store(s.mul(s.load(sum), scaling), sum);
            }
            for (j, p) in p[..count].iter().enumerate() {
                let at = cache.row(pages, first + j, kv_head);
                decode(s, dtype, &cache.values.bytes()[at..at + row], &mut decoded);
                for (sum, v) in sum[..vectors].iter_mut().zip(&decoded) {
                    s.store(s.fma(s.splat(*p), s.load(v), s.load(sum)), sum);
                }
            }
        }
        let l = s.sum(l);
        for (i, out) in out.iter_mut().enumerate() {
            *out = sum.as_flattened()[place(dtype, i)] * unit / l;
        }
    }
}

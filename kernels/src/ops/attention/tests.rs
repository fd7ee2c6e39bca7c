//! Attention against F64 over a table of shapes, and bit-equality over chunking, batches, threads and instruction sets.

use conclave_plan::model::{AttentionSpec, QkNorm};

use crate::backend::{Backend, Batch, BatchRun, KvDtype, KvId, Limits};
use crate::cpu::float8::e4m3_to_f32;
use crate::cpu::{CpuBackend, Isa};
use crate::testing::*;

/// Query heads, KV heads, head dim, page tokens, sequence length. Odd sizes, and lengths around blocks of 64.
const SHAPES: [(usize, usize, usize, usize, usize); 9] = [
    (1, 1, 16, 16, 1),
    (2, 1, 64, 16, 5),
    (6, 2, 64, 16, 63),
    (4, 4, 80, 8, 64),
    (7, 1, 128, 16, 65),
    (16, 4, 128, 48, 129),
    (9, 3, 32, 5, 200),
    (12, 2, 40, 1, 70),
    (8, 1, 192, 64, 140),
];

fn spec(heads: usize, kv_heads: usize, head_dim: usize) -> AttentionSpec {
    AttentionSpec {
        heads,
        kv_heads,
        head_dim,
        rotary_dim: 0,
        rope_theta: 1e4,
        qk_norm: QkNorm::None,
    }
}

/// One sequence: keys and values are in the cache of every backend before it is asked.
struct Sequence {
    spec: AttentionSpec,
    dtype: KvDtype,
    page_tokens: usize,
    pages: Vec<u32>,
    q: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Sequence {
    fn random(shape: (usize, usize, usize, usize, usize), dtype: KvDtype, seed: u64) -> Sequence {
        let (heads, kv_heads, head_dim, page_tokens, len) = shape;
        let mut random = Random::new(seed);
        // Pages in no order, others between them.
        let count = len.div_ceil(page_tokens);
        let mut pages: Vec<u32> = (0..2 * count as u32 + 1).collect();
        for i in (1..pages.len()).rev() {
            pages.swap(i, random.below(i + 1));
        }
        pages.truncate(count);
        let scale = |values: Vec<f32>, by: f32| values.into_iter().map(|x| x * by).collect();
        Sequence {
            spec: spec(heads, kv_heads, head_dim),
            dtype,
            page_tokens,
            pages,
            q: scale(random.vec(len * heads * head_dim), 4.0),
            keys: scale(random.vec(len * kv_heads * head_dim), 2.0),
            values: random.vec(len * kv_heads * head_dim),
        }
    }

    fn len(&self) -> usize {
        self.q.len() / self.spec.q_width()
    }

    fn limits(&self) -> Limits {
        Limits {
            page_tokens: self.page_tokens,
            ..limits()
        }
    }

    /// The sequence's keys and values in a cache that is NaN everywhere else.
    fn fill(&self, backend: &mut CpuBackend) -> KvId {
        let count = 2 * self.len().div_ceil(self.page_tokens) + 1;
        let spec = &self.spec;
        let kv = backend
            .alloc_kv(count, self.page_tokens, spec.kv_heads, spec.head_dim, self.dtype)
            .unwrap();
        let isa = backend.engine.isa;
        let cache = &mut backend.caches[kv.0 as usize];
        let (row, width) = (cache.row_bytes(), spec.kv_width());
        let nan = vec![f32::NAN; width];
        let writer = cache.writer();
        for page in 0..count as u32 {
            for token in 0..self.page_tokens {
                // SAFETY: one thread.
                unsafe { writer.write(isa, &[page], token, &nan, &nan) };
            }
        }
        for position in 0..self.len() {
            let part = position * width..(position + 1) * width;
            // SAFETY: one thread.
            unsafe {
                writer.write(
                    isa,
                    &self.pages,
                    position,
                    &self.keys[part.clone()],
                    &self.values[part],
                )
            };
        }
        assert_eq!(cache.keys.len(), row * count * self.page_tokens * spec.kv_heads);
        kv
    }

    /// Output of positions `from..to`, in one step.
    fn attend(&self, backend: &mut CpuBackend, kv: KvId, from: usize, to: usize) -> Vec<f32> {
        let (tokens, width) = (to - from, self.spec.q_width());
        let run = BatchRun {
            first: 0,
            len: tokens as u32,
            pages: self.pages.clone(),
            position: from as u32,
        };
        let positions = (from as u32..to as u32).collect();
        let batch = Batch {
            ids: vec![0; tokens],
            positions,
            runs: vec![run],
            logit_rows: Vec::new(),
        };
        backend.begin(&batch).unwrap();
        let q = upload(backend, &self.q[from * width..to * width]);
        let out = poisoned(backend, tokens * width);
        backend.attention(&self.spec, kv, &q, &out).unwrap();
        download(backend, &out, tokens * width)
    }

    /// Values as the cache rounds them.
    fn rounded(&self, values: &[f32]) -> Vec<f64> {
        let round = |x: &f32| match self.dtype {
            KvDtype::F32 => *x,
            KvDtype::Bf16 => half::bf16::from_f32(*x).to_f32(),
            KvDtype::Fp8E4m3 => e4m3_to_f32(crate::cpu::float8::f32_to_e4m3(*x)),
            KvDtype::Fp8E5m2 => {
                half::f16::from_bits(u16::from(crate::cpu::float8::f32_to_e5m2(*x)) << 8).to_f32()
            }
        };
        values.iter().map(|x| f64::from(round(x))).collect()
    }

    fn expected(&self) -> Vec<f64> {
        let AttentionSpec {
            heads,
            kv_heads,
            head_dim: dim,
            ..
        } = self.spec;
        let (keys, values) = (self.rounded(&self.keys), self.rounded(&self.values));
        let row = |position: usize, head: usize| {
            let at = (position * kv_heads + head) * dim;
            at..at + dim
        };
        let mut out = Vec::new();
        for t in 0..self.len() {
            for head in 0..heads {
                let q = &self.q[(t * heads + head) * dim..][..dim];
                let kv_head = head / (heads / kv_heads);
                let score = |position: usize| {
                    let key = &keys[row(position, kv_head)];
                    key.iter().zip(q).map(|(k, q)| k * f64::from(*q)).sum::<f64>() / (dim as f64).sqrt()
                };
                let scores: Vec<f64> = (0..=t).map(score).collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let p: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
                let sum: f64 = p.iter().sum();
                let mut sums = vec![0.0; dim];
                for (position, p) in p.iter().enumerate() {
                    let value = &values[row(position, kv_head)];
                    sums.iter_mut().zip(value).for_each(|(sum, v)| *sum += p * v);
                }
                out.extend(sums.iter().map(|x| x / sum));
            }
        }
        out
    }
}

const DTYPES: [KvDtype; 4] = [KvDtype::F32, KvDtype::Bf16, KvDtype::Fp8E4m3, KvDtype::Fp8E5m2];

#[test]
fn equals_f64_over_the_shapes_whatever_the_rest_of_the_cache_holds() {
    for (i, shape) in SHAPES.into_iter().enumerate() {
        for dtype in DTYPES {
            let sequence = Sequence::random(shape, dtype, i as u64);
            let mut backend = CpuBackend::new(sequence.limits(), 1, None).unwrap();
            let kv = sequence.fill(&mut backend);
            let found = sequence.attend(&mut backend, kv, 0, sequence.len());
            let expected = sequence.expected();
            assert_close(
                &format!("{shape:?} {dtype:?}"),
                &found,
                &expected,
                &vec![5e-6; expected.len()],
            );
        }
    }
}

#[test]
fn is_the_same_for_all_chunks_threads_and_instruction_sets() {
    for (i, shape) in SHAPES.into_iter().enumerate() {
        for dtype in DTYPES {
            let sequence = Sequence::random(shape, dtype, 100 + i as u64);
            let (len, width) = (sequence.len(), sequence.spec.q_width());
            let mut backend = CpuBackend::new(sequence.limits(), 1, None).unwrap();
            let kv = sequence.fill(&mut backend);
            let whole = sequence.attend(&mut backend, kv, 0, len);
            for chunk in [1, 3, 16, 17, 64, 100] {
                let mut parts = Vec::new();
                for from in (0..len).step_by(chunk) {
                    parts.extend(sequence.attend(&mut backend, kv, from, len.min(from + chunk)));
                }
                assert_eq!(
                    bits(&parts),
                    bits(&whole),
                    "{shape:?} {dtype:?} in chunks of {chunk}"
                );
            }
            for mut backend in backends(&sequence.limits()) {
                let kv = sequence.fill(&mut backend);
                let found = sequence.attend(&mut backend, kv, 0, len);
                assert_eq!(bits(&found), bits(&whole), "{backend:?} {shape:?} {dtype:?}");
                let last = sequence.attend(&mut backend, kv, len - 1, len);
                assert_eq!(
                    bits(&last),
                    bits(&whole[(len - 1) * width..]),
                    "{backend:?} {shape:?} {dtype:?}"
                );
            }
        }
    }
}

/// Runs of several sequences in one step give what each gives alone.
#[test]
fn is_the_same_beside_other_sequences() {
    let shape = (6, 2, 64, 16, 90);
    let sequence = Sequence::random(shape, KvDtype::Bf16, 7);
    let width = sequence.spec.q_width();
    let mut backend = CpuBackend::new(sequence.limits(), 3, None).unwrap();
    let kv = sequence.fill(&mut backend);
    let whole = sequence.attend(&mut backend, kv, 0, 90);
    // The same pages seen from three runs: a prompt's end, one token, another prompt's end. They read only, so the
    // pages that a step would write are kept apart by their positions.
    let runs = [(3, 14), (40, 1), (70, 20)];
    let (mut batch, mut q, mut expected) = (Batch::default(), Vec::new(), Vec::new());
    for (position, len) in runs {
        batch.runs.push(BatchRun {
            first: batch.ids.len() as u32,
            len: len as u32,
            pages: sequence.pages.clone(),
            position: position as u32,
        });
        batch.ids.extend(vec![0; len]);
        batch.positions.extend(position as u32..(position + len) as u32);
        q.extend_from_slice(&sequence.q[position * width..(position + len) * width]);
        expected.extend_from_slice(&whole[position * width..(position + len) * width]);
    }
    backend.begin(&batch).unwrap();
    let q = upload(&mut backend, &q);
    let out = poisoned(&mut backend, expected.len());
    backend.attention(&sequence.spec, kv, &q, &out).unwrap();
    assert_eq!(
        bits(&download(&mut backend, &out, expected.len())),
        bits(&expected)
    );
}

#[test]
fn a_nan_key_makes_its_readers_nan_and_no_others() {
    let mut sequence = Sequence::random((2, 1, 64, 16, 100), KvDtype::Bf16, 9);
    sequence.keys[70 * 64 + 3] = f32::NAN;
    let mut backend = CpuBackend::new(sequence.limits(), 1, Some(Isa::detect())).unwrap();
    let kv = sequence.fill(&mut backend);
    let found = sequence.attend(&mut backend, kv, 0, 100);
    assert!(found[..70 * 128].iter().all(|x| x.is_finite()));
    assert!(found[70 * 128..].iter().all(|x| x.is_nan()));
}

#[test]
fn caches_and_specs_that_do_not_fit_are_refused() {
    let mut backend = CpuBackend::new(limits(), 1, None).unwrap();
    let kv = backend.alloc_kv(4, 16, 2, 64, KvDtype::Bf16).unwrap();
    let other_pages = backend.alloc_kv(4, 8, 2, 64, KvDtype::Bf16).unwrap();
    let long = backend.alloc_kv(4, 16, 2, 1024, KvDtype::Bf16).unwrap();
    let begin = |backend: &mut CpuBackend, page| {
        let run = BatchRun {
            first: 0,
            len: 1,
            pages: vec![page],
            position: 0,
        };
        let batch = Batch {
            ids: vec![0],
            positions: vec![0],
            runs: vec![run],
            logit_rows: Vec::new(),
        };
        backend.begin(&batch).unwrap();
    };
    begin(&mut backend, 3);
    let [q, out] = [(); 2].map(|()| upload(&mut backend, &vec![0.0; 4 * 1024]));
    backend.attention(&spec(4, 2, 64), kv, &q, &out).unwrap();
    for (spec, kv, what) in [
        (spec(4, 2, 32), kv, "head_dim is 32, expected 64"),
        (spec(4, 1, 64), kv, "kv_heads is 1, expected 2"),
        (spec(3, 2, 64), kv, "heads is 3"),
        (spec(256, 2, 64), kv, "heads is 256"),
        (spec(4, 2, 64), KvId(9), "kv is handle 9"),
        (
            spec(4, 2, 64),
            other_pages,
            "page_tokens of the cache is 8, expected 16",
        ),
        (spec(2, 2, 1024), long, "head_dim is 1024, expected at most 512"),
    ] {
        let error = backend.attention(&spec, kv, &q, &out).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
    begin(&mut backend, 4);
    let error = backend
        .attention(&spec(4, 2, 64), kv, &q, &out)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("page is 4, expected below the cache's 4"),
        "{error}"
    );
}

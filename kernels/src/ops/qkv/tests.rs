//! QKV against F64 (norms, partial rope, what is written to the pages), and bit-equality.

use std::sync::Arc;

use conclave_plan::model::{AttentionSpec, QkNorm};

use crate::backend::{AttentionWeights, Backend, Batch, BatchRun, KvDtype, KvId};
use crate::cpu::CpuBackend;
use crate::testing::*;
use crate::weight::{HostLinear, HostWeight};

const WIDTH: usize = 96;
const EPS: f32 = 1e-6;
const PAGES: usize = 24;

struct Case {
    spec: AttentionSpec,
    norm: Vec<f32>,
    /// q, k, v as `[out, WIDTH]`.
    weights: [Vec<f32>; 3],
    q_norm: Vec<f32>,
    k_norm: Vec<f32>,
    hidden: Vec<f32>,
    first_position: usize,
    pages: Vec<u32>,
}

impl Case {
    fn random(qk_norm: QkNorm, rotary_dim: usize, tokens: usize, first_position: usize) -> Case {
        let mut random = Random::new(rotary_dim as u64 + tokens as u64);
        let spec = AttentionSpec {
            heads: 6,
            kv_heads: 2,
            head_dim: 40,
            rotary_dim,
            rope_theta: 5e6,
            qk_norm,
        };
        let (q, kv) = (spec.q_width(), spec.kv_width());
        let norm_len = |width| {
            if qk_norm == QkNorm::PerHead {
                spec.head_dim
            } else {
                width
            }
        };
        // Pages before the first position's are read by nobody here and may be any.
        let pages = (first_position + tokens).div_ceil(16);
        Case {
            norm: random.vec(WIDTH),
            weights: [q, kv, kv].map(|out| random.vec(out * WIDTH)),
            q_norm: random.vec(norm_len(q)),
            k_norm: random.vec(norm_len(kv)),
            hidden: random.vec(tokens * WIDTH),
            first_position,
            pages: (0..pages).map(|page| ((page * 7 + 3) % PAGES) as u32).collect(),
            spec,
        }
    }

    fn tokens(&self) -> usize {
        self.hidden.len() / WIDTH
    }

    fn upload(&self, backend: &mut CpuBackend, dtype: KvDtype) -> (AttentionWeights, KvId) {
        let [q, k, v] = [0, 1, 2].map(|i| {
            let bytes: Vec<u8> = self.weights[i].iter().flat_map(|w| w.to_le_bytes()).collect();
            let out_features = self.weights[i].len() / WIDTH;
            let data = HostWeight::F32(Arc::new(bytes));
            backend
                .upload_linear(&HostLinear {
                    out_features,
                    in_features: WIDTH,
                    data,
                })
                .unwrap()
        });
        let weights = AttentionWeights {
            norm: backend.upload_vector(&self.norm).unwrap(),
            q,
            k,
            v,
            o: q,
            q_norm: Some(backend.upload_vector(&self.q_norm).unwrap()),
            k_norm: Some(backend.upload_vector(&self.k_norm).unwrap()),
        };
        let kv = backend
            .alloc_kv(PAGES, 16, self.spec.kv_heads, self.spec.head_dim, dtype)
            .unwrap();
        (weights, kv)
    }

    /// Tokens `from..to` in one step: their q.
    fn step(
        &self,
        backend: &mut CpuBackend,
        weights: &AttentionWeights,
        kv: KvId,
        from: usize,
        to: usize,
    ) -> Vec<f32> {
        let tokens = to - from;
        let position = (self.first_position + from) as u32;
        let run = BatchRun {
            first: 0,
            len: tokens as u32,
            pages: self.pages.clone(),
            position,
        };
        let positions = (position..position + tokens as u32).collect();
        let batch = Batch {
            ids: vec![0; tokens],
            positions,
            runs: vec![run],
            logit_rows: Vec::new(),
        };
        backend.begin(&batch).unwrap();
        let hidden = upload(backend, &self.hidden[from * WIDTH..to * WIDTH]);
        let q = poisoned(backend, tokens * self.spec.q_width());
        backend.qkv(&self.spec, EPS, weights, &hidden, kv, &q).unwrap();
        download(backend, &q, tokens * self.spec.q_width())
    }

    /// Exact q, k and v of token `t`.
    fn expected(&self, t: usize) -> [Vec<f64>; 3] {
        let norm = |x: &[f64], w: &[f32]| -> Vec<f64> {
            let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
            let scale = 1.0 / (mean + f64::from(EPS)).sqrt();
            x.iter().zip(w).map(|(x, w)| x * scale * f64::from(*w)).collect()
        };
        let hidden: Vec<f64> = self.hidden[t * WIDTH..][..WIDTH]
            .iter()
            .map(|x| f64::from(*x))
            .collect();
        let x = norm(&hidden, &self.norm);
        let project = |w: &[f32]| -> Vec<f64> {
            w.chunks(WIDTH)
                .map(|w| w.iter().zip(&x).map(|(w, x)| f64::from(*w) * x).sum())
                .collect()
        };
        let dim = self.spec.head_dim;
        let finish = |x: Vec<f64>, w: &[f32]| -> Vec<f64> {
            let x = match self.spec.qk_norm {
                QkNorm::None => x,
                QkNorm::WholeProjection => norm(&x, w),
                QkNorm::PerHead => x.chunks(dim).flat_map(|head| norm(head, w)).collect(),
            };
            let half = self.spec.rotary_dim / 2;
            let mut out = x.clone();
            for head in 0..x.len() / dim {
                for i in 0..half {
                    let frequency = self
                        .spec
                        .rope_theta
                        .powf(-2.0 * i as f64 / self.spec.rotary_dim as f64);
                    let (sin, cos) = ((self.first_position + t) as f64 * frequency).sin_cos();
                    let (a, b) = (x[head * dim + i], x[head * dim + half + i]);
                    out[head * dim + i] = a * cos - b * sin;
                    out[head * dim + half + i] = b * cos + a * sin;
                }
            }
            out
        };
        let [q, k, v] = [0, 1, 2].map(|i| project(&self.weights[i]));
        [finish(q, &self.q_norm), finish(k, &self.k_norm), v]
    }

    /// The F32 cache's keys and values of token `t`.
    fn cached(&self, backend: &CpuBackend, kv: KvId, t: usize) -> [Vec<f32>; 2] {
        let cache = &backend.caches[kv.0 as usize];
        [&cache.keys, &cache.values].map(|memory| {
            let head = |head: usize| {
                let at = cache.row(&self.pages, self.first_position + t, head) / 4;
                memory.f32()[at..at + self.spec.head_dim].to_vec()
            };
            (0..self.spec.kv_heads).flat_map(head).collect()
        })
    }
}

fn cases() -> Vec<Case> {
    vec![
        Case::random(QkNorm::WholeProjection, 20, 5, 0),
        Case::random(QkNorm::WholeProjection, 40, 37, 11),
        Case::random(QkNorm::PerHead, 8, 20, 250),
        Case::random(QkNorm::None, 0, 3, 30),
        Case::random(QkNorm::None, 34, 1, 299),
    ]
}

#[test]
fn equals_f64_and_writes_to_the_pages_of_the_position() {
    for case in cases() {
        let mut backend = CpuBackend::new(limits(), 1, None).unwrap();
        let (weights, kv) = case.upload(&mut backend, KvDtype::F32);
        let q = case.step(&mut backend, &weights, kv, 0, case.tokens());
        for t in 0..case.tokens() {
            let [q_exact, k_exact, v_exact] = case.expected(t);
            let [k, v] = case.cached(&backend, kv, t);
            let q = &q[t * case.spec.q_width()..][..case.spec.q_width()];
            for (found, exact) in [(q, q_exact), (&k[..], k_exact), (&v[..], v_exact)] {
                assert_close(
                    &format!("{:?} token {t}", case.spec),
                    found,
                    &exact,
                    &vec![2e-5; exact.len()],
                );
            }
        }
    }
}

#[test]
fn is_the_same_for_all_chunks_threads_and_instruction_sets() {
    for case in cases() {
        for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::Fp8E4m3, KvDtype::Fp8E5m2] {
            let mut first = CpuBackend::new(limits(), 1, None).unwrap();
            let (weights, kv) = case.upload(&mut first, dtype);
            let q = case.step(&mut first, &weights, kv, 0, case.tokens());
            for chunk in [1, 7, case.tokens()] {
                for mut backend in backends(&limits()) {
                    let (weights, kv) = case.upload(&mut backend, dtype);
                    let mut parts = Vec::new();
                    for from in (0..case.tokens()).step_by(chunk) {
                        let to = case.tokens().min(from + chunk);
                        parts.extend(case.step(&mut backend, &weights, kv, from, to));
                    }
                    assert_eq!(
                        bits(&parts),
                        bits(&q),
                        "{backend:?} {dtype:?} in chunks of {chunk}"
                    );
                    let (found, expected) = (&backend.caches[kv.0 as usize], &first.caches[kv.0 as usize]);
                    assert!(
                        found.keys.bytes() == expected.keys.bytes(),
                        "{backend:?} {dtype:?}"
                    );
                    assert!(
                        found.values.bytes() == expected.values.bytes(),
                        "{backend:?} {dtype:?}"
                    );
                }
            }
        }
    }
}

/// Layers of one step may have different ropes: the shared table is made anew.
#[test]
fn layers_with_different_ropes_do_not_share_angles() {
    let (a, b) = (
        Case::random(QkNorm::None, 20, 5, 9),
        Case::random(QkNorm::None, 40, 5, 9),
    );
    let mut backend = CpuBackend::new(limits(), 1, None).unwrap();
    let ((a_weights, a_kv), (b_weights, b_kv)) = (
        a.upload(&mut backend, KvDtype::F32),
        b.upload(&mut backend, KvDtype::F32),
    );
    let alone = b.step(&mut backend, &b_weights, b_kv, 0, 5);
    a.step(&mut backend, &a_weights, a_kv, 0, 5);
    let hidden = upload(&mut backend, &b.hidden);
    let q = poisoned(&mut backend, alone.len());
    backend.qkv(&b.spec, EPS, &b_weights, &hidden, b_kv, &q).unwrap();
    assert_eq!(bits(&download(&mut backend, &q, alone.len())), bits(&alone));
}

#[test]
fn a_norm_that_the_spec_asks_for_must_be_there() {
    let case = Case::random(QkNorm::WholeProjection, 20, 5, 0);
    let mut backend = CpuBackend::new(limits(), 1, None).unwrap();
    let (weights, kv) = case.upload(&mut backend, KvDtype::F32);
    case.step(&mut backend, &weights, kv, 0, 5);
    let hidden = upload(&mut backend, &case.hidden);
    let q = poisoned(&mut backend, 5 * case.spec.q_width());
    let without = AttentionWeights {
        q_norm: None,
        ..weights
    };
    let error = backend
        .qkv(&case.spec, EPS, &without, &hidden, kv, &q)
        .unwrap_err()
        .to_string();
    assert!(error.contains("q_norm is absent, expected 240 values"), "{error}");
    let odd = AttentionSpec {
        rotary_dim: 21,
        ..case.spec.clone()
    };
    let error = backend
        .qkv(&odd, EPS, &without, &hidden, kv, &q)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("q_norm") || error.contains("rotary_dim is 21"),
        "{error}"
    );
}

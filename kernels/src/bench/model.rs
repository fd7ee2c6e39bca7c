//! A model of dummy weights on the CPU backend, one step at a time with a clock at every op.

use std::time::{Duration, Instant};

use conclave_plan::model::{AttentionSpec, MoeSpec, QkNorm, Scoring};

use super::Shape;
use crate::backend::*;
use crate::cpu::{CpuBackend, Isa};
use crate::dummy::{self, DummyFormat};

const PAGE_TOKENS: usize = 16;
const EPS: f32 = 1e-6;

struct Layer {
    attention: AttentionWeights,
    moe_norm: VectorId,
    gate: LinearId,
    experts: ExpertsId,
    kv: KvId,
}

/// Buffers, weights and the batch.
pub(super) struct Model {
    backend: CpuBackend,
    attention: AttentionSpec,
    moe: MoeSpec,
    layers: Vec<Layer>,
    embedding: LinearId,
    norm: VectorId,
    head: LinearId,
    buffers: Buffers,
    batch: Batch,
    vocab: usize,
}

struct Buffers {
    hidden: Buffer,
    normed: Buffer,
    q: Buffer,
    attended: Buffer,
    ids: Buffer,
    weights: Buffer,
    y: Buffer,
    logits: Buffer,
}

/// Ops in the order of a step.
pub(super) const OPS: [&str; 9] = [
    "embed",
    "qkv",
    "attention",
    "o_proj",
    "route",
    "experts",
    "combine",
    "head",
    "sample",
];

/// Time of each of [`OPS`] over all layers, and experts that ran, summed over layers.
pub(super) struct Step {
    pub(super) times: [Duration; OPS.len()],
    pub(super) experts: usize,
}

impl Model {
    /// `tokens` sequences that decode one token each after `shape.context`, or one prompt of `tokens` if `prefill`.
    pub(super) fn new(
        shape: &Shape,
        format: DummyFormat,
        tokens: usize,
        prefill: bool,
        threads: usize,
        isa: Isa,
    ) -> Result<Model> {
        let positions = if prefill { tokens } else { shape.context + 1 };
        let pages = positions.div_ceil(PAGE_TOKENS);
        let runs = if prefill { 1 } else { tokens };
        let limits = Limits {
            max_tokens: tokens,
            max_logit_rows: runs,
            max_runs: runs,
            max_pages_per_run: pages,
            max_expert_rows: tokens * shape.top_k,
            page_tokens: PAGE_TOKENS,
        };
        let mut backend = CpuBackend::new(limits, threads, Some(isa))?;
        let attention = AttentionSpec {
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            rotary_dim: shape.head_dim / 2,
            rope_theta: 5e6,
            qk_norm: QkNorm::WholeProjection,
        };
        let moe = MoeSpec {
            experts: shape.experts,
            top_k: shape.top_k,
            intermediate: shape.intermediate,
            scoring: Scoring::Sigmoid,
            selection_bias: false,
            renormalize: true,
        };
        let mut seed = 0;
        let mut random = |format, out, input| {
            seed += 1;
            dummy::linear(format, out, input, seed, threads)
        };
        let (hidden, q_width, kv_width) = (shape.hidden, attention.q_width(), attention.kv_width());
        let b = &mut backend;
        let ones = |b: &mut CpuBackend, width: usize| b.upload_vector(&vec![1.0; width]);
        let mut layers = Vec::new();
        for _ in 0..shape.layers {
            let experts = (0..shape.experts).map(|_| {
                Ok(HostExpert {
                    gate: random(format, shape.intermediate, hidden)?,
                    up: random(format, shape.intermediate, hidden)?,
                    down: random(format, hidden, shape.intermediate)?,
                })
            });
            let experts: Vec<HostExpert> = experts.collect::<Result<_>>()?;
            layers.push(Layer {
                attention: AttentionWeights {
                    norm: ones(b, hidden)?,
                    q: b.upload_linear(&random(format, q_width, hidden)?)?,
                    k: b.upload_linear(&random(format, kv_width, hidden)?)?,
                    v: b.upload_linear(&random(format, kv_width, hidden)?)?,
                    o: b.upload_linear(&random(format, hidden, q_width)?)?,
                    q_norm: Some(ones(b, q_width)?),
                    k_norm: Some(ones(b, kv_width)?),
                },
                moe_norm: ones(b, hidden)?,
                gate: b.upload_linear(&random(DummyFormat::F32, shape.experts, hidden)?)?,
                experts: b.upload_experts(&experts)?,
                kv: b.alloc_kv(
                    pages * runs,
                    PAGE_TOKENS,
                    shape.kv_heads,
                    shape.head_dim,
                    KvDtype::Bf16,
                )?,
            });
        }
        let mut alloc = |rows: usize, columns: usize| b.alloc(rows * columns * 4, "bench");
        let buffers = Buffers {
            hidden: alloc(tokens, hidden)?,
            normed: alloc(tokens, hidden)?,
            q: alloc(tokens, q_width)?,
            attended: alloc(tokens, q_width)?,
            ids: alloc(tokens, shape.top_k)?,
            weights: alloc(tokens, shape.top_k)?,
            y: alloc(tokens * shape.top_k, hidden)?,
            logits: alloc(runs, shape.vocab)?,
        };
        let embedding = b.upload_linear(&random(DummyFormat::Bf16, shape.vocab, hidden)?)?;
        let head = b.upload_linear(&random(DummyFormat::Bf16, shape.vocab, hidden)?)?;
        let norm = ones(b, hidden)?;
        let per_run = tokens / runs;
        let position = (positions - per_run) as u32;
        let run = |r: usize| BatchRun {
            first: (r * per_run) as u32,
            len: per_run as u32,
            pages: (0..pages).map(|page| (r * pages + page) as u32).collect(),
            position,
        };
        let batch = Batch {
            ids: (0..tokens).map(|t| (t * 7919 % shape.vocab) as u32).collect(),
            positions: (0..tokens).map(|t| position + (t % per_run) as u32).collect(),
            runs: (0..runs).map(run).collect(),
            logit_rows: (0..runs).map(|r| ((r + 1) * per_run - 1) as u32).collect(),
        };
        let vocab = shape.vocab;
        Ok(Model {
            backend,
            attention,
            moe,
            layers,
            embedding,
            norm,
            head,
            buffers,
            batch,
            vocab,
        })
    }

    /// Runs the batch once.
    pub(super) fn step(&mut self) -> Result<Step> {
        let (b, buffers) = (&mut self.backend, &self.buffers);
        let mut step = Step {
            times: [Duration::ZERO; OPS.len()],
            experts: 0,
        };
        let mut last = Instant::now();
        let mut clock = |times: &mut [Duration; OPS.len()], op: usize| {
            let now = Instant::now();
            times[op] += now - last;
            last = now;
        };
        let (tokens, k) = (self.batch.ids.len(), self.moe.top_k);
        let mut ids = vec![0; tokens * k * 4];
        b.begin(&self.batch)?;
        b.embed(self.embedding, &buffers.hidden)?;
        clock(&mut step.times, 0);
        for layer in &self.layers {
            b.qkv(
                &self.attention,
                EPS,
                &layer.attention,
                &buffers.hidden,
                layer.kv,
                &buffers.q,
            )?;
            clock(&mut step.times, 1);
            b.attention(&self.attention, layer.kv, &buffers.q, &buffers.attended)?;
            clock(&mut step.times, 2);
            b.linear_add(layer.attention.o, &buffers.attended, &buffers.hidden)?;
            clock(&mut step.times, 3);
            let Buffers {
                hidden,
                normed,
                ids: chosen,
                weights,
                ..
            } = buffers;
            b.route(
                &self.moe,
                EPS,
                layer.moe_norm,
                layer.gate,
                None,
                hidden,
                normed,
                chosen,
                weights,
                None,
            )?;
            b.read(chosen, 0, &mut ids)?;
            let rows: Vec<ExpertRow> = (0u32..)
                .zip(ids.as_chunks::<4>().0)
                .map(|(i, id)| ExpertRow {
                    row: i / k as u32,
                    expert: u32::from_le_bytes(*id),
                })
                .collect();
            let mut used = vec![false; self.moe.experts];
            rows.iter().for_each(|row| used[row.expert as usize] = true);
            step.experts += used.into_iter().filter(|used| *used).count();
            clock(&mut step.times, 4);
            b.experts(layer.experts, normed, &rows, &buffers.y)?;
            clock(&mut step.times, 5);
            b.combine(k, &buffers.y, weights, hidden)?;
            clock(&mut step.times, 6);
        }
        b.head(EPS, self.norm, self.head, &buffers.hidden, &buffers.logits)?;
        clock(&mut step.times, 7);
        self.sample()?;
        clock(&mut step.times, 8);
        // The next step sees other tokens, so that other experts run.
        self.batch
            .ids
            .iter_mut()
            .for_each(|id| *id = (*id * 31 + 17) % self.vocab as u32);
        Ok(step)
    }

    fn sample(&mut self) -> Result<()> {
        let params = SampleParams {
            temperature: 1.0,
            top_k: 40,
            top_p: 0.95,
            seed: 1,
            ..SampleParams::default()
        };
        let row = |_| SampleRow {
            params: &params,
            position: 0,
            tokens: &[],
            output_start: 0,
            history: None,
            mask: None,
            forbidden: &[],
        };
        let rows: Vec<SampleRow<'_>> = self.batch.logit_rows.iter().map(row).collect();
        self.backend
            .sample(&self.buffers.logits, self.vocab, 0, &rows)
            .map(|_| ())
    }
}

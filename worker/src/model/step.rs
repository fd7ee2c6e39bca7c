//! One step: embed, then for each layer attention and experts, then the head and the sampler.

use conclave_kernels::backend::{Batch, KernelError, SampleRow, Sampled};

use super::{Executor, ModelError, Result};
use crate::transport::{Input, Tokens, Transport};

/// What to run, and which tokens to sample.
#[derive(Clone, Copy)]
pub struct StepInput<'a> {
    pub step: u64,
    pub batch: &'a Batch,
    /// Lists of rows to sample; within each, ascending in `row`.
    pub sampling: &'a [Vec<RowSampling<'a>>],
}

/// One row to sample.
pub struct RowSampling<'a> {
    /// Index into `batch.logit_rows`.
    pub row: usize,
    pub how: SampleRow<'a>,
}

/// What was sampled, in the lists of [`StepInput::sampling`].
pub type StepOutput = Vec<Vec<Sampled>>;

/// Looks at values inside a step, to compare them with a reference. Costs copies; absent in serving.
pub trait Tap {
    /// Whether anybody looks; if not, nothing is copied.
    fn looks(&self) -> bool {
        true
    }
    /// Whether router logits are wanted, too: then the step runs op by op.
    fn looks_inside(&self) -> bool {
        self.looks()
    }
    /// Whether router logits are wanted of a step that the device runs whole.
    fn watches_gates(&self) -> bool {
        false
    }
    /// `[tokens, experts]`.
    fn router_logits(&mut self, layer: usize, values: &[f32]);
    /// Op by op: instead of what the gate chose by these logits, ids and weights `[tokens, top_k]`.
    fn choose(&mut self, layer: usize, router_logits: &[f32]) -> Option<(Vec<u32>, Vec<f32>)> {
        let _ = (layer, router_logits);
        None
    }
    /// `[rows, vocab]`, rows of `batch.logit_rows` from `first_row` on.
    fn logits(&mut self, first_row: usize, values: &[f32]);
}

/// Nobody looks.
#[derive(Clone, Copy, Debug)]
pub struct NoTap;

impl Tap for NoTap {
    fn looks(&self) -> bool {
        false
    }

    fn router_logits(&mut self, _: usize, _: &[f32]) {}

    fn logits(&mut self, _: usize, _: &[f32]) {}
}

/// How far a step is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launched {
    /// All of it is queued, sampling too: `fetch` waits for the tokens, and another step may be queued behind it.
    Whole,
    /// The layers are queued; `sample` does the rest, before any other step. Whether the first rows of logits are
    /// there.
    Layers { has_logits: bool },
}

impl Executor {
    /// Queues one step as far as the device goes alone. `every_row`: the rows of logits are sampled each once, in
    /// order. With no tokens it still takes part in every layer's exchange.
    pub fn launch(
        &mut self,
        transport: &mut dyn Transport,
        input: StepInput<'_>,
        every_row: bool,
        tap: &mut dyn Tap,
    ) -> Result<Launched> {
        if self.resident.is_none() {
            return Err(ModelError::NotLoaded);
        }
        if tap.looks_inside() {
            self.buffers
                .router_logits(self.backend.as_mut(), &self.spec, &self.limits)?;
        }
        transport.begin_step(input.step)?;
        let all = input.batch.logit_rows.len();
        let rows = all.min(self.limits.max_logit_rows);
        self.begin(input.batch, 0..rows)?;
        let tokens = input.batch.ids.len();
        // Later parts of the rows need hidden states, which whole steps of single tokens on a lone device do not leave.
        let leaves_states = rows == all || self.exchanges || tokens > input.batch.runs.len();
        let forward = self.whole && leaves_states && !tap.looks_inside() && (tokens > 0 || self.exchanges);
        if forward {
            self.backend.watch_gates(tap.watches_gates());
        }
        let mut has_logits = forward && self.backend.forward(&self.buffers.logits)?;
        if forward && tap.watches_gates() {
            let layers = self.backend.watched_gates();
            for (layer, values) in layers.iter().enumerate() {
                tap.router_logits(layer, values);
            }
        }
        if !has_logits {
            self.layers(tokens, transport, tap)?;
        }
        if !every_row || rows < all {
            return Ok(Launched::Layers { has_logits });
        }
        if !has_logits && rows > 0 {
            self.head()?;
            has_logits = true;
        }
        let list = input.sampling.first().map_or(&[][..], Vec::as_slice);
        let how: Vec<SampleRow<'_>> = list.iter().map(|entry| entry.how.clone()).collect();
        self.poison_logits(rows)?;
        let queued = self
            .backend
            .queue_sample(&self.buffers.logits, self.spec.vocab, &how)?;
        if !queued {
            return Ok(Launched::Layers { has_logits });
        }
        self.show_logits(0, rows, tap)?;
        Ok(Launched::Whole)
    }

    /// The tokens of the oldest step that was launched whole.
    pub fn fetch(&mut self) -> Result<Vec<Sampled>> {
        Ok(self.backend.sampled()?)
    }

    /// Whether `fetch` would not wait.
    pub fn is_ready(&mut self) -> Result<bool> {
        Ok(self.backend.sample_ready()?)
    }

    fn layers(&mut self, tokens: usize, transport: &mut dyn Transport, tap: &mut dyn Tap) -> Result<()> {
        self.embed(tokens)?;
        for layer in 0..self.spec.layers.len() {
            self.attention(layer, tokens)?;
            self.route(layer, tokens, tap)?;
            self.exchange(layer, tokens, transport)?;
        }
        Ok(())
    }

    /// Takes over the batch with a part of its logit rows.
    pub(super) fn begin(&mut self, batch: &Batch, rows: std::ops::Range<usize>) -> Result<()> {
        if rows.len() == batch.logit_rows.len() {
            return Ok(self.backend.begin(batch)?);
        }
        let part = Batch {
            logit_rows: batch.logit_rows[rows].to_vec(),
            ..batch.clone()
        };
        Ok(self.backend.begin(&part)?)
    }

    fn embed(&mut self, tokens: usize) -> Result<()> {
        match &self.resident {
            Some(resident) if tokens > 0 => {
                Ok(self.backend.embed(resident.embedding, &self.buffers.hidden)?)
            }
            _ => Ok(()),
        }
    }

    fn attention(&mut self, layer: usize, tokens: usize) -> Result<()> {
        let Some(resident) = self.resident.as_ref().filter(|_| tokens > 0) else {
            return Ok(());
        };
        let (spec, kv, buffers) = (&self.spec.layers[layer].attention, self.kv[layer], &self.buffers);
        let weights = &resident.layers[layer].attention;
        self.backend
            .qkv(spec, self.spec.rms_eps, weights, &buffers.hidden, kv, &buffers.q)?;
        self.backend.attention(spec, kv, &buffers.q, &buffers.attention)?;
        Ok(self
            .backend
            .linear_add(weights.o, &buffers.attention, &buffers.hidden)?)
    }

    fn route(&mut self, layer: usize, tokens: usize, tap: &mut dyn Tap) -> Result<()> {
        let Some(resident) = self.resident.as_ref().filter(|_| tokens > 0) else {
            return Ok(());
        };
        let (spec, weights, buffers) = (
            &self.spec.layers[layer].moe,
            &resident.layers[layer],
            &self.buffers,
        );
        let router_logits = buffers.router_logits.as_ref().filter(|_| tap.looks_inside());
        self.backend.route(
            spec,
            self.spec.rms_eps,
            weights.moe_norm,
            weights.gate,
            weights.selection_bias,
            &buffers.hidden,
            &buffers.normed,
            &buffers.ids,
            &buffers.weights,
            router_logits,
        )?;
        if let Some(buffer) = router_logits {
            let mut bytes = vec![0; tokens * spec.experts * 4];
            self.backend.read(buffer, 0, &mut bytes)?;
            let values = floats(&bytes);
            tap.router_logits(layer, &values);
            if let Some((ids, weights)) = tap.choose(layer, &values) {
                let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
                let weights: Vec<u8> = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
                self.backend.write(&buffers.ids, 0, &ids)?;
                self.backend.write(&buffers.weights, 0, &weights)?;
            }
        }
        Ok(())
    }

    /// Dispatch, experts, combine.
    fn exchange(&mut self, layer: usize, tokens: usize, transport: &mut dyn Transport) -> Result<()> {
        let (backend, buffers) = (self.backend.as_mut(), &self.buffers);
        let top_k = self.spec.layers[layer].moe.top_k;
        transport.dispatch(
            backend,
            Tokens {
                layer,
                count: tokens,
                top_k,
                rows: &buffers.normed,
                experts: &buffers.ids,
            },
        )?;
        while let Some(work) = transport.next(backend, &buffers.staging)? {
            let experts = self.experts.device(layer).ok_or_else(|| {
                KernelError::Unsupported(format!(
                    "layer {layer}: rows came for experts, but none are loaded"
                ))
            })?;
            match work.input {
                Input::Own => backend.experts(experts, &buffers.normed, work.rows, &buffers.y)?,
                Input::Staged => {
                    backend.experts(experts, &buffers.staging, work.rows, &buffers.staged_out)?;
                    transport.give(backend, &buffers.staged_out)?;
                }
            }
        }
        transport.combine(backend, &buffers.y)?;
        if tokens > 0 {
            backend.combine(top_k, &buffers.y, &buffers.weights, &buffers.hidden)?;
        }
        Ok(())
    }
}

/// Little-endian bytes as F32.
pub(super) fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes
        .as_chunks()
        .0
        .iter()
        .map(|&value| f32::from_le_bytes(value))
        .collect()
}

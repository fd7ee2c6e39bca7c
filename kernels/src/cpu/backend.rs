//! `Backend` for the CPU. Each op's code is in its folder under `ops`.

use conclave_plan::model::{AttentionSpec, MoeSpec};

use super::CpuBackend;
use crate::backend::*;
use crate::cpu::kv::KvCache;
use crate::weight::HostLinear;

impl Backend for CpuBackend {
    fn describe(&self) -> String {
        format!("{self:?}")
    }

    fn alloc(&mut self, bytes: usize, what: &str) -> Result<Buffer> {
        self.buffers.alloc(bytes, what)
    }

    fn write(&mut self, to: &Buffer, offset: usize, bytes: &[u8]) -> Result<()> {
        self.buffers
            .range("write", to, offset, bytes.len())?
            .copy_from_slice(bytes);
        Ok(())
    }

    fn read(&mut self, from: &Buffer, offset: usize, bytes: &mut [u8]) -> Result<()> {
        bytes.copy_from_slice(self.buffers.range("read", from, offset, bytes.len())?);
        Ok(())
    }

    fn upload_linear(&mut self, weight: &HostLinear) -> Result<LinearId> {
        let weight = self.weights.check_linear(weight)?;
        self.workspace.reserve_linear(&mut self.engine, &weight)?;
        Ok(self.weights.push_linear(weight))
    }

    fn upload_vector(&mut self, values: &[f32]) -> Result<VectorId> {
        Ok(self.weights.push_vector(values))
    }

    fn upload_experts(&mut self, experts: &[HostExpert]) -> Result<ExpertsId> {
        let experts = self.weights.check_experts(experts)?;
        self.workspace.reserve_experts(&mut self.engine, &experts)?;
        Ok(self.weights.push_experts(experts))
    }

    fn drop_experts(&mut self, experts: ExpertsId) {
        self.weights.drop_experts(experts);
    }

    fn alloc_kv(
        &mut self,
        pages: usize,
        page_tokens: usize,
        kv_heads: usize,
        head_dim: usize,
        dtype: KvDtype,
    ) -> Result<KvId> {
        let cache = KvCache::new(pages, page_tokens, kv_heads, head_dim, dtype)?;
        self.workspace.reserve_kv(&mut self.engine, &cache)?;
        self.caches.push(cache);
        Ok(KvId(self.caches.len() as u32 - 1))
    }

    fn round_activations(&mut self, on: bool) -> Result<()> {
        self.engine.rounds = on;
        Ok(())
    }

    fn begin(&mut self, batch: &Batch) -> Result<()> {
        self.workspace.angles_of = None;
        self.step.begin(batch)
    }

    fn embed(&mut self, table: LinearId, hidden: &Buffer) -> Result<()> {
        self.run_embed(table, hidden)
    }

    fn qkv(
        &mut self,
        spec: &AttentionSpec,
        eps: f32,
        weights: &AttentionWeights,
        hidden: &Buffer,
        kv: KvId,
        q: &Buffer,
    ) -> Result<()> {
        self.run_qkv(spec, eps, weights, hidden, kv, q)
    }

    fn attention(&mut self, spec: &AttentionSpec, kv: KvId, q: &Buffer, out: &Buffer) -> Result<()> {
        self.run_attention(spec, kv, q, out)
    }

    fn linear_add(&mut self, weight: LinearId, x: &Buffer, hidden: &Buffer) -> Result<()> {
        self.run_linear_add(weight, x, hidden)
    }

    fn route(
        &mut self,
        spec: &MoeSpec,
        eps: f32,
        norm: VectorId,
        gate: LinearId,
        bias: Option<VectorId>,
        hidden: &Buffer,
        normed: &Buffer,
        ids: &Buffer,
        weights: &Buffer,
        router_logits: Option<&Buffer>,
    ) -> Result<()> {
        self.run_route(
            spec,
            eps,
            norm,
            gate,
            bias,
            [hidden, normed, ids, weights],
            router_logits,
        )
    }

    fn experts(
        &mut self,
        experts: ExpertsId,
        input: &Buffer,
        rows: &[ExpertRow],
        out: &Buffer,
    ) -> Result<()> {
        self.run_experts(experts, input, rows, out)
    }

    fn combine(&mut self, k: usize, y: &Buffer, weights: &Buffer, hidden: &Buffer) -> Result<()> {
        self.run_combine(k, y, weights, hidden)
    }

    fn head(
        &mut self,
        eps: f32,
        norm: VectorId,
        head: LinearId,
        hidden: &Buffer,
        logits: &Buffer,
    ) -> Result<()> {
        self.run_head(eps, norm, head, hidden, logits)
    }

    fn sample(
        &mut self,
        logits: &Buffer,
        vocab: usize,
        first: usize,
        rows: &[SampleRow<'_>],
    ) -> Result<Vec<Sampled>> {
        self.run_sample(logits, vocab, first, rows)
    }

    fn set_fp8_activations(&mut self, on: bool) -> Result<bool> {
        self.workspace.packed.set_quantise(on);
        self.workspace.hidden.set_quantise(on);
        Ok(on)
    }

    fn queue_sample(&mut self, logits: &Buffer, vocab: usize, rows: &[SampleRow<'_>]) -> Result<bool> {
        self.queued.check_room()?;
        let known = self.queued.known_tokens(rows)?;
        let rows: Vec<SampleRow<'_>> = rows
            .iter()
            .zip(&known)
            .map(|(row, tokens)| SampleRow {
                tokens: tokens.as_deref().unwrap_or(row.tokens),
                ..row.clone()
            })
            .collect();
        let sampled = self.run_sample(logits, vocab, 0, &rows)?;
        self.queued.push(sampled);
        Ok(true)
    }

    fn sampled(&mut self) -> Result<Vec<Sampled>> {
        self.queued.take()
    }
}

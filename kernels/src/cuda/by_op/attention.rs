//! Queries, keys and values, and attention, op by op.

use conclave_plan::model::{AttentionSpec, QkNorm};

use super::super::step::{FEW_TOKENS, Step};
use super::super::workspace::Slot;
use super::super::{CudaBackend, KvCache, shape, weights::Linear};
use crate::backend::{AttentionWeights, Buffer, KvId, Result};
use crate::ops::attention::cuda::{self as attention, PrefillPlans, PrefillRows};
use crate::ops::linear::cuda::{Input, LinearCall, linear};
use crate::ops::qkv::cuda::{RopeParams, norm_kind, rope_kv};

impl CudaBackend {
    pub(in crate::cuda) fn op_qkv(
        &mut self,
        spec: &AttentionSpec,
        eps: f32,
        weights: &AttentionWeights,
        hidden: &Buffer,
        kv: KvId,
        q: &Buffer,
    ) -> Result<()> {
        const OP: &str = "qkv";
        let tokens = self.step.tokens;
        let inputs = self.linear(OP, weights.q)?.inputs;
        let hidden = self.memory_of(OP, "hidden", hidden, tokens * inputs * 4)?;
        let q = self.memory_of(OP, "q", q, tokens * spec.q_width() * 4)?;
        let norm = self.vector(OP, weights.norm, inputs)?;
        let (q_norm, k_norm) = self.qk_norms(OP, spec, weights)?;
        let turns = Step::turns(&self.gpu, &mut self.workspace, spec.rotary_dim, spec.rope_theta)?;
        let width = spec.q_width() + 2 * spec.kv_width();
        let rows = self
            .workspace
            .get(&self.gpu, Slot::Normed, FEW_TOKENS * inputs * 4)?;
        let projection = self
            .workspace
            .get(&self.gpu, Slot::Projection, FEW_TOKENS * width * 4)?;
        let cache = self.cache(OP, kv, spec)?;
        self.step.check_pages(OP, cache.pages)?;
        for first in (0..tokens).step_by(FEW_TOKENS) {
            let count = FEW_TOKENS.min(tokens - first);
            self.norm(
                hidden + (first * inputs * 4) as u64,
                0,
                norm,
                eps,
                inputs,
                count,
                rows,
            )?;
            let weights = [weights.q, weights.k, weights.v].map(|id| self.linear(OP, id));
            let [wq, wk, wv] = weights;
            let weights = [wq?, wk?, wv?];
            self.project(&weights, spec, rows, count, projection)?;
            let params = RopeParams {
                qkv: projection,
                parts: 1,
                tokens: count as i32,
                heads: spec.heads as i32,
                rotary: spec.rotary_dim as i32,
                norm: norm_kind(spec.qk_norm),
                eps,
                q_norm,
                k_norm,
                turns,
                positions: self.step.positions() + first as u64 * 4,
                token_run: self.step.token_run() + first as u64 * 4,
                pages: attention::Pages::new(cache, &self.step),
                q: q + (first * spec.q_width() * 4) as u64,
                first16: i32::MAX,
                ..RopeParams::default()
            };
            rope_kv(&self.gpu, cache, &params)?;
        }
        Ok(())
    }

    pub(in crate::cuda) fn op_attention(
        &mut self,
        spec: &AttentionSpec,
        kv: KvId,
        q: &Buffer,
        out: &Buffer,
    ) -> Result<()> {
        const OP: &str = "attention";
        let tokens = self.step.tokens;
        let bytes = tokens * spec.q_width() * 4;
        let (q, out) = (
            self.memory_of(OP, "q", q, bytes)?,
            self.memory_of(OP, "out", out, bytes)?,
        );
        self.cache(OP, kv, spec)?;
        let cache = &self.caches[kv.0 as usize];
        self.step.check_pages(OP, cache.pages)?;
        if tokens <= FEW_TOKENS || self.deterministic {
            let base = attention::params(&self.gpu, &mut self.workspace, &self.step, cache, spec.heads)?;
            let blocks = attention::head_blocks(spec.heads, spec.kv_heads);
            for first in (0..tokens).step_by(FEW_TOKENS) {
                let piece = (first, FEW_TOKENS.min(tokens - first));
                self.step
                    .queue_plan(&self.gpu, blocks, piece, attention::small_blocks(cache, false))?;
                let rows = (first * spec.q_width() * 4) as u64;
                let params = attention::AttentionParams {
                    q: q + rows,
                    out: out + rows,
                    ..base
                };
                attention::decode_behind_plan(&self.gpu, cache, &params)?;
            }
            return Ok(());
        }
        let per_kv = spec.heads / spec.kv_heads;
        let bytes = PrefillPlans::bytes(tokens, self.limits.max_runs, 1, per_kv);
        self.workspace.get(&self.gpu, Slot::PrefillBlocks, bytes)?;
        let area = self
            .workspace
            .memory(Slot::PrefillBlocks)
            .ok_or_else(|| shape(OP, "workspace", "absent", "present"))?;
        let plans = PrefillPlans::new(
            &self.gpu,
            area,
            &self.step,
            std::iter::once((0, tokens)),
            0,
            (cache, per_kv),
        )?;
        let rows = PrefillRows {
            q,
            out,
            ..PrefillRows::default()
        };
        plans.piece(0).map_or(Ok(()), |plan| {
            attention::prefill(&self.gpu, &self.step, cache, spec.heads, plan, rows)
        })
    }

    pub(in crate::cuda) fn cache(
        &self,
        op: &'static str,
        kv: KvId,
        spec: &AttentionSpec,
    ) -> Result<&KvCache> {
        let cache = self
            .caches
            .get(kv.0 as usize)
            .ok_or_else(|| shape(op, "kv cache", kv.0, "an allocated one"))?;
        if (cache.kv_heads, cache.head_dim) != (spec.kv_heads, spec.head_dim)
            || !spec.heads.is_multiple_of(spec.kv_heads)
        {
            let found = format!(
                "{} of {} and {} heads",
                cache.head_dim, cache.kv_heads, spec.heads
            );
            return Err(shape(
                op,
                "kv heads",
                found,
                format!("{} of {}", spec.head_dim, spec.kv_heads),
            ));
        }
        Ok(cache)
    }

    /// Addresses of the q and k norms' weights; 0 without norm.
    pub(in crate::cuda) fn qk_norms(
        &self,
        op: &'static str,
        spec: &AttentionSpec,
        weights: &AttentionWeights,
    ) -> Result<(u64, u64)> {
        let lengths = match spec.qk_norm {
            QkNorm::None => return Ok((0, 0)),
            QkNorm::PerHead => (spec.head_dim, spec.head_dim),
            QkNorm::WholeProjection => (spec.q_width(), spec.kv_width()),
        };
        match (weights.q_norm, weights.k_norm) {
            (Some(q), Some(k)) => Ok((self.vector(op, q, lengths.0)?, self.vector(op, k, lengths.1)?)),
            _ => Err(shape(op, "q/k norm", "absent", "present")),
        }
    }

    /// q, k and v of `count` tokens, side by side.
    pub(in crate::cuda) fn project(
        &self,
        weights: &[&Linear; 3],
        spec: &AttentionSpec,
        rows: u64,
        count: usize,
        y: u64,
    ) -> Result<()> {
        let widths = [spec.q_width(), spec.kv_width(), spec.kv_width()];
        for (weight, width) in weights.iter().zip(widths) {
            if weight.rows != width {
                return Err(shape("qkv", "rows of a projection", weight.rows, width));
            }
        }
        linear(
            &self.gpu,
            &LinearCall {
                weights,
                input: Input::Rows(rows),
                tokens: count,
                parts: 1,
                y,
                residual: 0,
                squares: 0,
            },
        )
    }
}

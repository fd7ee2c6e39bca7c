//! Norms, the head, and sampling that waits, op by op.

use super::super::format::padded;
use super::super::plane::{GemmCall, linear_gemm, plane_blocks, quantised_bytes};
use super::super::step::FEW_TOKENS;
use super::super::workspace::Slot;
use super::super::{CudaBackend, shape};
use crate::backend::{Buffer, LinearId, Result, SampleRow, Sampled, VectorId};
use crate::ops::linear::cuda::{Input, LinearCall, linear};
use crate::ops::rmsnorm::cuda::{MAX_WIDTH, NormInput, NormRows, norm_few, norm_rows};

impl CudaBackend {
    pub(in crate::cuda) fn op_head(
        &mut self,
        eps: f32,
        norm: VectorId,
        head: LinearId,
        hidden: &Buffer,
        logits: &Buffer,
    ) -> Result<()> {
        const OP: &str = "head";
        let (rows, tokens) = (self.step.logit_count, self.step.tokens);
        let (inputs, vocab) = (self.linear(OP, head)?.inputs, self.linear(OP, head)?.rows);
        let hidden = self.memory_of(OP, "hidden", hidden, tokens * inputs * 4)?;
        let logits = self.memory_of(OP, "logits", logits, rows * vocab * 4)?;
        let norm = self.vector(OP, norm, inputs)?;
        let normed = self
            .workspace
            .get(&self.gpu, Slot::Normed, FEW_TOKENS * inputs * 4)?;
        for first in (0..rows).step_by(FEW_TOKENS) {
            let count = FEW_TOKENS.min(rows - first);
            let list = self.step.logit_rows() + first as u64 * 4;
            self.norm(hidden, list, norm, eps, inputs, count, normed)?;
            let y = logits + (first * vocab * 4) as u64;
            let heads = [self.linear(OP, head)?];
            linear(
                &self.gpu,
                &LinearCall {
                    weights: &heads,
                    input: Input::Rows(normed),
                    tokens: count,
                    parts: 1,
                    y,
                    residual: 0,
                    squares: 0,
                },
            )?;
        }
        Ok(())
    }

    pub(in crate::cuda) fn op_sample(
        &mut self,
        logits: &Buffer,
        vocab: usize,
        first: usize,
        rows: &[SampleRow<'_>],
    ) -> Result<Vec<Sampled>> {
        self.gpu.device.enter()?;
        let mut sampled = Vec::with_capacity(rows.len());
        for part in rows.chunks(self.limits.max_logit_rows.max(1)) {
            let first = first.saturating_add(sampled.len());
            sampled.extend(self.sample_now(logits, vocab, first, part)?);
        }
        Ok(sampled)
    }

    /// Norm of `count` rows of `x` (from `rows`, if not 0) into F32 rows.
    #[expect(clippy::too_many_arguments, reason = "addresses and sizes of one launch")]
    pub(in crate::cuda) fn norm(
        &self,
        x: u64,
        rows: u64,
        weight: u64,
        eps: f32,
        width: usize,
        count: usize,
        normed: u64,
    ) -> Result<()> {
        if width > MAX_WIDTH {
            return Err(shape("norm", "width", width, format!("at most {MAX_WIDTH}")));
        }
        let input = NormInput {
            x0: x,
            weight,
            eps,
            k: width as i32,
            ..NormInput::default()
        };
        norm_rows(
            &self.gpu,
            count,
            &NormRows {
                input,
                rows,
                normed,
                padded: padded(width) as i32,
                ..NormRows::default()
            },
        )
    }

    /// `hidden += x W` of a step's tokens with quantised activations.
    pub(in crate::cuda) fn add_quantised(&mut self, id: LinearId, x: u64, hidden: u64) -> Result<()> {
        const OP: &str = "linear_add";
        let (tokens, blocks) = (self.step.tokens, plane_blocks(self.step.tokens));
        let weight = self.linear(OP, id)?;
        let (inputs, padded) = (weight.inputs, weight.padded());
        if inputs > MAX_WIDTH {
            return Err(shape(OP, "inputs", inputs, format!("at most {MAX_WIDTH}")));
        }
        let bytes = quantised_bytes(blocks, padded);
        let plane = self.workspace.get(&self.gpu, Slot::QuantisedPlane, bytes)?;
        let input = NormInput {
            x0: x,
            k: inputs as i32,
            ..NormInput::default()
        };
        let rows = NormRows {
            input,
            quantised: plane,
            plane_blocks: blocks as i32,
            padded: padded as i32,
            ..NormRows::default()
        };
        match tokens {
            ..=FEW_TOKENS => norm_few(&self.gpu, tokens, &rows)?,
            _ => norm_rows(&self.gpu, tokens, &rows)?,
        }
        linear_gemm(
            &self.gpu,
            &GemmCall {
                weights: &[self.linear(OP, id)?],
                plane,
                quantised: true,
                blocks,
                tokens,
                parts: 1,
                y: hidden,
                residual: hidden,
            },
        )
    }
}

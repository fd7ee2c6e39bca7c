//! The op on all threads.

use crate::backend::{Buffer, LinearId, Result, VectorId};
use crate::cpu::CpuBackend;
use crate::ops::linear::{Out, linears_of};
use crate::ops::rmsnorm::rmsnorm;

impl CpuBackend {
    pub(crate) fn run_head(
        &mut self,
        eps: f32,
        norm: VectorId,
        head: LinearId,
        hidden: &Buffer,
        logits: &Buffer,
    ) -> Result<()> {
        const OP: &str = "head";
        let norm = self.weights.vector(OP, "norm", norm)?;
        let head = self.weights.linear(OP, "head", head)?;
        head.expect(OP, "head", head.out_features, norm.len())?;
        let (width, rows) = (norm.len(), &self.step.logit_rows);
        let shapes = [
            (hidden, self.step.tokens() * width),
            (logits, rows.len() * head.out_features),
        ];
        let [hidden, logits] = self.buffers.words(OP, shapes)?;
        let x = &mut self.workspace.normed.f32_mut()[..rows.len() * width];
        for (row, x) in rows.iter().zip(x.chunks_exact_mut(width)) {
            rmsnorm(
                self.engine.isa,
                &hidden[*row as usize * width..][..width],
                norm,
                eps,
                x,
            );
        }
        self.engine.rounded(x);
        // SAFETY: each result is written by the one task that has its row of the weight.
        let out = unsafe { Out::new(logits, head.out_features, false) };
        linears_of(&mut self.engine, &mut self.workspace.packed, x, &[(head, out)]);
        Ok(())
    }
}

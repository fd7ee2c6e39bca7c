//! The op on all threads.

use conclave_plan::model::MoeSpec;

use super::choose::choose;
use super::{MAX_EXPERTS, MAX_TOP_K, ROUTE_TOKENS};
use crate::backend::{Buffer, LinearId, Result, VectorId};
use crate::cpu::CpuBackend;
use crate::cpu::check::{expect, mismatch};
use crate::cpu::engine::Rows;
use crate::ops::linear::{Out, linears_of};
use crate::ops::rmsnorm::rmsnorm_all;

/// Tokens of a task.
const TASK_TOKENS: usize = 8;

impl CpuBackend {
    /// `buffers`: hidden, normed, ids, weights.
    #[expect(clippy::too_many_arguments, reason = "the arguments of `Backend::route`")]
    pub(crate) fn run_route(
        &mut self,
        spec: &MoeSpec,
        eps: f32,
        norm: VectorId,
        gate: LinearId,
        bias: Option<VectorId>,
        buffers: [&Buffer; 4],
        router_logits: Option<&Buffer>,
    ) -> Result<()> {
        const OP: &str = "route";
        let (tokens, k) = (self.step.tokens(), spec.top_k);
        let norm = self.weights.vector(OP, "norm", norm)?;
        let gate = self.weights.linear(OP, "gate", gate)?;
        let width = norm.len();
        gate.expect(OP, "gate", spec.experts, width)?;
        if spec.experts > MAX_EXPERTS {
            return Err(mismatch(
                OP,
                "experts",
                spec.experts,
                format!("at most {MAX_EXPERTS}"),
            ));
        }
        let most = spec.experts.min(MAX_TOP_K);
        if k == 0 || k > most {
            return Err(mismatch(OP, "top_k", k, format!("1 to {most}")));
        }
        let bias = bias
            .map(|bias| self.weights.vector(OP, "bias", bias))
            .transpose()?;
        if let Some(bias) = bias {
            expect(OP, "bias", bias.len(), spec.experts)?;
        }
        let [hidden, normed, ids, weights] = buffers;
        let shapes = [
            (hidden, tokens * width),
            (normed, tokens * width),
            (ids, tokens * k),
            (weights, tokens * k),
        ];
        let [hidden, normed, ids, weights, logits] = match router_logits {
            Some(logits) => {
                let [a, b, c, d] = shapes;
                self.buffers
                    .words(OP, [a, b, c, d, (logits, tokens * spec.experts)])?
            }
            None => {
                let [a, b, c, d] = self.buffers.words(OP, shapes)?;
                [a, b, c, d, &mut []]
            }
        };
        let (engine, w) = (&mut self.engine, &mut self.workspace);
        let isa = engine.isa;
        rmsnorm_all(engine, hidden, norm, eps, normed);
        engine.rounded(normed);
        let parts = normed
            .chunks(ROUTE_TOKENS * width)
            .zip(ids.chunks_mut(ROUTE_TOKENS * k));
        for (i, ((x, ids), weights)) in parts.zip(weights.chunks_mut(ROUTE_TOKENS * k)).enumerate() {
            let tokens = x.len() / width;
            let scores = &mut w.scores.f32_mut()[..tokens * spec.experts];
            // SAFETY: each result is written by the one task that has its row of the weight.
            let out = unsafe { Out::new(scores, spec.experts, false) };
            linears_of(engine, &mut w.packed, x, &[(gate, out)]);
            if !logits.is_empty() {
                logits[i * ROUTE_TOKENS * spec.experts..][..scores.len()].copy_from_slice(scores);
            }
            let (scores, ids, weights) = (
                Rows::new(scores, spec.experts),
                Rows::new(ids, k),
                Rows::new(weights, k),
            );
            engine.run_parts(tokens, TASK_TOKENS, |part, _| {
                for t in part {
                    // SAFETY: each token is in one part.
                    let (z, ids, weights) =
                        unsafe { (scores.take(t..t + 1), ids.take(t..t + 1), weights.take(t..t + 1)) };
                    choose(isa, spec, bias, z, ids, weights);
                }
            });
        }
        self.width = width;
        Ok(())
    }
}

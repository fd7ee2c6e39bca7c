//! The op on all threads.

use conclave_plan::model::{AttentionSpec, QkNorm};

use super::rope;
use crate::backend::{AttentionWeights, Buffer, KvId, LinearId, Result, VectorId};
use crate::cpu::CpuBackend;
use crate::cpu::check::{expect, mismatch};
use crate::cpu::engine::{Rows, round};
use crate::ops::linear::{Out, linears_of};
use crate::ops::rmsnorm::{rmsnorm_all, rmsnorm_in_place};
use crate::simd::Isa;

/// Tokens of a task after the projections.
const TASK_TOKENS: usize = 8;

impl CpuBackend {
    pub(crate) fn run_qkv(
        &mut self,
        spec: &AttentionSpec,
        eps: f32,
        weights: &AttentionWeights,
        hidden: &Buffer,
        kv: KvId,
        q: &Buffer,
    ) -> Result<()> {
        const OP: &str = "qkv";
        let (step, w, engine) = (&self.step, &mut self.workspace, &mut self.engine);
        let tokens = step.tokens();
        let norm = self.weights.vector(OP, "norm", weights.norm)?;
        let width = norm.len();
        let (q_width, kv_width) = (spec.q_width(), spec.kv_width());
        let linear = |what, id: LinearId, out| {
            let weight = self.weights.linear(OP, what, id)?;
            weight.expect(OP, what, out, width).map(|()| weight)
        };
        let wq = linear("q", weights.q, q_width)?;
        let wk = linear("k", weights.k, kv_width)?;
        let wv = linear("v", weights.v, kv_width)?;
        let qk_norm = |what, id: Option<VectorId>, width: usize| {
            let expected = match spec.qk_norm {
                QkNorm::None => return Ok(&[][..]),
                QkNorm::PerHead => spec.head_dim,
                QkNorm::WholeProjection => width,
            };
            let id = id.ok_or_else(|| mismatch(OP, what, "absent", format!("{expected} values")))?;
            let norm = self.weights.vector(OP, what, id)?;
            expect(OP, what, norm.len(), expected).map(|()| norm)
        };
        let q_norm = qk_norm("q_norm", weights.q_norm, q_width)?;
        let k_norm = qk_norm("k_norm", weights.k_norm, kv_width)?;
        let caches = self.caches.len();
        let cache = self.caches.get_mut(kv.0 as usize);
        let cache =
            cache.ok_or_else(|| mismatch(OP, "kv", format!("handle {}", kv.0), format!("below {caches}")))?;
        cache.check(OP, spec, step)?;
        let [hidden, q] = self
            .buffers
            .words(OP, [(hidden, tokens * width), (q, tokens * q_width)])?;
        let x = &mut w.normed.f32_mut()[..tokens * width];
        let k = &mut w.keys.f32_mut()[..tokens * kv_width];
        let v = &mut w.values.f32_mut()[..tokens * kv_width];
        let angles = &mut w.angles.f32_mut()[..tokens * spec.rotary_dim];
        rmsnorm_all(engine, hidden, norm, eps, x);
        engine.rounded(x);
        // SAFETY: each result is written by the one task that has its row of the weight.
        let outs = unsafe {
            [
                Out::new(q, q_width, false),
                Out::new(k, kv_width, false),
                Out::new(v, kv_width, false),
            ]
        };
        linears_of(
            engine,
            &mut w.packed,
            x,
            &[(wq, outs[0]), (wk, outs[1]), (wv, outs[2])],
        );

        let (isa, rounds) = (engine.isa, engine.rounds);
        // Layers share the angles of a step unless their rope differs.
        let kind = Some((spec.rope_theta.to_bits(), spec.rotary_dim));
        if w.angles_of != kind {
            let frequencies = rope::frequencies(spec);
            let angles = Rows::new(&mut *angles, spec.rotary_dim);
            engine.run_parts(tokens, TASK_TOKENS, |part, _| {
                for t in part {
                    // SAFETY: each token is in one part.
                    rope::angles(&frequencies, step.positions[t], unsafe { angles.take(t..t + 1) });
                }
            });
            w.angles_of = kind;
        }
        let (q, k) = (Rows::new(q, q_width), Rows::new(k, kv_width));
        let (v, angles, writer) = (&*v, &*angles, cache.writer());
        engine.run_parts(tokens, TASK_TOKENS, |part, _| {
            for t in part {
                // SAFETY: each token is in one part.
                let (q, k) = unsafe { (q.take(t..t + 1), k.take(t..t + 1)) };
                let v = &v[t * kv_width..][..kv_width];
                let angles = &angles[t * spec.rotary_dim..][..spec.rotary_dim];
                normalize(isa, spec, q_norm, eps, q);
                normalize(isa, spec, k_norm, eps, k);
                rope::rotate(isa, spec.head_dim, angles, q);
                rope::rotate(isa, spec.head_dim, angles, k);
                if rounds {
                    round(q);
                }
                let position = step.positions[t] as usize;
                // SAFETY: no two runs write one page (`Step::begin` checks it), and a run's positions differ.
                unsafe { writer.write(isa, step.pages_of(t), position, k, v) };
            }
        });
        Ok(())
    }
}

/// The q/k norm of one token in place.
fn normalize(isa: Isa, spec: &AttentionSpec, w: &[f32], eps: f32, x: &mut [f32]) {
    match spec.qk_norm {
        QkNorm::None => {}
        QkNorm::WholeProjection => rmsnorm_in_place(isa, x, w, eps),
        QkNorm::PerHead => {
            x.chunks_exact_mut(spec.head_dim)
                .for_each(|head| rmsnorm_in_place(isa, head, w, eps));
        }
    }
}

//! The op on all threads.

use crate::backend::{Buffer, Result};
use crate::cpu::CpuBackend;
use crate::cpu::check::expect;
use crate::cpu::engine::Rows;
use crate::simd::{Kernel, LANES, Simd, run};

/// Tokens of a task.
const TASK_TOKENS: usize = 16;

impl CpuBackend {
    pub(crate) fn run_combine(
        &mut self,
        k: usize,
        y: &Buffer,
        weights: &Buffer,
        hidden: &Buffer,
    ) -> Result<()> {
        let (tokens, width) = (self.step.tokens(), self.width);
        if tokens == 0 || k == 0 {
            return Ok(());
        }
        if width == 0 {
            return expect("combine", "routes before it in the step", 0, 1);
        }
        let shapes = [
            (y, tokens * k * width),
            (weights, tokens * k),
            (hidden, tokens * width),
        ];
        let [y, weights, hidden] = self.buffers.words("combine", shapes)?;
        let (y, weights) = (&*y, &*weights);
        let isa = self.engine.isa;
        let hidden = Rows::new(hidden, width);
        self.engine.run_parts(tokens, TASK_TOKENS, |part, _| {
            for t in part {
                let y = &y[t * k * width..][..k * width];
                let weights = &weights[t * k..][..k];
                // SAFETY: each token is in one part.
                let hidden = unsafe { hidden.take(t..t + 1) };
                run(isa, Combine { y, weights, hidden });
            }
        });
        Ok(())
    }
}

/// One token.
struct Combine<'a> {
    y: &'a [f32],
    weights: &'a [f32],
    hidden: &'a mut [f32],
}

impl Kernel for Combine<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let width = self.hidden.len();
        let (chunks, rest) = self.hidden.as_chunks_mut::<LANES>();
        for (i, hidden) in chunks.iter_mut().enumerate() {
            let mut sum = s.splat(0.0);
            for (weight, y) in self.weights.iter().zip(self.y.chunks_exact(width)) {
                let (y, _) = y.as_chunks::<LANES>();
                sum = s.fma(s.splat(*weight), s.load(&y[i]), sum);
            }
            s.store(s.add(s.load(hidden), sum), hidden);
        }
        let first = width - rest.len();
        for (i, hidden) in rest.iter_mut().enumerate() {
            let slots = self.weights.iter().zip(self.y.chunks_exact(width));
            let sum = slots.fold(0.0, |sum: f32, (weight, y)| weight.mul_add(y[first + i], sum));
            *hidden += sum;
        }
    }
}

//! Rows one after the other, or on all threads.

use crate::cpu::engine::{Engine, Rows};
use crate::simd::{Isa, Kernel, LANES, Simd, run};

/// Rows of a task.
const TASK_ROWS: usize = 16;

/// Normalises each row of `x` (`[rows, w.len()]`) into `y`, on all threads if there are many.
pub(crate) fn rmsnorm_all(engine: &mut Engine, x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
    let (isa, width) = (engine.isa, w.len());
    let y = Rows::new(y, width);
    engine.run_parts(x.len() / width, TASK_ROWS, |part, _| {
        let x = &x[part.start * width..part.end * width];
        // SAFETY: parts are disjoint.
        rmsnorm(isa, x, w, eps, unsafe { y.take(part) });
    });
}

/// Normalises each row of `x` (`[rows, w.len()]`) into `y`.
pub(crate) fn rmsnorm(isa: Isa, x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
    for (x, y) in x.chunks_exact(w.len()).zip(y.chunks_exact_mut(w.len())) {
        let scale = inverse_rms(isa, x, eps);
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = x * scale * w;
        }
    }
}

/// The same in place, of one row.
pub(crate) fn rmsnorm_in_place(isa: Isa, x: &mut [f32], w: &[f32], eps: f32) {
    let scale = inverse_rms(isa, x, eps);
    for (x, w) in x.iter_mut().zip(w) {
        *x = *x * scale * w;
    }
}

fn inverse_rms(isa: Isa, x: &[f32], eps: f32) -> f32 {
    1.0 / (run(isa, SumOfSquares(x)) / x.len() as f32 + eps).sqrt()
}

struct SumOfSquares<'a>(&'a [f32]);

impl Kernel for SumOfSquares<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (chunks, rest) = self.0.as_chunks::<LANES>();
        let mut last = [0.0; LANES];
        last[..rest.len()].copy_from_slice(rest);
        let mut sum = s.splat(0.0);
        for chunk in chunks.iter().chain([&last]) {
            let x = s.load(chunk);
            sum = s.fma(x, x, sum);
        }
        s.sum(sum)
    }
}

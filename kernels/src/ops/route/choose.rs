//! From the logits of one token to its experts.

use conclave_plan::model::{MoeSpec, Scoring};

use super::MAX_TOP_K;
use crate::simd::{Isa, Kernel, LANES, Simd, math, run};

/// Logits `z` become scores in place; writes `spec.top_k` ids (as the bits of F32, the buffer's type) and weights.
/// `spec.top_k` is at most `MAX_TOP_K` and at most `z.len()`.
pub(super) fn choose(
    isa: Isa,
    spec: &MoeSpec,
    bias: Option<&[f32]>,
    z: &mut [f32],
    ids: &mut [f32],
    weights: &mut [f32],
) {
    run(
        isa,
        Score {
            scoring: spec.scoring,
            z,
        },
    );
    let mut chosen = [(0.0, 0); MAX_TOP_K];
    let chosen = &mut chosen[..spec.top_k];
    let mut count = 0;
    for (expert, score) in z.iter().enumerate() {
        let key = score + bias.map_or(0.0, |bias| bias[expert]);
        if count == spec.top_k && (key <= chosen[count - 1].0 || key.is_nan()) {
            continue;
        }
        // Insertion from the back: an equal key stays behind the earlier expert; NaN stays last.
        let mut at = count.min(spec.top_k - 1);
        count = (count + 1).min(spec.top_k);
        while at > 0 && key > chosen[at - 1].0 {
            chosen[at] = chosen[at - 1];
            at -= 1;
        }
        chosen[at] = (key, expert);
    }
    for ((_, expert), (id, weight)) in chosen.iter().zip(ids.iter_mut().zip(&mut *weights)) {
        *id = f32::from_bits(*expert as u32);
        *weight = z[*expert];
    }
    if spec.renormalize {
        let sum: f32 = weights.iter().fold(0.0, |sum, weight| sum + weight);
        weights.iter_mut().for_each(|weight| *weight /= sum);
    }
}

struct Score<'a> {
    scoring: Scoring,
    z: &'a mut [f32],
}

impl Kernel for Score<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let largest = self
            .z
            .iter()
            .fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a });
        let (chunks, rest) = self.z.as_chunks_mut::<LANES>();
        let mut last = [0.0; LANES];
        last[..rest.len()].copy_from_slice(rest);
        let mut sum = s.splat(0.0);
        for chunk in chunks {
            let z = s.load(chunk);
            let score = match self.scoring {
                Scoring::Sigmoid => math::sigmoid(s, z),
                Scoring::Softmax => math::exp(s, s.sub(z, s.splat(largest))),
            };
            s.store(score, chunk);
            sum = s.add(sum, score);
        }
        if !rest.is_empty() {
            let z = s.load(&last);
            let score = match self.scoring {
                Scoring::Sigmoid => math::sigmoid(s, z),
                Scoring::Softmax => math::exp(s, s.sub(z, s.splat(largest))),
            };
            s.store(score, &mut last);
            rest.copy_from_slice(&last[..rest.len()]);
            last[rest.len()..].fill(0.0);
            sum = s.add(sum, s.load(&last));
        }
        if self.scoring == Scoring::Softmax {
            let sum = s.sum(sum);
            self.z.iter_mut().for_each(|z| *z /= sum);
        }
    }
}

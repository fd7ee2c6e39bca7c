//! Router: the `k` experts of a token and their weights.
//!
//! `score = sigmoid(z)` or `softmax(z)`; the experts are chosen by `score + bias`, best first, the lower index
//! first among equals; their weights are the scores without the bias, divided by their sum (added in slot order)
//! if the model renormalises.

use conclave_plan::model::{MoeSpec, Scoring};

use crate::simd::{Isa, Kernel, LANES, Simd, math, run};

/// Most experts of a layer; the largest published model has 512.
pub(crate) const MAX_EXPERTS: usize = 4096;
/// Most experts of a token.
pub(crate) const MAX_TOP_K: usize = 64;

/// One token: logits `z` become scores in place; writes `spec.top_k` ids and weights.
pub(crate) fn choose(
    isa: Isa,
    spec: &MoeSpec,
    bias: Option<&[f32]>,
    z: &mut [f32],
    ids: &mut [u32],
    weights: &mut [f32],
) {
    run(
        isa,
        Score {
            scoring: spec.scoring,
            z,
        },
    );
    let mut count = 0;
    for (expert, score) in z.iter().enumerate() {
        let key = score + bias.map_or(0.0, |bias| bias[expert]);
        // Insertion from the back: an equal key stays behind the earlier expert.
        let mut at = count;
        while at > 0 && key > weights[at - 1] {
            at -= 1;
        }
        if at == spec.top_k {
            continue;
        }
        count = (count + 1).min(spec.top_k);
        ids.copy_within(at..count - 1, at + 1);
        weights.copy_within(at..count - 1, at + 1);
        ids[at] = expert as u32;
        weights[at] = key;
    }
    for (weight, id) in weights.iter_mut().zip(ids.iter()) {
        *weight = z[*id as usize];
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
        let mut last = [f32::NEG_INFINITY; LANES];
        last[..rest.len()].copy_from_slice(rest);
        let mut sum = s.splat(0.0);
        for chunk in chunks.iter_mut().chain([&mut last]) {
            let z = s.load(chunk);
            let score = match self.scoring {
                Scoring::Sigmoid => math::sigmoid(s, z),
                Scoring::Softmax => math::exp(s, s.sub(z, s.splat(largest))),
            };
            s.store(score, chunk);
            sum = s.add(sum, score);
        }
        rest.copy_from_slice(&last[..rest.len()]);
        if self.scoring == Scoring::Softmax {
            let sum = s.sum(sum);
            self.z.iter_mut().for_each(|z| *z /= sum);
        }
    }
}

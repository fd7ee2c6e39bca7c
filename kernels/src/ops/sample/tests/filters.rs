//! Temperature, top-k, top-p and min-p: frequencies, and which tokens stay.

use proptest::prelude::*;

use super::super::{Scratch, sample};
use super::{params, row, token};
use crate::backend::SampleParams;
use crate::cpu::Isa;

/// How often each token comes over many positions.
fn frequencies(logits: &[f32], params: &SampleParams, draws: u32) -> Vec<f64> {
    let mut scratch = Scratch::new(logits.len());
    let mut counts = vec![0.0; logits.len()];
    for position in 0..draws {
        let sampled = sample(Isa::detect(), logits, &row(params, position), &mut scratch);
        counts[sampled.token as usize] += 1.0 / f64::from(draws);
    }
    counts
}

#[test]
fn frequencies_are_the_softmax_at_the_temperature() {
    let logits = [0.0, 1.0, 2.0, -1.0, 0.5];
    for temperature in [0.5, 1.0, 2.0] {
        let found = frequencies(
            &logits,
            &SampleParams {
                temperature,
                ..params()
            },
            40_000,
        );
        let p: Vec<f64> = logits
            .iter()
            .map(|x| (f64::from(*x) / f64::from(temperature)).exp())
            .collect();
        let sum: f64 = p.iter().sum();
        for (found, p) in found.iter().zip(&p) {
            assert!((found - p / sum).abs() < 0.01, "{found} and {}", p / sum);
        }
    }
}

#[test]
fn top_k_top_p_and_min_p_keep_what_they_say() {
    // Probabilities 0.4, 0.3, 0.2, 0.1.
    let logits = [0.2f32, 0.4, 0.1, 0.3].map(f32::ln);
    let kept = |params: SampleParams| -> Vec<usize> {
        let found = frequencies(&logits, &params, 4_000);
        (0..4).filter(|token| found[*token] > 0.0).collect()
    };
    assert_eq!(kept(SampleParams { top_k: 1, ..params() }), [1]);
    assert_eq!(kept(SampleParams { top_k: 2, ..params() }), [1, 3]);
    assert_eq!(
        kept(SampleParams {
            top_k: 99,
            ..params()
        }),
        [0, 1, 2, 3]
    );
    assert_eq!(
        kept(SampleParams {
            top_p: 0.0,
            ..params()
        }),
        [1]
    );
    assert_eq!(
        kept(SampleParams {
            top_p: 0.39,
            ..params()
        }),
        [1]
    );
    assert_eq!(
        kept(SampleParams {
            top_p: 0.41,
            ..params()
        }),
        [1, 3]
    );
    assert_eq!(
        kept(SampleParams {
            top_p: 0.71,
            ..params()
        }),
        [0, 1, 3]
    );
    assert_eq!(
        kept(SampleParams {
            min_p: 0.6,
            ..params()
        }),
        [1, 3]
    );
    assert_eq!(
        kept(SampleParams {
            min_p: 1.0,
            ..params()
        }),
        [1]
    );
    // Of 0.4, 0.3, 0.2 renormalised, 0.7 is reached by two.
    assert_eq!(
        kept(SampleParams {
            top_k: 3,
            top_p: 0.7,
            ..params()
        }),
        [1, 3]
    );
    let equal = frequencies(&[0.0; 4], &SampleParams { top_k: 2, ..params() }, 1000);
    assert_eq!(
        (equal[2], equal[3]),
        (0.0, 0.0),
        "the lower index first among equals"
    );
}

proptest! {
    /// A token that comes out is one that top-k, top-p and min-p leave, by a plain computation in F64.
    #[test]
    fn a_sampled_token_is_one_that_the_filters_leave(
        logits in prop::collection::vec(-6.0f32..6.0, 1..700),
        temperature in 0.2f32..3.0,
        top_k in 0..40u32,
        top_p in 0.05f32..1.0,
        min_p in 0.0f32..0.5,
        seed: u64,
    ) {
        let params = SampleParams { temperature, top_k, top_p, min_p, seed, ..params() };
        let token = token(&logits, &row(&params, 9)) as usize;
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let p = |token: usize| ((f64::from(logits[token]) - f64::from(largest)) / f64::from(temperature)).exp();
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
        prop_assert!(p(token) >= f64::from(min_p) - 1e-5);
        order.retain(|token| p(*token) >= f64::from(min_p) - 1e-5);
        if top_k > 0 {
            order.truncate(top_k as usize);
        }
        let sum: f64 = order.iter().map(|token| p(*token)).sum();
        let at = order.iter().position(|other| *other == token);
        prop_assert!(at.is_some(), "not among the top {top_k}");
        let before: f64 = order[..at.unwrap_or(0)].iter().map(|token| p(*token)).sum();
        prop_assert!(before <= (f64::from(top_p) + 1e-4) * sum, "beyond top_p");
    }
}

//! Sampling: each step against its definition, determinism, and rows that cannot be sampled.

mod filters;

use super::{Scratch, sample};
use crate::backend::{SampleError, SampleParams, SampleRow, Sampled};
use crate::cpu::Isa;
use crate::testing::*;

fn params() -> SampleParams {
    SampleParams {
        temperature: 1.0,
        seed: 1,
        ..SampleParams::default()
    }
}

fn row(params: &SampleParams, position: u32) -> SampleRow<'_> {
    SampleRow {
        params,
        position,
        tokens: &[],
        output_start: 0,
        history: None,
        mask: None,
        forbidden: &[],
    }
}

fn sampled(logits: &[f32], row: &SampleRow<'_>) -> Sampled {
    sample(Isa::detect(), logits, row, &mut Scratch::new(logits.len()))
}

fn token(logits: &[f32], row: &SampleRow<'_>) -> u32 {
    let sampled = sampled(logits, row);
    assert_eq!(sampled.error, None);
    sampled.token
}

fn greedy() -> SampleParams {
    SampleParams {
        temperature: 0.0,
        ..params()
    }
}

#[test]
fn temperature_zero_takes_the_largest_and_the_lowest_index_of_equals() {
    assert_eq!(token(&[1.0, 3.0, 3.0, 2.0], &row(&greedy(), 0)), 1);
    assert_eq!(token(&[-0.0, 0.0], &row(&greedy(), 0)), 0);
    assert_eq!(token(&[f32::NEG_INFINITY, -5.0], &row(&greedy(), 0)), 1);
}

#[test]
fn bias_mask_and_forbidden_tokens() {
    let logits = [0.0, 5.0, 1.0, 2.0];
    let biased = SampleParams {
        logit_bias: vec![(0, 10.0), (1, -1.0)],
        ..greedy()
    };
    assert_eq!(token(&logits, &row(&biased, 0)), 0);
    let greedy = greedy();
    assert_eq!(
        token(
            &logits,
            &SampleRow {
                forbidden: &[1],
                ..row(&greedy, 0)
            }
        ),
        3
    );
    assert_eq!(
        token(
            &logits,
            &SampleRow {
                mask: Some(&[0b0101]),
                ..row(&greedy, 0)
            }
        ),
        2
    );
    assert_eq!(
        token(
            &logits,
            &SampleRow {
                mask: Some(&[0b0101]),
                forbidden: &[2],
                ..row(&greedy, 0)
            }
        ),
        0
    );
}

#[test]
fn penalties_are_functions_of_the_tokens() {
    let logits = [2.0, 1.9, -1.0, 0.5];
    let with = |params: &SampleParams, tokens: &[u32], output_start| {
        token(
            &logits,
            &SampleRow {
                tokens,
                output_start,
                ..row(params, 0)
            },
        )
    };
    let repetition = SampleParams {
        repetition_penalty: 1.1,
        ..greedy()
    };
    assert_eq!(with(&repetition, &[], 0), 0);
    assert_eq!(with(&repetition, &[0, 0, 0], 3), 1, "of the prompt too, once");
    assert_eq!(with(&repetition, &[0, 1, 0], 1), 0);
    let presence = SampleParams {
        presence_penalty: 0.2,
        ..greedy()
    };
    assert_eq!(with(&presence, &[0], 1), 0, "not of the prompt");
    assert_eq!(with(&presence, &[3, 0], 1), 1);
    let frequency = SampleParams {
        frequency_penalty: 0.06,
        ..greedy()
    };
    assert_eq!(with(&frequency, &[0], 0), 0);
    assert_eq!(with(&frequency, &[0, 0], 0), 1);
    // Scratch is clean again after each row.
    let mut scratch = Scratch::new(4);
    let tokens = [0, 0, 1, 3];
    let both = SampleParams {
        repetition_penalty: 1.5,
        ..frequency
    };
    let penalised = SampleRow {
        tokens: &tokens,
        ..row(&both, 0)
    };
    let first = sample(Isa::detect(), &logits, &penalised, &mut scratch);
    assert_eq!(sample(Isa::detect(), &logits, &penalised, &mut scratch), first);
    assert!(scratch.counts.iter().all(|count| *count == 0));
}

#[test]
fn logprobs_are_those_of_the_model() {
    let logits = [1.0f32, 3.0, 2.0, 3.0, -2.0];
    let sum: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
    let exact = |token: usize| (f64::from(logits[token]).exp() / sum).ln();
    let params = SampleParams {
        logprobs: Some(3),
        logit_bias: vec![(2, 100.0)],
        temperature: 0.7,
        ..params()
    };
    let found = sampled(&logits, &row(&params, 3));
    assert_eq!((found.token, found.rank), (2, 3));
    assert!((f64::from(found.logprob) - exact(2)).abs() < 1e-6);
    let tokens: Vec<u32> = found.top.iter().map(|(token, _)| *token).collect();
    assert_eq!(tokens, [1, 3, 2]);
    for (token, logprob) in found.top {
        assert!((f64::from(logprob) - exact(token as usize)).abs() < 1e-6);
    }
    let all = SampleParams {
        logprobs: Some(99),
        ..params
    };
    assert_eq!(sampled(&logits, &row(&all, 3)).top.len(), 5);
}

#[test]
fn rows_that_cannot_be_sampled_say_why() {
    let greedy = greedy();
    let error = |logits: &[f32], row: &SampleRow<'_>| match sampled(logits, row).error.unwrap() {
        SampleError::Failed(reason) => reason,
        SampleError::Unsatisfiable => panic!("the row forbids every token"),
    };
    assert!(error(&[0.0, f32::NAN], &row(&greedy, 0)).contains("the logit of token 1 is NaN"));
    assert!(error(&[f32::INFINITY], &row(&greedy, 0)).contains("the logit of token 0 is inf"));
    assert!(
        error(
            &[0.0; 9],
            &SampleRow {
                mask: Some(&[1]),
                ..row(&greedy, 0)
            }
        )
        .contains("8 bits")
    );
    assert!(
        error(
            &[0.0; 3],
            &SampleRow {
                forbidden: &[3],
                ..row(&greedy, 0)
            }
        )
        .contains("forbidden token 3")
    );
    let presence = SampleParams {
        presence_penalty: 1.0,
        ..greedy.clone()
    };
    assert!(
        error(
            &[0.0; 3],
            &SampleRow {
                tokens: &[5],
                ..row(&presence, 0)
            }
        )
        .contains("token 5")
    );
    let biased = SampleParams {
        logit_bias: vec![(7, 1.0)],
        ..greedy.clone()
    };
    assert!(error(&[0.0; 3], &row(&biased, 0)).contains("logit_bias token 7"));
    let infinite = SampleParams {
        logit_bias: vec![(1, f32::INFINITY)],
        ..greedy
    };
    assert!(error(&[0.0; 3], &row(&infinite, 0)).contains("infinite or NaN"));
    for temperature in [-1.0, f32::NAN] {
        let params = SampleParams {
            temperature,
            ..params()
        };
        assert!(error(&[0.0; 3], &row(&params, 0)).contains("temperature"));
    }
    let min_p = SampleParams {
        min_p: 2.0,
        ..params()
    };
    assert!(error(&[0.0; 3], &row(&min_p, 0)).contains("min_p leaves no token"));
}

#[test]
fn rows_that_forbid_every_token_say_so_by_kind() {
    let greedy = greedy();
    let masked = SampleRow {
        mask: Some(&[0]),
        ..row(&greedy, 0)
    };
    let forbidden = SampleRow {
        mask: Some(&[0b011]),
        forbidden: &[0, 1],
        ..row(&greedy, 0)
    };
    for row in [masked, forbidden] {
        assert_eq!(sampled(&[0.0; 3], &row).error, Some(SampleError::Unsatisfiable));
    }
    let nowhere = [f32::NEG_INFINITY; 2];
    assert_eq!(
        sampled(&nowhere, &row(&greedy, 0)).error,
        Some(SampleError::Unsatisfiable)
    );
}

#[test]
fn the_same_seed_and_position_give_the_same_token_on_every_instruction_set() {
    let mut random = Random::new(5);
    let logits: Vec<f32> = random.vec(1003).into_iter().map(|x| x * 8.0).collect();
    let kinds = [
        params(),
        SampleParams {
            top_p: 0.9,
            ..params()
        },
        SampleParams {
            top_k: 50,
            top_p: 0.8,
            temperature: 0.6,
            ..params()
        },
        SampleParams {
            min_p: 0.01,
            logprobs: Some(5),
            ..params()
        },
    ];
    for params in kinds {
        let tokens: Vec<Sampled> = (0..50)
            .map(|position| sampled(&logits, &row(&params, position)))
            .collect();
        assert!(
            tokens.iter().any(|other| other.token != tokens[0].token),
            "positions differ"
        );
        let other = SampleParams {
            seed: 2,
            ..params.clone()
        };
        let others: Vec<Sampled> = (0..50)
            .map(|position| sampled(&logits, &row(&other, position)))
            .collect();
        assert_ne!(tokens, others, "seeds differ");
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let mut scratch = Scratch::new(logits.len());
            for (position, expected) in (0..).zip(&tokens) {
                let found = sample(isa, &logits, &row(&params, position), &mut scratch);
                assert_eq!(&found, expected, "{isa:?}");
                assert_eq!(found.logprob.to_bits(), expected.logprob.to_bits(), "{isa:?}");
            }
        }
    }
}

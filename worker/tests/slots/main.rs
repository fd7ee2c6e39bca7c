//! Step messages against the slots: what is refused and why, and what the sampler is told.
//!
//! Proves invariant B2 of ARCHITECTURE.md.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod sampling;
mod tokens;

use conclave_kernels::backend::Sampled;
use conclave_proto::cluster::v1 as wire;
use conclave_worker::slots::{Prepared, SlotLimits, Slots};
use conclave_worker::verify::{greedy, run, start};

const LIMITS: SlotLimits = SlotLimits {
    max_slots: 2,
    max_tokens: 8,
    kv_pages: 6,
    page_tokens: 4,
    vocab: 20,
    max_position: 16,
    layers: 3,
};

fn prompt_step(tokens: &[u32]) -> wire::Step {
    wire::Step {
        start_slots: vec![start(0, vec![0, 1], tokens.len(), greedy())],
        runs: vec![run(0, 0, tokens, true)],
        ..wire::Step::default()
    }
}

fn refused(slots: &mut Slots, step: wire::Step) -> String {
    slots.apply(step).expect_err("it was accepted").to_string()
}

/// Samples `token` for every row.
fn finish(
    slots: &mut Slots,
    mut prepared: Prepared,
    token: u32,
) -> (Vec<wire::Sample>, Vec<wire::PromptLogprobs>) {
    let sampled = Sampled {
        token,
        ..Sampled::default()
    };
    let counts = prepared.sampling(slots).1.map(|list| list.len());
    prepared.finish(slots, counts.map(|count| vec![sampled.clone(); count]).into())
}

fn pages(slot: u32, pages: Vec<u32>) -> wire::SlotPages {
    wire::SlotPages { slot, pages }
}

fn bias(token: u32, bias: f32) -> wire::LogitBias {
    wire::LogitBias { token, bias }
}

fn words(tokens: &[u32]) -> wire::TokenSequence {
    wire::TokenSequence {
        tokens: tokens.to_vec(),
    }
}

#[test]
fn every_field_of_a_step_is_checked() {
    type Spoil = fn(&mut wire::Step);
    let cases: Vec<(&str, Spoil)> = vec![
        ("layer_begin..layer_end: 1..3", |s| {
            (s.layer_begin, s.layer_end) = (1, 3)
        }),
        ("layer_begin..layer_end: 0..2", |s| s.layer_end = 2),
        ("collective_deadline_ms: 600001", |s| {
            s.collective_deadline_ms = 600_001
        }),
        ("end_slots[0]: slot 2 is not below 2", |s| s.end_slots = vec![2]),
        ("end_slots[0]: slot 1 is not in use", |s| s.end_slots = vec![1]),
        ("start_slots[0].slot: slot 9 is not below 2", |s| {
            s.start_slots[0].slot = 9
        }),
        ("start_slots[1].slot: slot 0 is in use", |s| {
            s.start_slots.push(s.start_slots[0].clone())
        }),
        ("start_slots[0].sampling: it is not set", |s| {
            s.start_slots[0].sampling = None
        }),
        ("start_slots[0].pages: page 6 is not below 6", |s| {
            s.start_slots[0].pages[1] = 6
        }),
        ("start_slots[0].pages: 5 pages, a slot has at most 4", |s| {
            s.start_slots[0].pages = vec![0; 5]
        }),
        ("start_slots[0].cached_tokens: 9 do not fit the 2 pages", |s| {
            s.start_slots[0].cached_tokens = 9
        }),
        ("start_slots[0].prompt_tokens: 17", |s| {
            s.start_slots[0].prompt_tokens = 17
        }),
        ("start_slots[0].history: 1 tokens, 0 are needed", |s| {
            s.start_slots[0].history = vec![1]
        }),
        ("append_pages[0].slot: slot 1 is not in use", |s| {
            s.append_pages.push(pages(1, vec![0]))
        }),
        ("append_pages[0].slot: slot 5 is not below 2", |s| {
            s.append_pages.push(pages(5, vec![0]))
        }),
        ("append_pages[0]: page 7", |s| {
            s.append_pages.push(pages(0, vec![7]))
        }),
        ("append_pages[0]: slot 0 would have more than 4", |s| {
            s.append_pages.push(pages(0, vec![1, 2, 3]))
        }),
        ("runs[0].slot: slot 1 is not in use", |s| s.runs[0].slot = 1),
        ("runs[0].position: 3, the slot is at 0", |s| {
            s.runs[0].position = 3
        }),
        ("runs[0].tokens: none are given", |s| s.runs[0].tokens.clear()),
        ("runs[0].tokens: token 20 is not below 20", |s| {
            s.runs[0].tokens[0] = 20
        }),
        ("runs[0].tokens: the step has 9 tokens or more, at most 8", |s| {
            s.runs[0].tokens = vec![1; 9]
        }),
        ("runs[0].tokens: they end at 5, the slot's 1 pages", |s| {
            s.start_slots[0].pages.pop();
            s.runs[0].tokens = vec![1; 5];
        }),
        ("runs[1]: slot 0 runs twice", |s| s.runs.push(s.runs[0].clone())),
        ("runs[0].mask: 2 bytes for a vocabulary of 20", |s| {
            s.runs[0].mask = vec![0; 2].into()
        }),
        ("runs[0].mask: 5 bytes", |s| s.runs[0].mask = vec![0; 5].into()),
        ("runs[0].next_prompt_token", |s| {
            s.runs[0].next_prompt_token = Some(20)
        }),
    ];
    for (expected, spoil) in cases {
        let mut step = prompt_step(&[1, 2, 3]);
        spoil(&mut step);
        let error = refused(&mut Slots::new(LIMITS), step);
        assert!(error.starts_with(expected), "{error:?} is not {expected:?}");
    }
    assert!(Slots::new(LIMITS).apply(prompt_step(&[1, 2, 3])).is_ok());
    let whole = wire::Step {
        layer_end: 3,
        ..prompt_step(&[1; 8])
    };
    assert!(Slots::new(LIMITS).apply(whole).is_ok());
}

#[test]
fn every_sampling_parameter_is_checked_at_its_bounds() {
    type Spoil = fn(&mut wire::Sampling);
    let good: [Spoil; 9] = [
        |s| s.temperature = f32::MAX,
        |s| s.top_p = 1e-30,
        |s| s.min_p = 1.0,
        |s| s.top_k = u32::MAX,
        |s| s.repetition_penalty = 1e-3,
        |s| s.presence_penalty = -1e30,
        |s| s.logit_bias = vec![bias(19, -100.0)],
        |s| s.suppress = vec![19; 20],
        |s| s.logprobs = Some(u32::MAX),
    ];
    let bad: Vec<(&str, Spoil)> = vec![
        ("temperature: -", |s| s.temperature = -1e-9),
        ("temperature: NaN", |s| s.temperature = f32::NAN),
        ("temperature: inf", |s| s.temperature = f32::INFINITY),
        ("top_p: 0", |s| s.top_p = 0.0),
        ("top_p: 1.0000001", |s| s.top_p = 1.000_000_1),
        ("min_p: 1.1", |s| s.min_p = 1.1),
        ("min_p: NaN", |s| s.min_p = f32::NAN),
        ("repetition_penalty: 0", |s| s.repetition_penalty = 0.0),
        ("repetition_penalty: inf", |s| {
            s.repetition_penalty = f32::INFINITY
        }),
        ("presence_penalty: NaN", |s| s.presence_penalty = f32::NAN),
        ("frequency_penalty: -inf", |s| {
            s.frequency_penalty = f32::NEG_INFINITY
        }),
        ("logit_bias: token 20", |s| s.logit_bias = vec![bias(20, 0.0)]),
        ("logit_bias: token 1 with NaN", |s| {
            s.logit_bias = vec![bias(1, f32::NAN)]
        }),
        ("logit_bias: 21 entries", |s| {
            s.logit_bias = vec![bias(1, 1.0); 21]
        }),
        ("suppress: token 20", |s| s.suppress = vec![20]),
        ("suppress: 21 entries", |s| s.suppress = vec![1; 21]),
        ("bad_words: an entry has 0 tokens", |s| {
            s.bad_words = vec![words(&[])]
        }),
        ("bad_words: token 20", |s| s.bad_words = vec![words(&[1, 20])]),
        ("bad_words: 4097 entries", |s| {
            s.bad_words = vec![words(&[1]); 4097]
        }),
        ("bad_words: an entry has 1025 tokens", |s| {
            s.bad_words = vec![words(&[1; 1025])]
        }),
    ];
    let with = |spoil: Spoil| {
        let mut step = prompt_step(&[1]);
        spoil(step.start_slots[0].sampling.as_mut().unwrap());
        Slots::new(LIMITS).apply(step)
    };
    for spoil in good {
        with(spoil).unwrap();
    }
    for (expected, spoil) in bad {
        let error = with(spoil).unwrap_err().to_string();
        let expected = format!("start_slots[0].sampling.{expected}");
        assert!(error.starts_with(&expected), "{error:?} is not {expected:?}");
    }
}

//! What the sampler is told: penalties, forbidden tokens, masks, and log-probabilities of prompts.

use conclave_proto::cluster::v1 as wire;
use conclave_worker::slots::Slots;
use conclave_worker::verify::{greedy, run, start};

use super::{LIMITS, finish, prompt_step, refused, words};

#[test]
fn penalties_see_every_token_once_and_where_the_output_begins() {
    let mut sampling = greedy();
    sampling.repetition_penalty = 1.2;
    let mut slots = Slots::new(LIMITS);
    let step = wire::Step {
        start_slots: vec![wire::SlotStart {
            cached_tokens: 4,
            history: vec![1, 2, 3, 4],
            ..start(0, vec![0, 1, 2], 6, sampling.clone())
        }],
        runs: vec![run(0, 4, &[5, 6], true)],
        ..wire::Step::default()
    };
    let mut prepared = slots.apply(step).unwrap();
    {
        let (_, [samples, _]) = prepared.sampling(&slots);
        assert_eq!(samples[0].how.tokens, [1, 2, 3, 4, 5, 6]);
        assert_eq!((samples[0].how.output_start, samples[0].how.position), (6, 6));
    }
    finish(&mut slots, prepared, 8);
    let mut prepared = slots
        .apply(wire::Step {
            runs: vec![run(0, 6, &[], true)],
            ..wire::Step::default()
        })
        .unwrap();
    let (_, [samples, _]) = prepared.sampling(&slots);
    assert_eq!(samples[0].how.tokens, [1, 2, 3, 4, 5, 6, 8]);
    // Without the history the penalty would be wrong.
    let mut step = prompt_step(&[1]);
    step.start_slots[0].sampling = Some(sampling);
    step.start_slots[0].cached_tokens = 4;
    assert_eq!(
        refused(&mut Slots::new(LIMITS), step),
        "start_slots[0].history: 0 tokens, 4 are needed"
    );
}

#[test]
fn suppressed_tokens_and_bad_words_are_forbidden_where_they_apply() {
    let mut sampling = greedy();
    (sampling.suppress, sampling.suppress_until) = (vec![3, 5], 4);
    sampling.bad_words = vec![words(&[9]), words(&[1, 2, 7]), words(&[2, 2, 8])];
    let forbidden = |prompt: &[u32]| {
        let mut slots = Slots::new(LIMITS);
        let mut step = prompt_step(prompt);
        step.start_slots[0].sampling = Some(sampling.clone());
        let mut prepared = slots.apply(step).unwrap();
        let (_, [samples, _]) = prepared.sampling(&slots);
        samples[0].how.forbidden.to_vec()
    };
    assert_eq!(forbidden(&[0, 1, 2]), [3, 5, 9, 7]);
    assert_eq!(forbidden(&[0, 1, 2, 4]), [9]);
    assert_eq!(forbidden(&[1, 2, 2, 2]), [9, 8]);
    assert_eq!(forbidden(&[1]), [3, 5, 9]);
}

#[test]
fn logprobs_of_a_prompt_are_of_the_tokens_that_follow() {
    let mut slots = Slots::new(LIMITS);
    let mut step = prompt_step(&[1, 2, 3]);
    step.runs[0].prompt_logprobs = Some(2);
    let mut prepared = slots.apply(step).unwrap();
    {
        let (batch, [samples, prompts]) = prepared.sampling(&slots);
        assert_eq!(batch.logit_rows, [0, 1, 2]);
        assert_eq!(samples.iter().map(|row| row.row).collect::<Vec<_>>(), [2]);
        let forced: Vec<_> = prompts
            .iter()
            .map(|row| (row.row, row.how.params.logit_bias[0].0))
            .collect();
        assert_eq!(forced, [(0, 2), (1, 3)]);
        assert!(prompts.iter().all(|row| row.how.params.logprobs == Some(2)));
    }
    let (_, prompts) = finish(&mut slots, prepared, 0);
    assert_eq!(
        (prompts[0].slot, prompts[0].position, prompts[0].entries.len()),
        (0, 1, 2)
    );
    // A chunk that is followed by another tells of its first token too.
    let mut slots = Slots::new(LIMITS);
    let mut step = prompt_step(&[1, 2, 3]);
    step.runs[0].prompt_logprobs = Some(0);
    step.runs[0].next_prompt_token = Some(4);
    step.runs[0].sample = false;
    let mut prepared = slots.apply(step).unwrap();
    let (batch, [samples, prompts]) = prepared.sampling(&slots);
    assert_eq!(
        (batch.logit_rows.as_slice(), samples.len(), prompts.len()),
        (&[0, 1, 2][..], 0, 3)
    );
}

#[test]
fn a_mask_reaches_the_sampler() {
    for length in [3, 4] {
        let mut slots = Slots::new(LIMITS);
        let mut step = prompt_step(&[1]);
        step.runs[0].mask = vec![0xa5; length].into();
        let mut prepared = slots.apply(step).unwrap();
        let (_, [samples, _]) = prepared.sampling(&slots);
        assert_eq!(samples[0].how.mask, Some(&vec![0xa5; length][..]));
    }
}

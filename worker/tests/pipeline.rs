//! Steps sent ahead of results: the second takes the first one's tokens from the device. What comes out is what comes
//! out one by one.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::sync::Arc;

use conclave_proto::cluster::v1 as wire;
use conclave_worker::verify::{GroupConfig, LocalGroup, Looks, Reference, greedy, run, start};
use conclave_worker::weights::WeightSource;

mod common;

fn source() -> Arc<WeightSource> {
    Arc::new(WeightSource::open(&common::tiny(), None).unwrap())
}

fn reference() -> Reference {
    Reference::read(&common::tiny().join("reference.safetensors"), 384).unwrap()
}

/// The prompt's step, then one step a token.
fn steps(prompt: &[u32], count: usize, sampling: &wire::Sampling) -> Vec<wire::Step> {
    let pages = (0..(prompt.len() + count).div_ceil(16) as u32).collect();
    let first = wire::Step {
        start_slots: vec![start(0, pages, prompt.len(), sampling.clone())],
        runs: vec![run(0, 0, prompt, true)],
        ..wire::Step::default()
    };
    let decode = |index| wire::Step {
        runs: vec![run(0, prompt.len() + index, &[], true)],
        ..wire::Step::default()
    };
    std::iter::once(first).chain((0..count - 1).map(decode)).collect()
}

/// Runs them with `ahead` steps on their way at a time.
fn tokens(ranks: u32, steps: &[wire::Step], ahead: usize) -> Vec<u32> {
    let mut group = LocalGroup::start(&source(), &GroupConfig::new(ranks)).unwrap();
    let mut sent = 0;
    let mut tokens = Vec::new();
    for done in 0..steps.len() {
        while sent < steps.len().min(done + ahead) {
            let mut all = vec![wire::Step::default(); ranks as usize];
            all[0] = steps[sent].clone();
            group.submit(all, &Looks::Nothing);
            sent += 1;
        }
        let result = group.collect().unwrap().swap_remove(0).result;
        assert_eq!(result.step, done as u64, "answers come in order");
        tokens.extend(result.samples.iter().map(|sample| sample.token));
    }
    tokens
}

#[test]
fn tokens_are_the_same_however_many_steps_are_ahead() {
    let reference = reference();
    let steps = steps(&reference.input_ids, reference.greedy_ids.len(), &greedy());
    for ranks in [1, 2] {
        for ahead in [1, 2, 3] {
            assert_eq!(
                tokens(ranks, &steps, ahead),
                reference.greedy_ids,
                "{ranks} ranks, {ahead} ahead"
            );
        }
    }
}

#[test]
fn penalties_see_tokens_that_no_host_has_seen() {
    let reference = reference();
    for change in [
        |s: &mut wire::Sampling| s.repetition_penalty = 1.3,
        |s: &mut wire::Sampling| (s.presence_penalty, s.frequency_penalty) = (0.9, 0.7),
    ] {
        let mut sampling = greedy();
        change(&mut sampling);
        let steps = steps(&reference.input_ids, reference.greedy_ids.len(), &sampling);
        let one_by_one = tokens(1, &steps, 1);
        assert_ne!(one_by_one, reference.greedy_ids, "the sampling has an effect");
        assert_eq!(tokens(1, &steps, 2), one_by_one);
        assert_eq!(tokens(2, &steps, 3), one_by_one);
    }
}

#[test]
fn what_looks_at_tokens_waits_for_them() {
    let reference = reference();
    // Words of two tokens need the tokens themselves before the next step.
    let mut sampling = greedy();
    sampling.repetition_penalty = 1.3;
    sampling.bad_words = vec![wire::TokenSequence {
        tokens: reference.greedy_ids[..2].to_vec(),
    }];
    sampling.logprobs = Some(2);
    let steps = steps(&reference.input_ids, 12, &sampling);
    let one_by_one = tokens(1, &steps, 1);
    assert_ne!(
        one_by_one,
        reference.greedy_ids[..12],
        "the sampling has an effect"
    );
    assert_eq!(tokens(1, &steps, 2), one_by_one);
    assert_eq!(tokens(2, &steps, 3), one_by_one);
}

#[test]
fn a_slot_may_end_and_begin_again_while_its_last_token_is_on_its_way() {
    let reference = reference();
    let (prompt, greedy_ids) = (&reference.input_ids, &reference.greedy_ids);
    let mut all = steps(prompt, 3, &greedy());
    let mut again = steps(prompt, 3, &greedy());
    again[0].end_slots.push(0);
    all.append(&mut again);
    let expected = [&greedy_ids[..3], &greedy_ids[..3]].concat();
    assert_eq!(tokens(1, &all, 2), expected);
}

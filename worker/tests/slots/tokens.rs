//! Tokens and pages of a slot from step to step, known here or on the device only.

use conclave_kernels::backend::{SAMPLED, SampleError, Sampled};
use conclave_proto::cluster::v1 as wire;
use conclave_worker::slots::{Prepared, Slots};
use conclave_worker::verify::{greedy, run, start};

use super::{LIMITS, finish, pages, prompt_step, refused, words};

#[test]
fn a_sampled_token_is_the_input_of_the_next_run() {
    let mut slots = Slots::new(LIMITS);
    let prepared = slots.apply(prompt_step(&[1, 2, 3])).unwrap();
    assert_eq!(
        (prepared.batch.ids.as_slice(), prepared.batch.positions.as_slice()),
        (&[1, 2, 3][..], &[0, 1, 2][..])
    );
    let (samples, _) = finish(&mut slots, prepared, 7);
    assert_eq!((samples[0].slot, samples[0].token), (0, 7));
    let next = |position| wire::Step {
        runs: vec![run(0, position, &[], true)],
        ..wire::Step::default()
    };
    let prepared = slots.apply(next(3)).unwrap();
    assert_eq!(
        (prepared.batch.ids.as_slice(), prepared.batch.positions.as_slice()),
        (&[7][..], &[3][..])
    );
    assert_eq!(prepared.batch.runs[0].pages, [0]);
    // Until it has sampled again there is nothing to run.
    assert_eq!(
        refused(&mut slots, next(4)),
        "runs[0].tokens: none are given, and the slot has sampled none"
    );
    let mut slots = Slots::new(LIMITS);
    let prepared = slots.apply(prompt_step(&[1, 2, 3])).unwrap();
    let mut failed = Sampled {
        error: Some("NaN".into()),
        ..Sampled::default()
    };
    failed.token = 0;
    let (samples, _) = prepared.finish(&mut slots, vec![vec![failed], Vec::new()]);
    assert_eq!(
        (samples[0].error.as_str(), samples[0].unsatisfiable),
        ("NaN", false)
    );
    // A step that was on its way runs all the same; its result will not be used.
    let prepared = slots.apply(next(3)).unwrap();
    let forbidding = Sampled {
        error: Some(SampleError::Unsatisfiable),
        ..Sampled::default()
    };
    let (samples, _) = prepared.finish(&mut slots, vec![vec![forbidding], Vec::new()]);
    assert_eq!(
        (samples[0].error.as_str(), samples[0].unsatisfiable),
        ("no token is allowed", true)
    );
}

#[test]
fn pages_are_added_and_slots_reused() {
    let mut slots = Slots::new(LIMITS);
    let prepared = slots.apply(prompt_step(&[1; 8])).unwrap();
    finish(&mut slots, prepared, 4);
    let grow = wire::Step {
        append_pages: vec![pages(0, vec![5])],
        runs: vec![run(0, 8, &[], true)],
        ..wire::Step::default()
    };
    let prepared = slots.apply(grow).unwrap();
    assert_eq!(prepared.batch.runs[0].pages, [0, 1, 5]);
    assert_eq!(slots.running(), 1);
    // End and start of one slot in one step.
    let replace = wire::Step {
        end_slots: vec![0],
        start_slots: vec![wire::SlotStart {
            cached_tokens: 4,
            ..start(0, vec![2, 3], 6, greedy())
        }],
        runs: vec![run(0, 4, &[9, 9], true)],
        ..wire::Step::default()
    };
    let prepared = slots.apply(replace).unwrap();
    assert_eq!(prepared.batch.runs[0].pages, [2, 3]);
    assert_eq!(slots.get(0).unwrap().position(), 6);
    slots.reset();
    assert_eq!(slots.running(), 0);
}

#[test]
fn penalties_do_not_wait_for_the_last_token_and_words_of_several_do() {
    let mut sampling = greedy();
    sampling.presence_penalty = 0.5;
    let next = wire::Step {
        runs: vec![run(0, 3, &[], true)],
        ..wire::Step::default()
    };
    let mut words_too = sampling.clone();
    words_too.bad_words = vec![words(&[1, 2])];
    for (sampling, waits) in [(sampling, false), (words_too, true)] {
        let mut slots = Slots::new(LIMITS);
        let mut step = prompt_step(&[4, 5, 6]);
        step.start_slots[0].sampling = Some(sampling);
        let mut first = slots.apply(step).unwrap();
        first.sampling(&slots);
        first.leave_on_device(&mut slots, 7);
        assert_eq!(slots.must_wait(&next), waits);
        if waits {
            continue;
        }
        let mut second = slots.apply(next.clone()).unwrap();
        assert_eq!(second.batch.ids, [SAMPLED]);
        {
            let (_, [samples, _]) = second.sampling(&slots);
            assert_eq!(samples[0].how.tokens, [4, 5, 6, SAMPLED]);
            assert!(samples[0].how.history.is_some(), "the device keeps them");
        }
        let drawn = Sampled {
            token: 9,
            ..Sampled::default()
        };
        first.fetched(&mut slots, 7, vec![drawn]);
        let (_, [samples, _]) = second.sampling(&slots);
        assert_eq!(samples[0].how.tokens, [4, 5, 6, 9]);
    }
}

#[test]
fn a_token_that_comes_late_is_not_another_sequences() {
    let mut sampling = greedy();
    sampling.presence_penalty = 0.5;
    let begin = |end: Vec<u32>| {
        let mut step = prompt_step(&[4, 5, 6]);
        step.end_slots = end;
        step.start_slots[0].sampling = Some(sampling.clone());
        step
    };
    let mut slots = Slots::new(LIMITS);
    let first = slots.apply(begin(vec![])).unwrap();
    first.leave_on_device(&mut slots, 7);
    let mut second = slots.apply(begin(vec![0])).unwrap();
    let history = |prepared: &mut Prepared, slots: &Slots| {
        let (_, [samples, _]) = prepared.sampling(slots);
        (samples[0].how.tokens.to_vec(), samples[0].how.history)
    };
    let (tokens, id) = history(&mut second, &slots);
    second.leave_on_device(&mut slots, 8);
    let late = Sampled {
        token: 9,
        ..Sampled::default()
    };
    first.fetched(&mut slots, 7, vec![late]);
    let next = wire::Step {
        runs: vec![run(0, 3, &[], true)],
        ..wire::Step::default()
    };
    let mut third = slots.apply(next).unwrap();
    assert_eq!(
        history(&mut third, &slots),
        ([&tokens[..], &[SAMPLED]].concat(), id),
        "its own token is still on the device"
    );
}

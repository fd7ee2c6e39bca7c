//! A worker crashes at every point of a small run, each worker, one run per point; for a smaller run, two workers crash
//! at every pair of points. `CONCLAVE_SIM_EXHAUSTIVE=1` does all points, otherwise a part of them is done.

use std::sync::Arc;

use crate::api::{Micros, Submit};
use crate::sim::model::{request, sampling};
use crate::sim::random::Random;
use crate::sim::scripted::{config, worker};
use crate::sim::world::{Action, Network, World};

/// A small run, the same up to the crash; a worker that crashes comes back a little later. Returns its events.
fn run(workers: u32, requests: u64, crashes: &[(u64, u64)]) -> Result<u64, String> {
    let mut config = config(workers);
    config.collective_deadline_floor = Micros(100_000);
    let mut world = World::new(config, Network::calm(), Random::new(7));
    for _ in 0..workers {
        world.at(0, Action::Attach(worker(24)));
    }
    for id in 0..requests {
        world.at(100_000 + id * 2_000, Action::Submit(Box::new(small(id))));
    }
    for (nth, _) in (1..).zip(crashes) {
        world.at(nth * 300_000, Action::Attach(worker(24)));
    }
    world.crash_at = crashes.to_vec();
    world.run(60_000_000)?;
    Ok(world.events)
}

/// Of every kind one: shared prefixes, penalties, masks, log-probabilities, stop tokens.
fn small(id: u64) -> Submit {
    let prompt: Vec<u32> = (0..9 + id as u32 % 4)
        .map(|at| if at < 8 { at } else { at + id as u32 })
        .collect();
    let mut submit = request(id, &prompt, 4 + id as u32 % 5);
    let mut sampling = sampling(id);
    match id % 4 {
        0 => sampling.repetition_penalty = 1.2,
        1 => submit.masked = true,
        2 => sampling.logprobs = Some(1),
        _ => submit.prompt_logprobs = Some(0),
    }
    submit.sampling = Arc::new(sampling);
    submit.stop_tokens = Arc::from([3, 5]);
    submit
}

fn exhaustive() -> bool {
    std::env::var("CONCLAVE_SIM_EXHAUSTIVE").is_ok_and(|value| value == "1")
}

#[test]
fn a_crash_at_any_event_of_any_worker_changes_no_token() {
    let events = run(4, 12, &[]).unwrap();
    let stride = if exhaustive() { 1 } else { 7 };
    for at in (1..=events).step_by(stride) {
        for worker in 0..4 {
            let crash = [(at, worker)];
            let result = run(4, 12, &crash);
            assert!(
                result.is_ok(),
                "crash of worker {worker} at event {at}: {result:?}"
            );
        }
    }
}

#[test]
fn two_crashes_at_any_pair_of_events_change_no_token() {
    let events = run(2, 4, &[]).unwrap();
    let stride = if exhaustive() { 1 } else { 9 };
    for first in (1..=events).step_by(stride) {
        for second in (first..=first + events).step_by(stride) {
            for workers in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                let crashes = [(first, workers.0), (second, workers.1)];
                let result = run(2, 4, &crashes);
                assert!(result.is_ok(), "crashes {crashes:?}: {result:?}");
            }
        }
    }
}

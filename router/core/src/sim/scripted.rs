//! Short runs that say in one sentence what must happen.

use crate::Core;
use crate::api::{
    Command, CoreConfig, Epoch, Event, FinishReason, Micros, SequenceId, StepPlan, WorkerId, WorkerInfo,
};
use crate::sim::clients::Outcome;
use crate::sim::model::request;
use crate::sim::random::Random;
use crate::sim::world::{Action, Network, World};

pub(crate) fn config(workers: u32) -> CoreConfig {
    CoreConfig {
        page_tokens: 4,
        experts: 8,
        expected_workers: workers,
        max_waiting: 64,
        max_num_seqs: 8,
        max_num_batched_tokens: 16,
        max_model_len: 200,
        enable_prefix_cache: true,
        steps_in_flight: 2,
        collective_deadline_floor: Micros(500_000),
    }
}

pub(crate) fn worker(kv_pages: u32) -> WorkerInfo {
    WorkerInfo {
        kv_pages,
        max_slots: 8,
        max_batched_tokens: 16,
        expert_capacity: None,
        wanted_rank: None,
    }
}

fn world(workers: u32, kv_pages: u32) -> World {
    let mut world = World::new(config(workers), Network::calm(), Random::new(1));
    for _ in 0..workers {
        world.at(0, Action::Attach(worker(kv_pages)));
    }
    world
}

#[test]
fn one_worker_serves_one_sequence() {
    let mut world = world(1, 32);
    world.at(
        10,
        Action::Submit(Box::new(request(1, &[1, 2, 3, 4, 5, 6, 7], 20))),
    );
    world.run(60_000_000).unwrap();
    let client = world.clients.get(SequenceId(1));
    let Some(Outcome::Finished(reason, usage)) = &client.outcome else {
        panic!("{client:?}")
    };
    assert_eq!((reason, usage.generated_tokens), (&FinishReason::Length, 20));
}

#[test]
fn three_workers_serve_forty_sequences() {
    let mut world = world(3, 32);
    for id in 0..40 {
        let prompt: Vec<u32> = (0..(id as u32 % 17) + 1).map(|at| at * 7 % 40).collect();
        world.at(
            id * 100,
            Action::Submit(Box::new(request(id, &prompt, 1 + id as u32 % 30))),
        );
    }
    world.run(60_000_000).unwrap();
    let snapshot = world.core.snapshot();
    assert_eq!(
        (snapshot.running, snapshot.waiting, snapshot.finished),
        (0, 0, 40)
    );
    assert!(snapshot.workers.iter().all(|worker| worker.pages_used() == 0));
}

/// A worker with more pages joins a moment after the epoch began: what needs them waits for it.
#[test]
fn what_only_a_newcomer_can_hold_waits_for_it() {
    let mut world = world(1, 8);
    world.at(100_000, Action::Attach(worker(64)));
    let prompt: Vec<u32> = (0..60).map(|at| at * 7 % 40).collect();
    world.at(200_000, Action::Submit(Box::new(request(1, &prompt, 20))));
    world.run(60_000_000).unwrap();
    let client = world.clients.get(SequenceId(1));
    let Some(Outcome::Finished(reason, usage)) = &client.outcome else {
        panic!("{client:?}")
    };
    assert_eq!((reason, usage.generated_tokens), (&FinishReason::Length, 20));
}

/// A request that no worker can run must not break one epoch after the other, and take the workers down with it.
#[test]
fn a_sequence_that_makes_no_sense_to_a_worker_ends_alone() {
    let worker_1 = WorkerId(1);
    let mut core = Core::new(config(1));
    let mut say = |event: Event| -> Vec<Command> {
        let commands = core.handle(Micros(0), event);
        core.audit().unwrap();
        commands
    };
    let step_of = |commands: &[Command]| -> StepPlan {
        let step = commands.iter().find_map(|command| match command {
            Command::Step { plan, .. } => Some(plan.clone()),
            _ => None,
        });
        step.expect("a step")
    };
    let ready = |epoch| Event::WorkerReady {
        worker: worker_1,
        epoch: Epoch(epoch),
    };
    say(Event::WorkerAttached {
        worker: worker_1,
        info: worker(32),
    });
    say(Event::Submit(request(1, &[1, 2, 3], 5)));
    say(Event::Submit(request(2, &[4, 5, 6], 5)));
    let step = step_of(&say(ready(1)));
    let bad = step
        .start
        .iter()
        .find(|start| start.id == SequenceId(2))
        .unwrap()
        .slot;
    let commands = say(Event::StepFailed {
        worker: worker_1,
        epoch: step.epoch,
        step: step.step,
        suspect: None,
        slot: Some(bad),
    });
    let ended: Vec<_> = commands
        .iter()
        .filter_map(|command| match command {
            Command::Finish { id, reason, .. } => Some((*id, matches!(reason, FinishReason::Error(_)))),
            Command::Dismiss { reason, .. } => panic!("the worker was dismissed: {reason}"),
            _ => None,
        })
        .collect();
    assert_eq!(ended, [(SequenceId(2), true)]);
    let step = step_of(&say(ready(2)));
    let goes_on: Vec<SequenceId> = step.start.iter().map(|start| start.id).collect();
    assert_eq!(goes_on, [SequenceId(1)]);
}

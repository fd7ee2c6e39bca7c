//! Short runs that say in one sentence what must happen.

use crate::api::{CoreConfig, FinishReason, Micros, SequenceId, WorkerInfo};
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

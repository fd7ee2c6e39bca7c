//! A run drawn from a seed: the cluster, the requests, and the faults, whose rates are drawn as well. After the faults
//! comes a calm phase in which everything must be done in time.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::api::{Command, CoreConfig, EndReason, Event, Micros, Rejection, SequenceId, Submit, WorkerInfo};
use crate::sim::clients::Outcome;
use crate::sim::model::{request, sampling};
use crate::sim::random::Random;
use crate::sim::world::{Action, Network, Victim, World};

/// The fault phase, and the time in which the calm phase must finish.
const FAULTS_US: u64 = 20_000_000;
const CALM_LIMIT_US: u64 = 60_000_000;

pub(crate) type Tamper = fn(&mut Random, &mut Vec<Command>);

/// What a run showed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) trace: u64,
    pub(crate) finished: u64,
    pub(crate) epochs: u64,
    pub(crate) failed_epochs: u64,
    pub(crate) preemptions: u64,
    pub(crate) prefix_hits: u64,
    pub(crate) rejections: u64,
    pub(crate) cancelled: u64,
}

/// Runs a seed; a panic of the core is a failure like others.
pub(crate) fn run_seed(seed: u64, tamper: Option<Tamper>) -> Result<Seen, String> {
    let run = AssertUnwindSafe(|| run(seed, tamper));
    catch_unwind(run).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Err(text
            .or(panic.downcast_ref::<&str>().map(|text| text.to_string()))
            .unwrap_or_default())
    })
}

fn run(seed: u64, tamper: Option<Tamper>) -> Result<Seen, String> {
    let mut random = Random::new(seed);
    let workers = random.between(1, 5) as u32;
    let config = draw_config(&mut random, workers);
    let network = draw_network(&mut random);
    let capacity = random.chance(40).then(|| random.between(3, 8) as u32);
    let kv_pages = draw_pages(&mut random, &config);
    let info = WorkerInfo {
        kv_pages,
        max_slots: random.between(1, 8) as u32,
        max_batched_tokens: random.between(1, 32) as u32,
        expert_capacity: capacity,
        wanted_rank: None,
    };
    let submits = draw_submits(&mut random, &config, kv_pages);
    let mut world = World::new(config, network, random);
    world.tamper = tamper;
    schedule(&mut world, workers, &info, submits);
    world.run(FAULTS_US + CALM_LIMIT_US)?;
    check_end(&world)?;
    world.tell(Event::Drain)?;
    if !world.clients.drained {
        return Err("it is empty and does not say that it has drained".into());
    }
    Ok(seen(&world))
}

fn draw_config(random: &mut Random, workers: u32) -> CoreConfig {
    CoreConfig {
        page_tokens: *random.pick(&[1, 2, 3, 4, 8]),
        experts: 8,
        expected_workers: workers,
        max_waiting: *random.pick(&[4, 16, 1_000]),
        max_num_seqs: random.between(1, 8) as u32,
        max_num_batched_tokens: random.between(1, 48) as u32,
        max_model_len: 96,
        enable_prefix_cache: random.chance(85),
        steps_in_flight: random.between(1, 3) as u32,
        collective_deadline_floor: Micros(*random.pick(&[50_000, 500_000])),
    }
}

/// Sometimes just enough pages for the longest sequence, so that running ones push each other out.
fn draw_pages(random: &mut Random, config: &CoreConfig) -> u32 {
    let longest = (config.max_model_len - 1).div_ceil(config.page_tokens);
    longest + *random.pick(&[0, 1, 4, longest, 10 * longest])
}

fn draw_network(random: &mut Random) -> Network {
    Network {
        delay_us: *random.pick(&[0, 300, 20_000]),
        clog: *random.pick(&[0, 0, 1, 2]),
        clog_us: *random.pick(&[100_000, 1_000_000, 10_000_000]),
        duplicate: *random.pick(&[0, 0, 10, 50]),
        step_us: *random.pick(&[1, 2_000, 200_000]),
        load_us: *random.pick(&[0, 100_000, 3_000_000]),
        step_fails: *random.pick(&[0, 0, 2, 20]),
    }
}

fn draw_submits(random: &mut Random, config: &CoreConfig, kv_pages: u32) -> Vec<(u64, Submit)> {
    let count = random.between(1, 40);
    let vocabulary = *random.pick(&[2, 4, 40]);
    let bases: Vec<Vec<u32>> = (0..random.between(1, 3))
        .map(|_| tokens(random, 40, vocabulary))
        .collect();
    let burst = random.chance(30);
    let mut submits = Vec::new();
    for id in 0..count {
        let base = random.pick(&bases).clone();
        let mut prompt = base[..random.between(1, 40) as usize].to_vec();
        let tail = random.below(20) as usize;
        prompt.extend(tokens(random, tail, vocabulary));
        let room = u64::from(config.max_model_len) - prompt.len() as u64;
        let mut submit = request(id, &prompt, random.between(1, room.min(36)) as u32);
        decorate(random, &mut submit);
        if random.chance(2) {
            submit.max_new_tokens = config.max_model_len + kv_pages * config.page_tokens;
        }
        let at = if burst { 5_000_000 } else { random.below(FAULTS_US) };
        let copies = if random.chance(15) {
            random.between(2, 4)
        } else {
            1
        };
        for copy in 0..copies {
            let id = SequenceId(submit.id.0 + copy * 1_000);
            submits.push((at, Submit { id, ..submit.clone() }));
        }
    }
    submits
}

fn decorate(random: &mut Random, submit: &mut Submit) {
    let mut sampling = sampling(random.word());
    if random.chance(20) {
        sampling.repetition_penalty = 1.1;
    }
    sampling.logprobs = random.chance(20).then_some(1);
    submit.sampling = Arc::new(sampling);
    if random.chance(50) {
        submit.stop_tokens = Arc::from([random.below(39) as u32, random.below(39) as u32]);
    }
    if random.chance(20) {
        submit.min_new_tokens = random.below(10) as u32;
    }
    submit.priority = *random.pick(&[0, 0, 0, 1, -1, 5, i32::MAX]);
    submit.cache_salt = *random.pick(&[0, 0, 0, 1]);
    submit.prompt_logprobs = random.chance(15).then_some(0);
    submit.masked = random.chance(15);
    if random.chance(10) {
        let given = random.below(u64::from(submit.max_new_tokens) + 1) as usize;
        submit.generated = tokens(random, given, 40);
    }
}

fn tokens(random: &mut Random, count: usize, vocabulary: u64) -> Vec<u32> {
    (0..count).map(|_| random.below(vocabulary) as u32).collect()
}

fn schedule(world: &mut World, workers: u32, info: &WorkerInfo, submits: Vec<(u64, Submit)>) {
    for _ in 0..workers {
        let at = world.random.below(2_000_000);
        world.at(at, Action::Attach(info.clone()));
    }
    let cancels = *world.random.pick(&[0, 0, 10, 50]);
    for (at, submit) in submits {
        if world.random.chance(cancels) {
            let after = world.random.below(2_000_000);
            let reason = *world.random.pick(&[EndReason::Cancelled, EndReason::Stop]);
            world.at(at + after, Action::End(submit.id, reason));
        }
        world.at(at, Action::Submit(Box::new(submit)));
    }
    let rate = *world.random.pick(&[0, 1, 3, 10]);
    for _ in 0..rate {
        let at = world.random.below(FAULTS_US);
        let nth = world.random.below(8);
        let fault = match world.random.below(4) {
            0 => Action::Crash(Victim::Nth(nth)),
            1 => Action::Notice(
                Victim::Nth(nth),
                Micros(world.random.below(30_000_000).min(FAULTS_US - at)),
            ),
            2 => Action::Attach(WorkerInfo {
                wanted_rank: world.random.chance(50).then_some(nth as u32),
                ..info.clone()
            }),
            _ => {
                // A worker that flaps.
                world.at(at, Action::Attach(info.clone()));
                Action::Crash(Victim::Nth(nth))
            }
        };
        world.at(at, fault);
    }
    world.at(FAULTS_US, Action::Calm);
    // Whatever was lost comes back, so that there is room for every expert.
    for _ in 0..workers.max(3) {
        world.at(FAULTS_US, Action::Attach(info.clone()));
    }
}

/// Nothing is held by anybody, and rejections had their reasons.
fn check_end(world: &World) -> Result<(), String> {
    let snapshot = world.core.snapshot();
    if snapshot.running + snapshot.waiting + snapshot.steps_in_flight > 0 {
        return Err(format!("all clients are done and the core is not: {snapshot:?}"));
    }
    for worker in &snapshot.workers {
        if worker.pages_used() > 0 || worker.load > 0 {
            return Err(format!(
                "worker {} still holds pages: {snapshot:?}",
                worker.worker.0
            ));
        }
    }
    for client in world.clients.iter() {
        let tokens = client.submit.prompt.len() as u64 + u64::from(client.submit.max_new_tokens);
        let fair = match &client.outcome {
            Some(Outcome::Rejected(Rejection::TooLong { limit, .. })) => tokens > *limit,
            Some(Outcome::Rejected(Rejection::QueueFull { retry_after_ms, .. })) => *retry_after_ms > 0,
            Some(Outcome::Rejected(Rejection::Draining)) | None => false,
            Some(Outcome::Finished(..)) => true,
        };
        if !fair {
            return Err(format!(
                "sequence {} ended with {:?}",
                client.submit.id.0, client.outcome
            ));
        }
    }
    Ok(())
}

fn seen(world: &World) -> Seen {
    let snapshot = world.core.snapshot();
    let cancelled = world
        .clients
        .iter()
        .filter(|client| client.ended_by.is_some())
        .count();
    Seen {
        trace: world.trace.0,
        finished: snapshot.finished,
        epochs: snapshot.epoch.0,
        failed_epochs: snapshot.failed_epochs,
        preemptions: snapshot.preemptions,
        prefix_hits: snapshot.prefix_hits,
        rejections: snapshot.rejections,
        cancelled: cancelled as u64,
    }
}

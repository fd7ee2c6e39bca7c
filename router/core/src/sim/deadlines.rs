//! How long ranks wait for each other: by the steps before, by failures, and by what a step asks for.

use crate::Core;
use crate::api::{Command, Epoch, Event, Micros, Rank, StepPlan, StepResult, WorkerId, WorkerInfo};
use crate::limits::{DEADLINE_US_MAX, STALL_DEADLINES};
use crate::sim::model::request;
use crate::sim::scripted::{config, worker};

const WORKERS: [WorkerId; 2] = [WorkerId(1), WorkerId(2)];

fn deadline_of_epoch(commands: &[Command]) -> Micros {
    let plan = commands.iter().find_map(|command| match command {
        Command::StartEpoch { plan, .. } => Some(plan.collective_deadline),
        _ => None,
    });
    plan.expect("an epoch")
}

fn step_of(commands: &[Command]) -> &StepPlan {
    let step = commands.iter().find_map(|command| match command {
        Command::Step { plan, .. } => Some(plan),
        _ => None,
    });
    step.expect("a step")
}

/// Who waits for a rank that computes for longer than the deadline fails its step; the same step must not fail again.
#[test]
fn a_step_that_failed_at_the_deadline_gets_more_time_in_the_next_epoch() {
    let mut core = Core::new(config(2));
    let mut commands = Vec::new();
    for id in WORKERS {
        let info = worker(32);
        commands = core.handle(Micros(0), Event::WorkerAttached { worker: id, info });
    }
    assert_eq!(deadline_of_epoch(&commands), Micros(500_000));
    core.handle(Micros(0), Event::Submit(request(1, &[1, 2, 3], 5)));
    for worker in WORKERS {
        let epoch = Epoch(1);
        commands = core.handle(Micros(0), Event::WorkerReady { worker, epoch });
    }
    let failed = Event::StepFailed {
        worker: WORKERS[1],
        epoch: Epoch(1),
        step: step_of(&commands).step,
        suspect: Some(Rank(0)),
        slot: None,
    };
    let commands = core.handle(Micros(600_000), failed);
    assert_eq!(deadline_of_epoch(&commands), Micros(2_000_000));
}

/// The first long prompt fails no step at a deadline that is meant for short ones, and who hangs is found all the same.
#[test]
fn a_step_of_many_tokens_has_more_time() {
    let mut config = config(2);
    (config.max_num_batched_tokens, config.max_model_len) = (2000, 4000);
    config.steps_in_flight = 1;
    let info = WorkerInfo {
        max_batched_tokens: 2000,
        ..worker(1000)
    };
    let mut core = Core::new(config);
    let mut commands = Vec::new();
    for id in WORKERS {
        let info = info.clone();
        commands = core.handle(Micros(0), Event::WorkerAttached { worker: id, info });
    }
    assert_eq!(deadline_of_epoch(&commands), Micros(500_000));
    for worker in WORKERS {
        let epoch = Epoch(1);
        core.handle(Micros(0), Event::WorkerReady { worker, epoch });
    }
    let long: Vec<u32> = (0..2500).map(|at| at % 40).collect();
    let commands = core.handle(Micros(0), Event::Submit(request(1, &long, 2)));
    assert_eq!(step_of(&commands).group_tokens, 2000);
    assert_eq!(
        step_of(&commands).collective_deadline,
        Micros(DEADLINE_US_MAX),
        "nothing was measured yet"
    );
    // It takes 4 seconds, 2 ms a token, and so long the rest will.
    let done = |worker, step, samples| Event::StepDone {
        worker,
        epoch: Epoch(1),
        step,
        result: StepResult {
            samples,
            ..StepResult::default()
        },
    };
    let first = step_of(&commands).step;
    let mut commands = Vec::new();
    for worker in WORKERS {
        commands = core.handle(Micros(4_000_000), done(worker, first, Vec::new()));
    }
    let rest = step_of(&commands);
    assert_eq!(
        (rest.group_tokens, rest.collective_deadline),
        (500, Micros(20_000_000))
    );
    let aborts = |commands: Vec<Command>| {
        let is_abort = |command: &Command| matches!(command, Command::AbortEpoch { .. });
        commands.iter().any(is_abort)
    };
    let stalled = 4_000_000 + 20_000_000 * STALL_DEADLINES;
    assert!(!aborts(core.handle(Micros(stalled), Event::Tick)));
    assert!(aborts(core.handle(Micros(stalled + 1), Event::Tick)));
}

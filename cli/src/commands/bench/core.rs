//! `--core`: what the router's core takes per scheduling step, with workers that answer at once.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use conclave_router_core::Core;
use conclave_router_core::api::{
    Command, CoreConfig, Epoch, Event, Micros, Sample, SequenceId, StepId, StepPlan, StepResult, Submit,
    WorkerId, WorkerInfo,
};

use super::serve::percentile;

const WORKERS: u64 = 8;
const SEQUENCES: u64 = 256;
const STEPS: usize = 2000;
const LONG_PROMPT: u32 = 32 << 10;
const LONG_PROMPTS: u64 = 20;
const PAGE_TOKENS: u32 = 16;
/// The targets that are printed beside the figures.
const STEP_TARGET: Duration = Duration::from_micros(100);
const PROMPT_TARGET: Duration = Duration::from_millis(1);

pub fn run() {
    let mut bench = Bench::new();
    for id in 0..SEQUENCES {
        bench.submit(id, prompt(id, 64), u32::MAX / 4);
    }
    // Prompts first, then every step is decode.
    for _ in 0..100 {
        bench.step();
    }
    let mut steps: Vec<Duration> = (0..STEPS).map(|_| bench.step()).collect();
    steps.sort_unstable();
    println!(
        "router core: one step of {SEQUENCES} sequences on {WORKERS} workers, all results in and all plans out"
    );
    print("step", &steps, STEP_TARGET);

    let mut bench = Bench::new();
    let mut long = Vec::new();
    for id in 0..LONG_PROMPTS {
        let prompt = prompt(id, LONG_PROMPT);
        let mut spent = bench.submit(id, prompt, 1);
        while bench.is_busy() {
            spent += bench.step();
        }
        long.push(spent);
    }
    long.sort_unstable();
    println!(
        "router core: a prompt of {LONG_PROMPT} tokens from submission to its end, looked up and inserted"
    );
    print("prompt", &long, PROMPT_TARGET);
}

fn print(what: &str, sorted: &[Duration], target: Duration) {
    let micros = |q| percentile(sorted, q).as_secs_f64() * 1e6;
    println!(
        "  {what}: median {:.1} us, p99 {:.1} us (target: median below {} us)",
        micros(0.5),
        micros(0.99),
        target.as_micros()
    );
}

/// Distinct from the first token on.
fn prompt(id: u64, tokens: u32) -> Arc<[u32]> {
    (0..tokens)
        .map(|position| (id as u32).wrapping_mul(7919).wrapping_add(position * 31) % 50_000)
        .collect()
}

struct Bench {
    core: Core,
    now: u64,
    /// Steps that workers have and have not answered.
    open: VecDeque<(WorkerId, Epoch, StepId, StepPlan)>,
}

impl Bench {
    fn new() -> Bench {
        let config = CoreConfig {
            page_tokens: PAGE_TOKENS,
            experts: 256,
            expected_workers: WORKERS as u32,
            max_waiting: 1024,
            max_num_seqs: 256,
            max_num_batched_tokens: 8192,
            max_model_len: 1 << 20,
            enable_prefix_cache: true,
            steps_in_flight: 2,
            collective_deadline_floor: Micros(500_000),
        };
        let mut bench = Bench {
            core: Core::new(config),
            now: 0,
            open: VecDeque::new(),
        };
        for worker in 0..WORKERS {
            let info = WorkerInfo {
                kv_pages: 1 << 18,
                max_slots: 256,
                max_batched_tokens: 8192,
                expert_capacity: None,
                wanted_rank: None,
            };
            bench.handle(Event::WorkerAttached {
                worker: WorkerId(worker),
                info,
            });
        }
        bench
    }

    fn submit(&mut self, id: u64, prompt: Arc<[u32]>, max_new_tokens: u32) -> Duration {
        let max_new_tokens = max_new_tokens.min((1 << 20) - prompt.len() as u32);
        self.handle(Event::Submit(Submit::new(SequenceId(id), prompt, max_new_tokens)))
    }

    fn is_busy(&self) -> bool {
        !self.open.is_empty()
    }

    /// Answers the oldest step on every worker; gives the time that the core took.
    fn step(&mut self) -> Duration {
        let Some(&(_, _, step, _)) = self.open.front() else {
            return Duration::ZERO;
        };
        let mut spent = Duration::ZERO;
        while let Some((worker, epoch, _, plan)) = self.open.pop_front_if(|open| open.2 == step) {
            let samples = plan.runs.iter().filter(|run| run.sample).map(|run| Sample {
                slot: run.slot,
                token: run.position % 50_000,
                logprobs: None,
                error: None,
            });
            let result = StepResult {
                samples: samples.collect(),
                ..StepResult::default()
            };
            spent += self.handle(Event::StepDone {
                worker,
                epoch,
                step,
                result,
            });
        }
        spent
    }

    fn handle(&mut self, event: Event) -> Duration {
        self.now += 100;
        let started = Instant::now();
        let commands = self.core.handle(Micros(self.now), event);
        let mut spent = started.elapsed();
        for command in commands {
            match command {
                Command::StartEpoch { worker, plan } => {
                    spent += self.handle(Event::WorkerReady {
                        worker,
                        epoch: plan.epoch,
                    });
                }
                Command::Step { worker, plan } => self.open.push_back((worker, plan.epoch, plan.step, plan)),
                _ => {}
            }
        }
        spent
    }
}

//! `--scenario gateway`: the same load against the same cluster, straight over gRPC and through the gateway, in turns.
//!
//! Every request has a connection of its own either way, as requests of different users have. On a machine whose workers
//! are its CPU, gateway and clients take time from the workers too: what is shown then is more than the gateway's own cost.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::cluster::Target;
use super::{Prompts, Timing, percentile, request, run_clients};
use crate::settings::{Backend, BenchSettings};

/// Each way is measured so many times, one after the other, so that a machine that changes its pace favours neither.
const ROUNDS: usize = 4;

/// One way's figures over all rounds.
#[derive(Default)]
struct Way {
    tokens: u64,
    time: Duration,
    first: Vec<Duration>,
    gaps: Vec<Duration>,
}

impl Way {
    fn add(&mut self, timings: Vec<Timing>, time: Duration) {
        self.time += time;
        for timing in timings {
            self.tokens += u64::from(timing.tokens);
            self.first.push(timing.first);
            self.gaps.extend(timing.gaps);
        }
    }

    fn rate(&self) -> f64 {
        self.tokens as f64 / self.time.as_secs_f64()
    }

    fn sort(&mut self) {
        self.first.sort_unstable();
        self.gaps.sort_unstable();
    }
}

pub async fn run(settings: &BenchSettings) -> Result<()> {
    let mut load = settings.load.clone();
    if load.base_url.is_some() {
        bail!("base_url: --scenario gateway starts its own cluster, to have both addresses of it");
    }
    let target = Target::reach(settings).await?;
    let (mut direct, mut through) = (Way::default(), Way::default());
    for round in 0..=ROUNDS {
        for backend in [Backend::Grpc, Backend::Openai] {
            load.backend = backend;
            // Other prompts in each round, so that none finds its own pages.
            load.seed = settings.load.seed + round as u64 * 2 + u64::from(backend == Backend::Grpc);
            let prompts = Arc::new(Prompts::new(&load, target.vocab));
            if round == 0 {
                // Caches and connections on both sides.
                request(&target, &load, &prompts, 0)
                    .await
                    .context("the first request failed")?;
                continue;
            }
            let began = Instant::now();
            let results = run_clients(&target, &load, &prompts).await;
            let time = began.elapsed();
            let timings = results.into_iter().collect::<Result<Vec<_>>>();
            let way = if backend == Backend::Grpc {
                &mut direct
            } else {
                &mut through
            };
            way.add(timings.context("a request failed")?, time);
        }
    }
    direct.sort();
    through.sort();
    println!(
        "{} streams, {} requests x {ROUNDS} rounds each way, {} prompt and {} output tokens",
        load.max_concurrency, load.num_prompts, load.random_input_len, load.random_output_len
    );
    println!("{:<34}{:>12}{:>12}{:>14}", "", "gRPC", "gateway", "difference");
    let (rate, other) = (direct.rate(), through.rate());
    let cost = (1.0 - other / rate) * 100.0;
    println!(
        "{:<34}{rate:>12.1}{other:>12.1}{:>12.1} %",
        "output tokens/s", -cost
    );
    for (name, of, q) in [
        ("median time to first token (ms)", 0, 0.5),
        ("p99 time to first token (ms)", 0, 0.99),
        ("median time between tokens (ms)", 1, 0.5),
        ("p99 time between tokens (ms)", 1, 0.99),
    ] {
        let times = |way: &Way| {
            let all = if of == 0 { &way.first } else { &way.gaps };
            percentile(all, q).as_secs_f64() * 1e3
        };
        let (a, b) = (times(&direct), times(&through));
        println!("{name:<34}{a:>12.3}{b:>12.3}{:>+14.3}", b - a);
    }
    target.end().await
}

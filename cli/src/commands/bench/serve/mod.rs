//! `--scenario serve`: clients in a closed loop against a cluster, and the table of `vllm bench serve`.

mod cluster;
mod device_memory;
pub mod divergence;
mod grpc;
mod http;
pub mod overhead;
mod report;
pub mod soak;
pub mod text;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tokio::task::JoinSet;

use super::steps;
use crate::settings::{Backend, BenchSettings, LoadSettings};
pub use cluster::Target;
pub use report::{Report, percentile};

/// When the tokens of one request came.
#[derive(Clone, Debug, Default)]
pub struct Timing {
    pub first: Duration,
    /// Between one piece and the next.
    pub gaps: Vec<Duration>,
    pub total: Duration,
    pub prompt_tokens: u32,
    /// Of the prompt, found in the prefix cache.
    pub cached_tokens: u32,
    pub tokens: u32,
    /// The generated tokens, if asked for.
    pub ids: Vec<u32>,
    /// Bits of their log-probabilities, each with those of the best ones, if asked for.
    pub logprobs: Vec<u32>,
    /// The client left before the answer was whole.
    pub hung_up: bool,
}

/// One greedy completion of a fixed length.
#[derive(Clone, Debug)]
pub struct Call {
    pub prompt: Vec<u32>,
    pub output: u32,
    /// Calls with different salts share nothing in the prefix cache; empty is one of them.
    pub cache_salt: String,
    /// The generated tokens' ids are asked for.
    pub wants_ids: bool,
    /// So many best log-probabilities are asked for (gRPC only).
    pub logprobs: Option<u32>,
    /// After so many pieces the client hangs up (HTTP only).
    pub most_pieces: usize,
}

/// A prompt of random token ids that begins like all others.
#[derive(Clone, Debug)]
pub struct Prompts {
    prefix: u32,
    length: u32,
    vocab: u32,
    seed: u64,
    pub output: u32,
}

impl Prompts {
    fn new(load: &LoadSettings, vocab: u32) -> Prompts {
        Prompts {
            prefix: load.random_prefix_len,
            length: load.random_input_len,
            vocab: vocab.max(1),
            seed: load.seed,
            output: load.random_output_len,
        }
    }

    pub fn tokens(&self, index: usize) -> Vec<u32> {
        self.some_tokens(index, self.length)
    }

    /// The first `length` tokens of a prompt, behind the common prefix.
    fn some_tokens(&self, index: usize, length: u32) -> Vec<u32> {
        let token = |salt: u64, position: u32| {
            let mixed =
                (self.seed ^ salt.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_add(u64::from(position) + 1);
            let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            ((mixed >> 32) % u64::from(self.vocab)) as u32
        };
        let prefix = (0..self.prefix).map(|position| token(0, position));
        let rest = (0..length).map(|position| token(index as u64 + 1, position));
        prefix.chain(rest).collect()
    }
}

pub async fn run(settings: &BenchSettings) -> Result<()> {
    let load = &settings.load;
    if load.num_prompts == 0 || load.max_concurrency == 0 {
        bail!("num_prompts and max_concurrency must be at least 1");
    }
    let target = Target::reach(settings).await?;
    let prompts = Arc::new(Prompts::new(load, target.vocab));
    // Before anything is measured, one request warms caches on both sides.
    request(&target, load, &prompts, usize::MAX >> 1)
        .await
        .context("the first request failed")?;
    let before = target.busy_and_idle().await;
    let started = Instant::now();
    let results = run_clients(&target, load, &prompts).await;
    let duration = started.elapsed();
    let idle = match (before, target.busy_and_idle().await) {
        (Some(before), Some(after)) => after.idle_share_since(&before),
        _ => None,
    };
    let report = Report::of(results, duration, load.max_concurrency, idle);
    report.print();
    target.end().await?;
    let mut figures = report.json();
    if settings.profile && load.base_url.is_none() {
        figures["decode"] = beside_decode(settings, &figures)?;
    }
    super::results::write(settings.result_filename.as_deref(), "serve", &figures)
}

/// Decode alone with as many sequences, at the context that they have on average, and what part of its rate was served.
fn beside_decode(settings: &BenchSettings, served: &Value) -> Result<Value> {
    let load = &settings.load;
    let mut alone = settings.clone();
    alone.batch = vec![load.max_concurrency];
    alone.context = load.random_prefix_len + load.random_input_len + load.random_output_len / 2;
    let decode = steps::measure(&alone, steps::Phase::Decode)?.swap_remove(0);
    let rate = |figures: &Value, name: &str| figures[name].as_f64().unwrap_or(f64::NAN);
    let of = rate(served, "output_throughput") / rate(&decode, "tokens_per_second");
    println!("  served: {:.0}% of decode alone", 100.0 * of);
    Ok(decode)
}

/// Every client takes the next prompt when its last request has ended.
async fn run_clients(
    target: &Arc<Target>,
    load: &LoadSettings,
    prompts: &Arc<Prompts>,
) -> Vec<Result<Timing>> {
    let next = Arc::new(AtomicUsize::new(0));
    let mut clients = JoinSet::new();
    for _ in 0..load.max_concurrency.min(load.num_prompts) {
        let (target, load, prompts, next) = (target.clone(), load.clone(), prompts.clone(), next.clone());
        clients.spawn(async move {
            let mut results = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= load.num_prompts {
                    return results;
                }
                results.push(request(&target, &load, &prompts, index).await);
            }
        });
    }
    clients.join_all().await.into_iter().flatten().collect()
}

async fn request(target: &Target, load: &LoadSettings, prompts: &Prompts, index: usize) -> Result<Timing> {
    let call = Call {
        prompt: prompts.tokens(index),
        output: prompts.output,
        cache_salt: String::new(),
        // Pieces come without a tokenizer, too.
        wants_ids: true,
        logprobs: None,
        most_pieces: usize::MAX,
    };
    complete(target, load, &call).await
}

/// One call through the API that the settings name.
pub async fn complete(target: &Target, load: &LoadSettings, call: &Call) -> Result<Timing> {
    match load.backend {
        Backend::Openai => http::complete(&target.http()?, load.bench_api_key.as_deref(), call).await,
        Backend::Grpc => grpc::complete(&target.grpc().await?, call).await,
    }
}

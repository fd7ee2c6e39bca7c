//! `--scenario soak`: random arrivals, random lengths, clients that hang up. Fails if a request fails, if KV pages do
//! not come back, or if the device's memory grows.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::cluster::Target;
use super::device_memory::DeviceMemory;
use super::{Call, Prompts, Timing, http};
use crate::settings::BenchSettings;

/// Every so many-th client hangs up in mid-answer, and as many before the first token.
const HANGS_UP: u64 = 5;
/// Who hangs up before the first token does within this time.
const PATIENCE: Duration = Duration::from_secs(1);
/// Every so many-th prompt begins like an earlier one.
const REPEATS: u64 = 3;
/// After the last request everything is given back within this time.
const SETTLE: Duration = Duration::from_secs(30);
/// How often the device's memory is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// What it may grow by: the driver's own bookkeeping.
const GROWTH_BYTES: u64 = 16 << 20;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        conclave_plan::random::next(&mut self.0)
    }

    /// In 0..1.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// In 1..=most, every magnitude as likely as another.
    fn length(&mut self, most: u32) -> u32 {
        (f64::from(most.max(1)).powf(self.unit()) as u32).clamp(1, most.max(1))
    }
}

#[derive(Default)]
struct Tally {
    whole: usize,
    /// Hung up with tokens to come, and before the first one.
    in_mid_answer: usize,
    before_the_first: usize,
    failed: Vec<String>,
    prompt_tokens: u64,
    tokens: u64,
    longest: u32,
}

/// When a client has had enough.
#[derive(Clone, Copy, PartialEq)]
enum Leaves {
    Never,
    AfterPieces(usize),
    After(Duration),
}

enum Ended {
    Whole(Timing),
    InMidAnswer,
    BeforeTheFirst,
}

pub async fn run(settings: &BenchSettings) -> Result<()> {
    let load = &settings.load;
    let target = Target::reach(settings).await?;
    let address = target.http()?;
    let prompts = Prompts::new(load, target.vocab);
    let mut random = Random(load.seed);
    // One request warms what is made on demand outside of the device.
    let first = call(prompts.some_tokens(0, 64), 8, usize::MAX);
    http::complete(&address, None, &first)
        .await
        .context("the first request failed")?;
    let mut memory = DeviceMemory::new(&settings.device.device)?;
    memory.look().await;
    let before = Counts::of(&target).await;
    let began = Instant::now();
    let mut looked = began;
    let room = Arc::new(Semaphore::new(load.max_concurrency));
    let mut calls = JoinSet::new();
    let mut tally = Tally::default();
    let mut index = 0u64;
    while began.elapsed() < load.duration {
        let mean = 1.0 / load.request_rate;
        sleep(Duration::from_secs_f64(-mean * (1.0 - random.unit()).ln())).await;
        let permit = Arc::clone(&room).acquire_owned().await?;
        index += 1;
        let (call, leaves) = draw(&mut random, &prompts, load.random_input_len, index);
        tally.longest = tally.longest.max(call.prompt.len() as u32);
        let address = address.clone();
        calls.spawn(async move {
            let _permit = permit;
            one(&address, &call, leaves).await
        });
        while let Some(ended) = calls.try_join_next() {
            tally.add(ended?);
        }
        if looked.elapsed() > LOOK_EVERY {
            memory.look().await;
            tally.print(began.elapsed(), &Counts::of(&target).await, &memory);
            looked = Instant::now();
        }
    }
    while let Some(ended) = calls.join_next().await {
        tally.add(ended?);
    }
    let settled = settle(&target).await;
    memory.look().await;
    let after = Counts::of(&target).await;
    let counts = Counts {
        cancelled: after.cancelled - before.cancelled,
        preempted: after.preempted - before.preempted,
        ..after
    };
    let problems = report(settings, &tally, began.elapsed(), settled, &counts, &memory)?;
    target.end().await?;
    if !problems.is_empty() {
        bail!("{}", problems.join("; "));
    }
    Ok(())
}

async fn one(address: &str, call: &Call, leaves: Leaves) -> Result<Ended> {
    let answer = http::complete(address, None, call);
    let answer = match leaves {
        Leaves::After(patience) => match timeout(patience, answer).await {
            Ok(answer) => answer,
            // The connection goes with the call.
            Err(_) => return Ok(Ended::BeforeTheFirst),
        },
        Leaves::Never | Leaves::AfterPieces(_) => answer.await,
    };
    answer.map(|timing| match timing.hung_up {
        true => Ended::InMidAnswer,
        false => Ended::Whole(timing),
    })
}

fn draw(random: &mut Random, prompts: &Prompts, longest: u32, index: u64) -> (Call, Leaves) {
    let length = random.length(longest);
    let repeats = random.next().is_multiple_of(REPEATS);
    let from = if repeats { random.next() % index } else { index };
    let output = random.length(prompts.output);
    let leaves = match random.next() % HANGS_UP {
        0 => Leaves::AfterPieces(random.length(output) as usize),
        1 => Leaves::After(PATIENCE.mul_f64(random.unit())),
        _ => Leaves::Never,
    };
    let pieces = match leaves {
        Leaves::AfterPieces(pieces) => pieces,
        Leaves::Never | Leaves::After(_) => usize::MAX,
    };
    (
        call(prompts.some_tokens(from as usize, length), output, pieces),
        leaves,
    )
}

fn call(prompt: Vec<u32>, output: u32, most_pieces: usize) -> Call {
    Call {
        prompt,
        output,
        cache_salt: String::new(),
        // Pieces come without a tokenizer, too.
        wants_ids: true,
        logprobs: None,
        most_pieces,
    }
}

impl Tally {
    /// How it stands.
    fn print(&self, time: Duration, counts: &Counts, memory: &DeviceMemory) {
        let Counts {
            running,
            waiting,
            pages,
            preempted,
            ..
        } = counts;
        let device = memory
            .seen
            .last()
            .map_or(String::new(), |bytes| format!(", device {} MiB", bytes >> 20));
        println!(
            "  {:>4.0} s: {} answered, {} hung up, {} failed; {running} running, {waiting} waiting, {pages} pages held, {preempted} preempted{device}",
            time.as_secs_f64(),
            self.whole,
            self.in_mid_answer + self.before_the_first,
            self.failed.len(),
        );
    }

    fn add(&mut self, ended: Result<Ended>) {
        match ended {
            Ok(Ended::InMidAnswer) => self.in_mid_answer += 1,
            Ok(Ended::BeforeTheFirst) => self.before_the_first += 1,
            Ok(Ended::Whole(timing)) => {
                self.whole += 1;
                self.prompt_tokens += u64::from(timing.prompt_tokens);
                self.tokens += u64::from(timing.tokens);
            }
            Err(error) => self.failed.push(format!("{error:#}")),
        }
    }
}

/// What the router tells.
struct Counts {
    running: f64,
    waiting: f64,
    pages: f64,
    /// Since its start: requests that it saw cancelled, and sequences that gave way to others.
    cancelled: f64,
    preempted: f64,
}

impl Counts {
    async fn of(target: &Target) -> Counts {
        let label = "finished_reason=\"abort\"";
        let cancelled = target.metric_of("vllm:request_success_total", label).await;
        Counts {
            running: metric(target, "vllm:num_requests_running").await,
            waiting: metric(target, "vllm:num_requests_waiting").await,
            pages: metric(target, "conclave:kv_pages_referenced").await,
            cancelled: cancelled.unwrap_or(0.0),
            preempted: target.metric("vllm:num_preemptions").await.unwrap_or(0.0),
        }
    }
}

async fn metric(target: &Target, name: &str) -> f64 {
    target.metric(name).await.unwrap_or(f64::NAN)
}

/// Requests and pages that are still held; waits for them to be given back.
async fn settle(target: &Target) -> (f64, f64) {
    let began = Instant::now();
    loop {
        let running = metric(target, "vllm:num_requests_running").await;
        let pages = metric(target, "conclave:kv_pages_referenced").await;
        if (running == 0.0 && pages == 0.0) || began.elapsed() > SETTLE {
            return (running, pages);
        }
        sleep(Duration::from_millis(100)).await;
    }
}

/// Prints what happened; what must not have happened comes back.
fn report(
    settings: &BenchSettings,
    tally: &Tally,
    time: Duration,
    (running, pages): (f64, f64),
    counts: &Counts,
    memory: &DeviceMemory,
) -> Result<Vec<String>> {
    let seconds = time.as_secs_f64();
    println!(
        "soak of {seconds:.0} s: {} answered, {} hung up in mid-answer and {} before the first token, {} failed",
        tally.whole,
        tally.in_mid_answer,
        tally.before_the_first,
        tally.failed.len()
    );
    println!(
        "  prompts up to {} tokens; of whole answers {} prompt and {} output tokens ({:.0} tok/s)",
        tally.longest,
        tally.prompt_tokens,
        tally.tokens,
        tally.tokens as f64 / seconds,
    );
    println!(
        "  the router cancelled {} running requests; {} times a sequence gave way to others",
        counts.cancelled, counts.preempted
    );
    println!("  afterwards: {running} requests run, {pages} KV pages are held");
    let mut problems = Vec::new();
    if running != 0.0 || pages != 0.0 {
        problems.push(format!(
            "{running} requests and {pages} KV pages did not come back"
        ));
    }
    if tally.in_mid_answer > 0 && counts.cancelled == 0.0 {
        problems.push("the router saw nobody hang up".to_owned());
    }
    if settings.load.expect_preemption && counts.preempted == 0.0 {
        problems.push("KV pages never ran out: no sequence gave way to others".to_owned());
    }
    if let Some(first) = tally.failed.first() {
        problems.push(format!(
            "{} requests failed, the first: {first}",
            tally.failed.len()
        ));
    }
    let figures = memory.figures();
    if let Some((first, most, last)) = figures {
        println!(
            "  device memory: {} MiB after start, {} MiB at most ({} looks), {} MiB at the end",
            first >> 20,
            most >> 20,
            memory.seen.len(),
            last >> 20
        );
        if most > first + GROWTH_BYTES {
            problems.push(format!("device memory grew by {} bytes", most - first));
        }
    }
    let figures = json!({
        "seconds": seconds, "answered": tally.whole, "hung_up_in_mid_answer": tally.in_mid_answer,
        "hung_up_before_the_first_token": tally.before_the_first, "cancelled": counts.cancelled, "preempted": counts.preempted, "failed": tally.failed.len(),
        "longest_prompt": tally.longest, "prompt_tokens": tally.prompt_tokens, "output_tokens": tally.tokens,
        "running_afterwards": running, "pages_afterwards": pages, "device_bytes": memory.seen,
    });
    super::super::results::write(settings.result_filename.as_deref(), "soak", &figures)?;
    Ok(problems)
}

#[cfg(test)]
mod tests {
    use super::Random;

    #[test]
    fn lengths_are_spread_over_magnitudes() {
        let mut random = Random(1);
        let lengths: Vec<u32> = (0..10_000).map(|_| random.length(65_536)).collect();
        let share = |below: u32| lengths.iter().filter(|length| **length < below).count();
        assert!(lengths.iter().all(|length| (1..=65_536).contains(length)));
        // 2^8 is half of the magnitudes.
        assert!((4_500..5_500).contains(&share(256)), "{}", share(256));
    }
}

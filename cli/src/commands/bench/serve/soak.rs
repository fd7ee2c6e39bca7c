//! `--scenario soak`: random arrivals, random lengths, clients that hang up. Fails if a request fails, if KV pages do
//! not come back, or if the device's memory grows.

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use conclave_worker::device::DeviceKind;
use serde_json::json;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::cluster::Target;
use super::{Call, Prompts, Timing, http};
use crate::settings::BenchSettings;

/// Every so many-th client hangs up before its answer is whole.
const HANGS_UP: u64 = 5;
/// Every so many-th prompt begins like an earlier one.
const REPEATS: u64 = 3;
/// After the last request everything is given back within this time.
const SETTLE: Duration = Duration::from_secs(30);
/// What the device's memory may grow by: recorded steps of batch sizes that came later.
const GROWTH_BYTES: u64 = 1 << 30;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
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
    hung_up: usize,
    failed: Vec<String>,
    prompt_tokens: u64,
    tokens: u64,
    longest: u32,
}

pub async fn run(settings: &BenchSettings) -> Result<()> {
    let load = &settings.load;
    let target = Target::reach(settings).await?;
    let address = target.http()?;
    let prompts = Prompts::new(load, target.vocab);
    let mut random = Random(load.seed);
    // The first requests warm up what is made on demand.
    let first = call(prompts.some_tokens(0, 64), 8, usize::MAX);
    http::complete(&address, None, &first)
        .await
        .context("the first request failed")?;
    let device = DeviceKind::choose(&settings.device.device)?;
    let memory_before = device_memory(device);
    let began = Instant::now();
    let room = Arc::new(Semaphore::new(load.max_concurrency));
    let mut calls = JoinSet::new();
    let mut tally = Tally::default();
    let mut index = 0u64;
    while began.elapsed() < load.duration {
        let mean = 1.0 / load.request_rate;
        sleep(Duration::from_secs_f64(-mean * (1.0 - random.unit()).ln())).await;
        let permit = Arc::clone(&room).acquire_owned().await?;
        index += 1;
        let call = draw(&mut random, &prompts, load.random_input_len, index);
        tally.longest = tally.longest.max(call.prompt.len() as u32);
        let address = address.clone();
        calls.spawn(async move {
            let _permit = permit;
            let cut = call.most_pieces != usize::MAX;
            (cut, http::complete(&address, None, &call).await)
        });
        while let Some(ended) = calls.try_join_next() {
            tally.add(ended?);
        }
    }
    while let Some(ended) = calls.join_next().await {
        tally.add(ended?);
    }
    let settled = settle(&target).await;
    let memory_after = device_memory(device);
    let problems = report(
        settings,
        &tally,
        began.elapsed(),
        settled,
        memory_before,
        memory_after,
    )?;
    target.end().await?;
    if !problems.is_empty() {
        bail!("{}", problems.join("; "));
    }
    Ok(())
}

fn draw(random: &mut Random, prompts: &Prompts, longest: u32, index: u64) -> Call {
    let length = random.length(longest);
    let repeats = random.next().is_multiple_of(REPEATS);
    let from = if repeats { random.next() % index } else { index };
    let output = random.length(prompts.output);
    let hangs_up = random.next().is_multiple_of(HANGS_UP);
    let pieces = if hangs_up {
        random.length(output) as usize
    } else {
        usize::MAX
    };
    call(prompts.some_tokens(from as usize, length), output, pieces)
}

fn call(prompt: Vec<u32>, output: u32, most_pieces: usize) -> Call {
    Call {
        prompt,
        output,
        cache_salt: String::new(),
        wants_ids: true,
        most_pieces,
    }
}

impl Tally {
    fn add(&mut self, (cut, result): (bool, Result<Timing>)) {
        match result {
            Ok(_) if cut => self.hung_up += 1,
            Ok(timing) => {
                self.whole += 1;
                self.prompt_tokens += u64::from(timing.prompt_tokens);
                self.tokens += u64::from(timing.tokens);
            }
            Err(error) => self.failed.push(format!("{error:#}")),
        }
    }
}

/// Requests and pages that are still held; waits for them to be given back.
async fn settle(target: &Target) -> (f64, f64) {
    let began = Instant::now();
    loop {
        let running = target
            .metric("vllm:num_requests_running")
            .await
            .unwrap_or(f64::NAN);
        let pages = target
            .metric("conclave:kv_pages_referenced")
            .await
            .unwrap_or(f64::NAN);
        if (running == 0.0 && pages == 0.0) || began.elapsed() > SETTLE {
            return (running, pages);
        }
        sleep(Duration::from_millis(100)).await;
    }
}

/// Bytes in use on a GPU, as the driver's tool tells; `None` on a CPU, whose pages stay mapped once touched.
fn device_memory(device: DeviceKind) -> Option<u64> {
    let DeviceKind::Cuda(ordinal) = device else {
        return None;
    };
    let output = Command::new("nvidia-smi")
        .args(["--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i"])
        .arg(ordinal.to_string())
        .output()
        .ok()?;
    let mebibytes: u64 = String::from_utf8_lossy(&output.stdout).trim().parse().ok()?;
    Some(mebibytes << 20)
}

/// Prints what happened; what must not have happened comes back.
fn report(
    settings: &BenchSettings,
    tally: &Tally,
    time: Duration,
    (running, pages): (f64, f64),
    before: Option<u64>,
    after: Option<u64>,
) -> Result<Vec<String>> {
    let seconds = time.as_secs_f64();
    println!(
        "soak of {seconds:.0} s: {} answered, {} hung up, {} failed; prompts up to {} tokens; {} prompt and {} output tokens ({:.0} tok/s)",
        tally.whole,
        tally.hung_up,
        tally.failed.len(),
        tally.longest,
        tally.prompt_tokens,
        tally.tokens,
        tally.tokens as f64 / seconds,
    );
    println!("  afterwards: {running} requests run, {pages} KV pages are held");
    let mut problems = Vec::new();
    if running != 0.0 || pages != 0.0 {
        problems.push(format!(
            "{running} requests and {pages} KV pages did not come back"
        ));
    }
    if let Some(first) = tally.failed.first() {
        problems.push(format!(
            "{} requests failed, the first: {first}",
            tally.failed.len()
        ));
    }
    if let (Some(before), Some(after)) = (before, after) {
        println!(
            "  device memory: {} MiB before, {} MiB after",
            before >> 20,
            after >> 20
        );
        if after > before + GROWTH_BYTES {
            problems.push(format!("device memory grew by {} bytes", after - before));
        }
    }
    let figures = json!({
        "seconds": seconds, "answered": tally.whole, "hung_up": tally.hung_up, "failed": tally.failed.len(),
        "longest_prompt": tally.longest, "prompt_tokens": tally.prompt_tokens, "output_tokens": tally.tokens,
        "running_afterwards": running, "pages_afterwards": pages,
        "device_bytes_before": before, "device_bytes_after": after,
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

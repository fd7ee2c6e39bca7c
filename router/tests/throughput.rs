//! How many tokens a second the router carries when the worker costs nothing: prints a figure, and fails only if one
//! token costs far more processor time than one GPU could leave it. `cargo test --release -p conclave-router --test throughput -- --nocapture`
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use conclave_proto::v1 as pb;
use conclave_proto::v1::generate_request::Prompt;
use conclave_router::RouterConfig;
use support::{Answer, Cluster, Script, config, request};

const STREAMS: usize = 64;
const TOKENS: i64 = 400;
/// Processor time of router, scripted worker and clients: 10,000 tokens a second on two cores. Not the time that passes,
/// which other work on the machine may take.
const PER_TOKEN_MAX: Duration = Duration::from_micros(200);

/// Processor time that this process has used.
fn processor_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_per_second_at_64_streams() {
    let config = RouterConfig {
        model: PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/demo")),
        skip_tokenizer_init: false,
        max_num_seqs: 64,
        max_num_batched_tokens: 2048,
        ..config()
    };
    let script = Script::new("a").with(|hello| {
        hello.max_slots = 64;
        hello.max_batched_tokens = 2048;
        hello.kv_pages = 8192;
    });
    let (cluster, worker) = Cluster::with_worker(config, script).await;
    let (began, used) = (Instant::now(), processor_time());
    let mut tasks = Vec::new();
    for i in 0..STREAMS {
        let request = pb::GenerateRequest {
            prompt: Some(Prompt::Text(format!("Stream {i} tells a story"))),
            ..request(&[1], TOKENS)
        };
        let stream = cluster.generate(request).await.unwrap();
        tasks.push(tokio::spawn(Answer::read(stream)));
    }
    let mut tokens = 0;
    for task in tasks {
        tokens += task.await.unwrap().tokens[0].len();
    }
    let seconds = began.elapsed().as_secs_f64();
    let used = processor_time() - used;
    let steps = worker.seen.borrow().steps;
    assert_eq!(tokens, STREAMS * TOKENS as usize);
    let per_token = used / u32::try_from(tokens).unwrap();
    println!(
        "{tokens} tokens of {STREAMS} streams in {seconds:.2} s: {:.0} tokens/s, {:.0} steps/s, {per_token:?} of processor time a token",
        tokens as f64 / seconds,
        steps as f64 / seconds
    );
    assert!(per_token < PER_TOKEN_MAX, "{per_token:?}");
}

//! How many tokens a second the router carries when the worker costs nothing: prints a figure, and fails only if it
//! is far below what one GPU could need. `cargo test --release -p conclave-router --test throughput -- --nocapture`
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::path::PathBuf;
use std::time::Instant;

use conclave_proto::v1 as pb;
use conclave_proto::v1::generate_request::Prompt;
use conclave_router::RouterConfig;
use support::{Answer, Cluster, Script, config, request};

const STREAMS: usize = 64;
const TOKENS: i64 = 400;
/// Router, scripted worker and clients share this machine's cores.
const LEAST_TOKENS_PER_SECOND: f64 = 10_000.0;

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
    let began = Instant::now();
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
    let steps = worker.seen.borrow().steps;
    let rate = tokens as f64 / seconds;
    println!(
        "{tokens} tokens of {STREAMS} streams in {seconds:.2} s: {rate:.0} tokens/s, {:.0} steps/s",
        steps as f64 / seconds
    );
    assert_eq!(tokens, STREAMS * TOKENS as usize);
    assert!(rate > LEAST_TOKENS_PER_SECOND, "{rate:.0} tokens/s");
}

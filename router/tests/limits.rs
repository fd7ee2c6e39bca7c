//! What happens to those who ask for too much at once, read too slowly or vanish.
//!
//! Proves invariant B1 of ARCHITECTURE.md.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use conclave_proto::v1 as pb;
use support::{Answer, Cluster, EOS, Script, config, expected, refused, request, sampling};
use tonic::Code;
use tonic_types::StatusExt;

#[tokio::test]
async fn eos_ends_a_sequence_unless_ignored_or_too_early() {
    let mut script = Script::new("a");
    // The fourth token after a prompt of two.
    script.eos_at = Some(5);
    let (cluster, _worker) = Cluster::with_worker(config(), script).await;
    let with = |ignore_eos, min_tokens| {
        let mut request = request(&[50, 51], 10);
        sampling(&mut request).ignore_eos = ignore_eos;
        sampling(&mut request).min_tokens = min_tokens;
        request
    };
    let answer = Answer::read(cluster.generate(with(false, 0)).await.unwrap()).await;
    assert_eq!(answer.tokens[0].len(), 4);
    assert_eq!(answer.tokens[0][3], EOS);
    assert_eq!(answer.reason(0), pb::FinishReason::Stop);
    assert_eq!(
        answer.finished[0].as_ref().unwrap().stop_reason,
        "",
        "eos needs no naming"
    );
    for request in [with(true, 0), with(false, 6)] {
        let answer = Answer::read(cluster.generate(request).await.unwrap()).await;
        assert_eq!(answer.tokens[0].len(), 10);
        assert_eq!(answer.reason(0), pb::FinishReason::Length);
    }
}

#[tokio::test]
async fn a_full_queue_refuses_with_a_retry_hint() {
    let mut small = config();
    small.max_waiting = 4;
    // No worker: nothing can run, so everything waits.
    let cluster = Cluster::start(small).await;
    let mut waiting = Vec::new();
    for i in 0..4 {
        waiting.push(cluster.generate(request(&[i + 3], 2)).await.unwrap());
    }
    let status = refused(&cluster, request(&[9], 2)).await;
    assert_eq!(status.code(), Code::ResourceExhausted);
    let retry = status.get_details_retry_info().unwrap().retry_delay.unwrap();
    assert!(
        retry > Duration::ZERO && retry <= Duration::from_secs(60),
        "{retry:?}"
    );
    // All choices or none.
    drop(waiting.pop());
    cluster.until(|view| view.waiting == 3).await;
    let mut two = request(&[9], 2);
    two.n = 2;
    assert_eq!(refused(&cluster, two).await.code(), Code::ResourceExhausted);
    cluster.until(|view| view.waiting == 3).await;
    waiting.push(cluster.generate(request(&[9], 2)).await.unwrap());
    let _worker = cluster.attach(Script::new("a")).await;
    for stream in waiting {
        assert!(Answer::read(stream).await.usage.is_some());
    }
}

#[tokio::test]
async fn a_thousand_vanishing_clients_leave_no_slot_and_no_page() {
    let mut wide = config();
    wide.max_waiting = 2000;
    let (cluster, _worker) =
        Cluster::with_worker(wide, Script::new("a").step(Duration::from_millis(1))).await;
    let mut tasks = Vec::new();
    for i in 0..1000u32 {
        let mut client = cluster.client.clone();
        tasks.push(tokio::spawn(async move {
            let prompt: Vec<u32> = (0..1 + i % 300).map(|k| 3 + (k + i) % 300).collect();
            let call = client.generate(request(&prompt, 1000));
            // Vanish at different phases: before admission, queued, in prefill, while decoding.
            let vanish = Duration::from_millis(u64::from(i % 7) * 40);
            let read = async {
                let mut stream = call.await.unwrap().into_inner();
                while stream.message().await.unwrap().is_some() {}
            };
            tokio::time::timeout(vanish, read).await.is_err()
        }));
    }
    for task in tasks {
        assert!(task.await.unwrap(), "1000 tokens do not fit into that time");
    }
    cluster.until(|view| view.running == 0 && view.waiting == 0).await;
    assert_eq!(cluster.metric("conclave:kv_pages_referenced").await, 0.0);
    assert_eq!(cluster.metric("conclave:worker_slots_used").await, 0.0);
    let answer = Answer::read(cluster.generate(request(&[5, 6], 8)).await.unwrap()).await;
    assert_eq!(answer.tokens, [expected(&[5, 6], 8)]);
}

#[tokio::test]
async fn a_reader_that_does_not_read_loses_its_stream_alone() {
    let mut long = config();
    long.hf_overrides = Some(serde_json::json!({"max_position_embeddings": 200_000}));
    let script = Script::new("a").with(|hello| {
        hello.kv_pages = 20_000;
    });
    let (cluster, _worker) = Cluster::with_worker(long, script).await;
    // Its own connection, so that its windows are its own.
    let mut lazy = conclave_proto::v1::conclave_client::ConclaveClient::connect(cluster.address.clone())
        .await
        .unwrap();
    let mut wanted = request(&[5], 190_000);
    wanted.output.get_or_insert_default().logprobs = Some(20);
    let stream = lazy.generate(wanted).await.unwrap().into_inner();
    cluster.until(|view| view.running == 1).await;
    let diligent = Answer::read(cluster.generate(request(&[6], 2000)).await.unwrap()).await;
    assert_eq!(diligent.tokens, [expected(&[6], 2000)]);
    cluster.until(|view| view.running == 0).await;
    assert_eq!(cluster.metric("conclave:slow_readers_total").await, 1.0);
    let answer = Answer::read(stream).await;
    let status = answer.error.unwrap();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    let tokens = &answer.tokens[0];
    assert_eq!(
        tokens[..],
        expected(&[5], tokens.len())[..],
        "what did arrive is right"
    );
    assert!(tokens.len() < 40_000, "{}", tokens.len());
}

/// A worker's answer fits into one message, however many tokens of prompts with log-probabilities a step may hold.
#[tokio::test]
async fn log_probabilities_of_the_longest_steps_fit_into_messages() {
    const TOKENS: u32 = 1 << 17;
    let mut large = config();
    large.hf_overrides = Some(serde_json::json!({"max_position_embeddings": TOKENS + 1}));
    large.max_num_batched_tokens = TOKENS;
    // The reader of the answer shares the worker's thread.
    large.heartbeat_timeout = Duration::from_secs(30);
    let script = Script::new("a").with(|hello| {
        hello.kv_pages = TOKENS / 16 + 64;
        hello.max_batched_tokens = TOKENS;
    });
    let (cluster, _worker) = Cluster::with_worker(large, script).await;
    let prompt: Vec<u32> = (0..TOKENS).map(|i| 3 + i % 300).collect();
    let mut wanted = request(&prompt, 1);
    wanted.output.get_or_insert_default().prompt_logprobs = Some(20);
    let answer = Answer::read(cluster.generate(wanted).await.unwrap());
    let answer = tokio::time::timeout(Duration::from_secs(60), answer)
        .await
        .unwrap();
    assert_eq!(answer.started.unwrap().prompt_logprobs.len(), prompt.len());
    assert_eq!(cluster.metric("conclave:workers_lost_total").await, 0.0);
}

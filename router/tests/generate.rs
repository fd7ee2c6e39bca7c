//! Generate over the wire, with a scripted worker: token ids in and out.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use conclave_proto::v1 as pb;
use support::{Answer, Cluster, PATIENCE, Script, config, expected, request};

#[tokio::test]
async fn tokens_are_streamed_in_order_with_usage() {
    let (cluster, worker) = Cluster::with_worker(config(), Script::new("a")).await;
    let prompt: Vec<u32> = (10..50).collect();
    let answer = Answer::read(cluster.generate(request(&prompt, 20)).await.unwrap()).await;
    let started = answer.started.as_ref().unwrap();
    assert_eq!(started.prompt_token_ids, prompt);
    assert_eq!(started.model, "tiny");
    assert!(started.request_id.starts_with("req-"));
    assert_eq!(answer.tokens, [expected(&prompt, 20)]);
    assert_eq!(answer.reason(0), pb::FinishReason::Length);
    let usage = answer.usage.unwrap();
    assert_eq!(
        (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens),
        (40, 20, 0)
    );
    assert!(answer.error.is_none());

    let again = Answer::read(cluster.generate(request(&prompt, 20)).await.unwrap()).await;
    assert_eq!(again.tokens, answer.tokens);
    assert_eq!(again.usage.unwrap().cached_tokens, 32, "whole pages of 16 tokens");
    assert_eq!(worker.seen.borrow().transport, "local");
    assert_eq!(cluster.metric("vllm:generation_tokens_total").await, 40.0);
    assert_eq!(cluster.metric("vllm:prefix_cache_hits_total").await, 32.0);
    assert_eq!(
        cluster.metric("vllm:time_to_first_token_seconds_count").await,
        2.0
    );
    assert_eq!(cluster.metric("vllm:request_success_total").await, 2.0);
    assert_eq!(cluster.metric("vllm:num_requests_running").await, 0.0);
    assert!(cluster.metric("conclave:worker_busy_seconds_total").await > 0.0);
}

#[tokio::test]
async fn many_requests_at_once_each_get_their_own_tokens() {
    let (cluster, _worker) = Cluster::with_worker(config(), Script::new("a")).await;
    let mut streams = Vec::new();
    for i in 0..40 {
        let prompt: Vec<u32> = (0..i + 1).map(|k| 3 + (k * 7 + i) % 300).collect();
        let stream = cluster.generate(request(&prompt, 30)).await.unwrap();
        streams.push((prompt, stream));
    }
    for (prompt, stream) in streams {
        let answer = Answer::read(stream).await;
        assert_eq!(answer.tokens, [expected(&prompt, 30)]);
    }
}

#[tokio::test]
async fn choices_are_numbered_and_each_ends_once() {
    let (cluster, _worker) = Cluster::with_worker(config(), Script::new("a")).await;
    let mut three = request(&[5, 6, 7], 9);
    three.n = 3;
    let answer = Answer::read(cluster.generate(three).await.unwrap()).await;
    assert_eq!(answer.tokens, vec![expected(&[5, 6, 7], 9); 3]);
    assert_eq!(answer.finished.iter().flatten().count(), 3);
    assert_eq!(answer.usage.unwrap().completion_tokens, 27);
}

#[tokio::test]
async fn a_stop_token_ends_a_choice_and_is_named() {
    let (cluster, _worker) = Cluster::with_worker(config(), Script::new("a")).await;
    let prompt = [9, 8, 7];
    let tokens = expected(&prompt, 10);
    let mut stopping = request(&prompt, 10);
    stopping.sampling.as_mut().unwrap().stop_token_ids = vec![tokens[4]];
    let answer = Answer::read(cluster.generate(stopping).await.unwrap()).await;
    assert_eq!(answer.tokens, [&tokens[..5]]);
    assert_eq!(answer.reason(0), pb::FinishReason::Stop);
    assert_eq!(
        answer.finished[0].as_ref().unwrap().stop_reason,
        tokens[4].to_string()
    );
}

#[tokio::test]
async fn log_probabilities_of_prompt_and_answer() {
    let (cluster, _worker) = Cluster::with_worker(config(), Script::new("a")).await;
    let prompt: Vec<u32> = (3..43).collect();
    let mut wanted = request(&prompt, 5);
    wanted.output = Some(pb::OutputOptions {
        logprobs: Some(2),
        prompt_logprobs: Some(3),
        ..Default::default()
    });
    wanted.n = 2;
    let answer = Answer::read(cluster.generate(wanted).await.unwrap()).await;
    let of_prompt = answer.started.unwrap().prompt_logprobs;
    assert_eq!(of_prompt.len(), prompt.len());
    assert!(of_prompt[0].sampled.is_none(), "nothing predicts the first token");
    for (entry, &token) in of_prompt.iter().zip(&prompt).skip(1) {
        assert_eq!(entry.sampled.as_ref().unwrap().token_id, token);
        assert_eq!(entry.top.len(), 3);
    }
    for choice in 0..2 {
        assert_eq!(answer.logprobs[choice].len(), 5);
        for (entry, &token) in answer.logprobs[choice].iter().zip(&answer.tokens[choice]) {
            let sampled = entry.sampled.as_ref().unwrap();
            assert_eq!((sampled.token_id, sampled.rank), (token, 1));
            assert_eq!(entry.top.len(), 2);
        }
    }
}

#[tokio::test]
async fn log_probabilities_of_a_prompt_are_whole_where_another_choice_is_ahead() {
    for slow in 0..2 {
        let mut two = config();
        two.expected_workers = 2;
        let cluster = Cluster::start(two).await;
        let mut workers = Vec::new();
        for (at, id) in (0..).zip(["a", "b"]) {
            let step = Duration::from_millis(if at == slow { 100 } else { 0 });
            workers.push(cluster.attach(Script::new(id).step(step)).await);
        }
        cluster.serving().await;
        // Shorter than a page: the choices share nothing, and each worker gets one. One token: the second step has
        // room for the second choice.
        let prompt: Vec<u32> = (3..13).collect();
        let mut wanted = request(&prompt, 1);
        wanted.output.get_or_insert_default().prompt_logprobs = Some(3);
        wanted.n = 2;
        let answer = Answer::read(cluster.generate(wanted).await.unwrap()).await;
        assert_eq!(answer.started.unwrap().prompt_logprobs.len(), prompt.len());
        assert_eq!(answer.tokens, vec![expected(&prompt, 1); 2]);
    }
}

#[tokio::test]
async fn the_only_token_of_a_prompt_has_its_entry() {
    let (cluster, _worker) = Cluster::with_worker(config(), Script::new("a")).await;
    let mut wanted = request(&[7], 2);
    wanted.output.get_or_insert_default().prompt_logprobs = Some(1);
    let answer = Answer::read(cluster.generate(wanted).await.unwrap()).await;
    let of_prompt = answer.started.unwrap().prompt_logprobs;
    assert_eq!(of_prompt.len(), 1, "as many as the prompt has tokens");
    assert!(of_prompt[0].sampled.is_none(), "nothing predicts the first token");
}

#[tokio::test]
async fn a_slot_that_fails_ends_its_request_alone() {
    for (unsatisfiable, reason, told) in [
        (false, pb::FinishReason::Error, "NaN"),
        (true, pb::FinishReason::Unsatisfiable, "bad_words"),
    ] {
        let mut script = Script::new("a");
        (script.error_at, script.unsatisfiable) = (Some(12), unsatisfiable);
        let (cluster, _worker) = Cluster::with_worker(config(), script).await;
        let failing = cluster.generate(request(&[5; 8], 20)).await.unwrap();
        let healthy = cluster.generate(request(&[6; 20], 20)).await.unwrap();
        let failed = Answer::read(failing).await;
        assert_eq!(failed.reason(0), reason);
        assert!(
            failed.finished[0].as_ref().unwrap().error.contains(told),
            "{failed:?}"
        );
        let answer = Answer::read(healthy).await;
        assert_eq!(answer.tokens, [expected(&[6; 20], 20)]);
    }
}

#[tokio::test]
async fn without_workers_requests_wait_with_keep_alives() {
    let mut config = config();
    config.keep_alive_interval = Duration::from_millis(50);
    let cluster = Cluster::start(config).await;
    let mut stream = cluster.generate(request(&[7, 8], 3)).await.unwrap();
    let mut answer = Answer::default();
    while answer.keep_alives < 3 {
        let next = tokio::time::timeout(PATIENCE, stream.message()).await;
        answer.add(next.unwrap().unwrap().unwrap().event.unwrap());
    }
    let _worker = cluster.attach(Script::new("late")).await;
    let answer = answer.rest(stream).await;
    assert_eq!(answer.tokens, [expected(&[7, 8], 3)]);
}

#[tokio::test]
async fn the_prompt_may_be_cut_to_its_last_tokens() {
    let (cluster, _worker) = Cluster::with_worker(config(), Script::new("a")).await;
    let prompt: Vec<u32> = (3..100).collect();
    let mut cut = request(&prompt, 4);
    cut.truncate_prompt_tokens = Some(10);
    let answer = Answer::read(cluster.generate(cut).await.unwrap()).await;
    assert_eq!(answer.started.unwrap().prompt_token_ids, prompt[87..]);
    assert_eq!(answer.tokens, [expected(&prompt[87..], 4)]);
}

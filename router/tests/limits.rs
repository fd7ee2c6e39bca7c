//! What clients may ask for, and what happens to those who ask for too much, read too slowly or vanish.
//!
//! Proves invariant B1 of ARCHITECTURE.md.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use conclave_proto::v1 as pb;
use conclave_proto::v1::generate_request::Prompt;
use support::{Answer, Cluster, EOS, MODEL_LEN, Script, VOCAB, config, expected, request};
use tonic::{Code, Status};
use tonic_types::StatusExt;

type Change = fn(&mut pb::GenerateRequest);

fn sampling(request: &mut pb::GenerateRequest) -> &mut pb::SamplingParams {
    request.sampling.get_or_insert_default()
}

fn output(request: &mut pb::GenerateRequest) -> &mut pb::OutputOptions {
    request.output.get_or_insert_default()
}

fn ids(ids: Vec<u32>) -> Option<Prompt> {
    Some(Prompt::TokenIds(pb::TokenIds { ids }))
}

/// The field that each change makes wrong.
const WRONG: &[(&str, Change)] = &[
    ("prompt", |r| r.prompt = None),
    ("prompt", |r| r.prompt = ids(vec![])),
    ("prompt[1]", |r| r.prompt = ids(vec![1, VOCAB])),
    ("prompt[0]", |r| r.prompt = ids(vec![u32::MAX])),
    ("prompt", |r| r.prompt = Some(Prompt::Text("text".into()))),
    ("prompt", |r| r.prompt = ids(vec![3; MODEL_LEN as usize])),
    ("chat", |r| r.prompt = Some(Prompt::Chat(pb::Chat::default()))),
    ("request_id", |r| r.request_id = "x".repeat(129)),
    ("request_id", |r| r.request_id = "a\nb".into()),
    ("n", |r| r.n = 129),
    ("n", |r| r.n = 1_000_000_000),
    ("cache_salt", |r| r.cache_salt = "s".repeat(257)),
    ("truncate_prompt_tokens", |r| r.truncate_prompt_tokens = Some(0)),
    ("truncate_prompt_tokens", |r| r.truncate_prompt_tokens = Some(-2)),
    ("truncate_prompt_tokens", |r| {
        r.truncate_prompt_tokens = Some(i64::MAX)
    }),
    ("sampling.temperature", |r| {
        sampling(r).temperature = Some(f32::NAN)
    }),
    ("sampling.temperature", |r| {
        sampling(r).temperature = Some(f32::INFINITY)
    }),
    ("sampling.temperature", |r| sampling(r).temperature = Some(-0.1)),
    ("sampling.temperature", |r| sampling(r).temperature = Some(1e30)),
    ("sampling.top_p", |r| sampling(r).top_p = Some(0.0)),
    ("sampling.top_p", |r| sampling(r).top_p = Some(1.01)),
    ("sampling.top_p", |r| sampling(r).top_p = Some(f32::NAN)),
    ("sampling.top_k", |r| sampling(r).top_k = Some(-2)),
    ("sampling.min_p", |r| sampling(r).min_p = Some(-0.1)),
    ("sampling.min_p", |r| sampling(r).min_p = Some(f32::NAN)),
    ("sampling.repetition_penalty", |r| {
        sampling(r).repetition_penalty = Some(0.0)
    }),
    ("sampling.repetition_penalty", |r| {
        sampling(r).repetition_penalty = Some(f32::INFINITY)
    }),
    ("sampling.presence_penalty", |r| {
        sampling(r).presence_penalty = Some(2.5)
    }),
    ("sampling.presence_penalty", |r| {
        sampling(r).presence_penalty = Some(f32::NAN)
    }),
    ("sampling.frequency_penalty", |r| {
        sampling(r).frequency_penalty = Some(-2.5)
    }),
    ("sampling.logit_bias", |r| {
        sampling(r).logit_bias.insert(VOCAB, 1.0);
    }),
    ("sampling.logit_bias[7]", |r| {
        sampling(r).logit_bias.insert(7, 101.0);
    }),
    ("sampling.logit_bias[7]", |r| {
        sampling(r).logit_bias.insert(7, f32::NAN);
    }),
    ("sampling.logit_bias", |r| {
        sampling(r).logit_bias = (0..1025).map(|i| (i, 0.0)).collect()
    }),
    ("sampling.max_tokens", |r| sampling(r).max_tokens = Some(0)),
    ("sampling.max_tokens", |r| sampling(r).max_tokens = Some(-1)),
    ("sampling.max_tokens", |r| sampling(r).max_tokens = Some(i64::MAX)),
    ("sampling.max_tokens", |r| sampling(r).max_tokens = Some(i64::MIN)),
    ("sampling.max_tokens", |r| {
        sampling(r).max_tokens = Some(i64::from(MODEL_LEN))
    }),
    ("sampling.min_tokens", |r| sampling(r).min_tokens = -1),
    ("sampling.min_tokens", |r| sampling(r).min_tokens = 11),
    ("sampling.stop", |r| sampling(r).stop = vec!["x".into()]),
    ("sampling.stop", |r| sampling(r).stop = vec!["x".into(); 100_000]),
    ("sampling.stop[0]", |r| sampling(r).stop = vec![String::new()]),
    ("sampling.stop[0]", |r| sampling(r).stop = vec!["x".repeat(5000)]),
    ("sampling.stop_token_ids", |r| {
        sampling(r).stop_token_ids = vec![VOCAB]
    }),
    ("sampling.stop_token_ids", |r| {
        sampling(r).stop_token_ids = vec![1; 129]
    }),
    ("sampling.bad_words", |r| sampling(r).bad_words = vec!["x".into()]),
    ("output.logprobs", |r| output(r).logprobs = Some(21)),
    ("output.prompt_logprobs", |r| output(r).prompt_logprobs = Some(21)),
    ("output.echo", |r| output(r).echo = true),
    ("structured", |r| {
        r.structured = Some(pb::StructuredOutput {
            kind: Some(pb::structured_output::Kind::Regex("a".into())),
        });
    }),
];

/// At the edge of what is allowed.
const RIGHT: &[Change] = &[
    |r| r.n = 128,
    |r| r.prompt = ids(vec![VOCAB - 1]),
    |r| r.prompt = ids(vec![3; MODEL_LEN as usize - 10]),
    |r| r.request_id = "x".repeat(128),
    |r| r.priority = i32::MIN,
    |r| r.truncate_prompt_tokens = Some(-1),
    |r| sampling(r).temperature = Some(0.0),
    |r| sampling(r).temperature = Some(100.0),
    |r| sampling(r).top_p = Some(f32::MIN_POSITIVE),
    |r| sampling(r).top_k = Some(-1),
    |r| sampling(r).top_k = Some(i32::MAX),
    |r| sampling(r).min_p = Some(1.0),
    |r| sampling(r).logit_bias = (0..VOCAB).map(|i| (i, -100.0)).collect(),
    |r| sampling(r).min_tokens = 10,
    |r| sampling(r).stop_token_ids = (0..128).collect(),
    |r| sampling(r).seed = Some(u64::MAX),
    |r| output(r).logprobs = Some(20),
    |r| r.sampling = None,
];

async fn refused(cluster: &Cluster, request: pb::GenerateRequest) -> Status {
    match cluster.generate(request).await {
        Ok(_) => panic!("the request was accepted"),
        Err(status) => status,
    }
}

#[tokio::test]
async fn every_wrong_field_is_named_and_nobody_else_is_disturbed() {
    let (cluster, _worker) =
        Cluster::with_worker(config(), Script::new("a").step(Duration::from_millis(1))).await;
    let healthy = tokio::spawn(Answer::read(cluster.generate(request(&[9], 400)).await.unwrap()));
    for (i, (field, change)) in WRONG.iter().enumerate() {
        let mut wrong = request(&[1, 2, 3], 10);
        change(&mut wrong);
        let asked = std::time::Instant::now();
        let status = refused(&cluster, wrong).await;
        assert_eq!(status.code(), Code::InvalidArgument, "case {i}: {status:?}");
        let details = status.get_details_bad_request().unwrap();
        let fields: Vec<&str> = details
            .field_violations
            .iter()
            .map(|v| v.field.as_str())
            .collect();
        assert!(fields.contains(field), "case {i}: {field} is not in {fields:?}");
        assert!(status.message().len() < 400, "case {i}: {}", status.message());
        assert!(
            asked.elapsed() < Duration::from_millis(500),
            "case {i} took {:?}",
            asked.elapsed()
        );
    }
    assert_eq!(healthy.await.unwrap().tokens, [expected(&[9], 400)]);
}

#[tokio::test]
async fn the_edges_of_every_range_are_served() {
    let mut wide = config();
    wide.max_waiting = 256;
    let (cluster, _worker) = Cluster::with_worker(wide, Script::new("a")).await;
    for (i, change) in RIGHT.iter().enumerate() {
        let mut right = request(&[1, 2, 3], 10);
        change(&mut right);
        let stream = cluster.generate(right).await;
        let answer = Answer::read(stream.unwrap_or_else(|status| panic!("case {i}: {status:?}"))).await;
        assert!(
            answer.error.is_none() && answer.usage.is_some(),
            "case {i}: {answer:?}"
        );
    }
}

#[tokio::test]
async fn all_pairs_of_sampling_values_end_in_an_answer_or_an_error() {
    let (cluster, _worker) = Cluster::with_worker(config(), Script::new("a")).await;
    type Set = fn(&mut pb::SamplingParams, f32);
    let fields: [Set; 7] = [
        |s, v| s.temperature = Some(v),
        |s, v| s.top_p = Some(v),
        |s, v| s.min_p = Some(v),
        |s, v| s.repetition_penalty = Some(v),
        |s, v| s.presence_penalty = Some(v),
        |s, v| s.frequency_penalty = Some(v),
        |s, v| s.top_k = Some(v as i32),
    ];
    let values = [
        0.0,
        1.0,
        -1.0,
        2.0,
        1e9,
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MIN_POSITIVE,
    ];
    let mut served = 0;
    for (i, first) in fields.iter().enumerate() {
        for second in &fields[i + 1..] {
            for (a, b) in values.iter().flat_map(|&a| values.iter().map(move |&b| (a, b))) {
                let mut request = request(&[7], 1);
                first(sampling(&mut request), a);
                second(sampling(&mut request), b);
                match cluster.generate(request).await {
                    Ok(stream) => {
                        assert_eq!(Answer::read(stream).await.tokens, [expected(&[7], 1)]);
                        served += 1;
                    }
                    Err(status) => assert_eq!(status.code(), Code::InvalidArgument, "{a} {b} {status:?}"),
                }
            }
        }
    }
    assert!(served > 100, "{served}");
}

#[tokio::test]
async fn an_unknown_model_is_not_found_and_every_served_name_is() {
    let (cluster, _worker) = Cluster::with_worker(config(), Script::new("a")).await;
    let named = |name: &str| pb::GenerateRequest {
        model: name.into(),
        ..request(&[5], 2)
    };
    let status = refused(&cluster, named("gpt-17")).await;
    assert_eq!(status.code(), Code::NotFound);
    assert!(status.message().contains("gpt-17") && status.message().contains("tiny-alias"));
    for name in ["", "tiny", "tiny-alias"] {
        Answer::read(cluster.generate(named(name)).await.unwrap()).await;
    }
    let tokenize = pb::TokenizeRequest {
        model: "gpt-17".into(),
        ..Default::default()
    };
    let status = cluster.client.clone().tokenize(tokenize).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
}

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
    output(&mut wanted).logprobs = Some(20);
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

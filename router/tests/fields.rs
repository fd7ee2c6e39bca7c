//! What clients may ask for: every field out of its range, at its edge, and beyond what fits.
//!
//! Proves invariant B2 of ARCHITECTURE.md.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use conclave_proto::v1 as pb;
use conclave_proto::v1::generate_request::Prompt;
use support::{Answer, Cluster, MODEL_LEN, Script, VOCAB, config, expected, refused, request, sampling};
use tonic::Code;
use tonic_types::StatusExt;

type Change = fn(&mut pb::GenerateRequest);

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
    ("sampling.top_p", |r| sampling(r).top_p = Some(1e-40)),
    ("sampling.top_p", |r| sampling(r).top_p = Some(1.01)),
    ("sampling.top_p", |r| sampling(r).top_p = Some(f32::NAN)),
    ("sampling.top_k", |r| sampling(r).top_k = Some(-2)),
    ("sampling.min_p", |r| sampling(r).min_p = Some(-0.1)),
    ("sampling.min_p", |r| sampling(r).min_p = Some(f32::NAN)),
    ("sampling.repetition_penalty", |r| {
        sampling(r).repetition_penalty = Some(0.0)
    }),
    ("sampling.repetition_penalty", |r| {
        sampling(r).repetition_penalty = Some(0.009)
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
    |r| sampling(r).repetition_penalty = Some(0.01),
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

/// Agents shorten a conversation, or ask for less, when they read this reason and these numbers.
#[tokio::test]
async fn a_request_that_is_too_long_has_its_own_reason_and_numbers() {
    let (cluster, _worker) = Cluster::with_worker(config(), Script::new("w")).await;
    let half = MODEL_LEN / 2;
    for (prompt, asked, field, part) in [
        (
            MODEL_LEN,
            10,
            "prompt",
            "4096 tokens: this model's maximum context length is 4096",
        ),
        (
            half,
            half + 1,
            "sampling.max_tokens",
            "which the prompt has 2048: at most 2048 are left",
        ),
        (
            half,
            1_000_000,
            "sampling.max_tokens",
            "maximum context length is 4096",
        ),
    ] {
        let prompt_ids = vec![3; prompt as usize];
        let status = refused(&cluster, request(&prompt_ids, asked.into())).await;
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains(part), "{}", status.message());
        let details = status.get_error_details();
        assert_eq!(details.bad_request().unwrap().field_violations[0].field, field);
        let info = details.error_info().unwrap();
        assert_eq!(info.reason, "CONTEXT_LENGTH_EXCEEDED");
        let number = |name: &str| info.metadata[name].parse::<u32>().unwrap();
        let numbers = ["prompt_tokens", "max_tokens", "limit"].map(number);
        assert_eq!(numbers, [prompt, asked, MODEL_LEN]);
    }
    // The same where the workers hold less than the model could.
    let mut script = Script::new("w");
    script.hello.kv_pages = 8;
    let (cluster, _worker) = Cluster::with_worker(config(), script).await;
    let status = refused(&cluster, request(&[3; 100], 100)).await;
    assert!(
        status
            .message()
            .contains("the KV pages of one worker hold 129 tokens"),
        "{}",
        status.message()
    );
    let details = status.get_error_details();
    assert_eq!(details.error_info().unwrap().metadata["limit"], "129");
}

#[tokio::test]
async fn every_wrong_field_is_named_and_nobody_else_is_disturbed() {
    let (cluster, _worker) =
        Cluster::with_worker(config(), Script::new("a").step(Duration::from_millis(1))).await;
    let healthy = tokio::spawn(Answer::read(cluster.generate(request(&[9], 400)).await.unwrap()));
    for (i, (field, change)) in WRONG.iter().enumerate() {
        let mut wrong = request(&[1, 2, 3], 10);
        change(&mut wrong);
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
    let metrics = cluster.client.clone().metrics(pb::MetricsRequest {}).await;
    let text = metrics.unwrap().into_inner().text;
    assert!(text.contains("reason=\"not_found\"} 1\n"), "{text}");
}

//! Text in and out, with the demo model's tokenizer and template and a scripted worker.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::path::PathBuf;

use conclave_proto::v1 as pb;
use conclave_proto::v1::generate_request::Prompt;
use conclave_router::RouterConfig;
use serde_json::Value;
use support::{Answer, Cluster, Script, config};
use tonic::Code;

fn demo() -> RouterConfig {
    RouterConfig {
        model: PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/demo")),
        skip_tokenizer_init: false,
        ..config()
    }
}

fn text_request(prompt: &str, max_tokens: i64) -> pb::GenerateRequest {
    pb::GenerateRequest {
        prompt: Some(Prompt::Text(prompt.into())),
        ..support::request(&[1], max_tokens)
    }
}

async fn decode(cluster: &Cluster, ids: &[u32]) -> String {
    let request = pb::DetokenizeRequest {
        token_ids: ids.to_vec(),
        ..Default::default()
    };
    cluster
        .client
        .clone()
        .detokenize(request)
        .await
        .unwrap()
        .into_inner()
        .text
}

fn user(text: &str) -> pb::Chat {
    pb::Chat {
        messages: vec![pb::ChatMessage {
            role: "user".into(),
            content: Some(pb::chat_message::Content::Text(text.into())),
            ..Default::default()
        }],
        ..Default::default()
    }
}

#[tokio::test]
async fn text_comes_out_as_the_whole_decode() {
    let (cluster, _worker) = Cluster::with_worker(demo(), Script::new("a")).await;
    let answer = Answer::read(
        cluster
            .generate(text_request("What is an epoch?", 100))
            .await
            .unwrap(),
    )
    .await;
    let special = pb::GenerateRequest {
        output: Some(pb::OutputOptions {
            skip_special_tokens: Some(false),
            ..Default::default()
        }),
        ..text_request("What is an epoch?", 100)
    };
    let whole = Answer::read(cluster.generate(special).await.unwrap()).await;
    assert_eq!(whole.tokens, answer.tokens);
    assert_eq!(whole.text[0], decode(&cluster, &whole.tokens[0]).await);
    assert_eq!(answer.tokens[0].len(), 100);
}

#[tokio::test]
async fn a_stop_string_ends_the_choice_and_frees_its_slot() {
    let (cluster, _worker) = Cluster::with_worker(demo(), Script::new("a")).await;
    let free = Answer::read(
        cluster
            .generate(text_request("Say something", 200))
            .await
            .unwrap(),
    )
    .await;
    let text = &free.text[0];
    let middle = text.char_indices().nth(text.chars().count() / 2).unwrap().0;
    let stop: String = text[middle..].chars().take(6).collect();
    let cut = text.find(&stop).unwrap();
    for include in [false, true] {
        let mut request = text_request("Say something", 4000);
        request.sampling.as_mut().unwrap().stop = vec!["never written".into(), stop.clone()];
        request.output = Some(pb::OutputOptions {
            include_stop_str_in_output: include,
            ..Default::default()
        });
        let answer = Answer::read(cluster.generate(request).await.unwrap()).await;
        let end = if include { cut + stop.len() } else { cut };
        assert_eq!(answer.text[0], text[..end]);
        assert_eq!(answer.reason(0), pb::FinishReason::Stop);
        assert_eq!(answer.finished[0].as_ref().unwrap().stop_reason, stop);
        let tokens = &answer.tokens[0];
        assert_eq!(tokens[..], free.tokens[0][..tokens.len()]);
        assert_eq!(answer.usage.unwrap().completion_tokens as usize, tokens.len());
        cluster.until(|view| view.running == 0).await;
        assert_eq!(cluster.metric("conclave:kv_pages_referenced").await, 0.0);
    }
}

#[tokio::test]
async fn echo_puts_the_prompt_first_and_offsets_count_from_there() {
    let (cluster, _worker) = Cluster::with_worker(demo(), Script::new("a")).await;
    let mut request = text_request("Grüße an alle", 6);
    request.output = Some(pb::OutputOptions {
        echo: true,
        logprobs: Some(1),
        prompt_logprobs: Some(0),
        ..Default::default()
    });
    let answer = Answer::read(cluster.generate(request).await.unwrap()).await;
    let text: Vec<char> = answer.text[0].chars().collect();
    assert!(answer.text[0].starts_with("Grüße an alle"), "{answer:?}");
    let started = answer.started.as_ref().unwrap();
    let entries = started.prompt_logprobs.iter().chain(&answer.logprobs[0]).skip(1);
    let mut last = 0;
    for entry in entries {
        let token = &entry.sampled.as_ref().unwrap().token;
        let offset = entry.text_offset as usize;
        assert!(offset >= last);
        last = offset;
        if let Ok(token) = std::str::from_utf8(token) {
            let here: String = text[offset..].iter().take(token.chars().count()).collect();
            assert!(
                here == token || here.contains('\u{fffd}') || offset == text.len(),
                "{here:?} {token:?}"
            );
        }
    }
    assert!(last >= "Grüße an alle".chars().count());
}

/// How prompts are scored: `echo`, `logprobs` and no token.
#[tokio::test]
async fn an_echo_of_no_tokens_scores_the_prompt_and_shows_nothing_else() {
    let (cluster, _worker) = Cluster::with_worker(demo(), Script::new("a")).await;
    let mut request = text_request("Grüße an alle", 0);
    request.n = 2;
    request.output = Some(pb::OutputOptions {
        echo: true,
        logprobs: Some(1),
        prompt_logprobs: Some(1),
        ..Default::default()
    });
    let answer = Answer::read(cluster.generate(request.clone()).await.unwrap()).await;
    let started = answer.started.as_ref().unwrap();
    assert_eq!(
        started.prompt_logprobs.len(),
        started.prompt_token_ids.len(),
        "{answer:?}"
    );
    for choice in 0..2 {
        assert_eq!(answer.text[choice], "Grüße an alle");
        assert_eq!(answer.tokens[choice], [0_u32; 0]);
        assert!(answer.logprobs[choice].is_empty());
        assert_eq!(answer.reason(choice), pb::FinishReason::Length);
    }
    assert_eq!(answer.usage.unwrap().completion_tokens, 0);
    request.output = None;
    let status = support::refused(&cluster, request).await;
    assert!(
        status
            .message()
            .starts_with("sampling.max_tokens = 0: must be between 1 and"),
        "{status:?}"
    );
}

#[tokio::test]
async fn chats_are_rendered_by_the_template() {
    let (cluster, _worker) = Cluster::with_worker(demo(), Script::new("a")).await;
    let request = pb::TokenizeRequest {
        input: Some(pb::tokenize_request::Input::Chat(user("Hello"))),
        return_token_strs: true,
        ..Default::default()
    };
    let rendered = cluster
        .client
        .clone()
        .tokenize(request)
        .await
        .unwrap()
        .into_inner();
    assert!(rendered.text.contains("Hello"));
    assert_eq!(rendered.token_strs.len(), rendered.token_ids.len());
    assert_eq!(rendered.max_model_len, 32768);
    let chat = pb::GenerateRequest {
        prompt: Some(Prompt::Chat(user("Hello"))),
        ..support::request(&[1], 5)
    };
    let answer = Answer::read(cluster.generate(chat).await.unwrap()).await;
    assert_eq!(answer.started.unwrap().prompt_token_ids, rendered.token_ids);
}

#[tokio::test]
async fn text_that_cannot_fit_is_refused_before_it_is_tokenized() {
    let cluster = Cluster::start(demo()).await;
    let status = cluster
        .generate(text_request(&"x".repeat(6 << 20), 5))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().starts_with("prompt"), "{status:?}");
    let status = cluster
        .generate(text_request(&"1 2 ".repeat(20_000), 5))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("32768"), "{status:?}");
    // The protocol's own bound comes first.
    let status = cluster
        .generate(text_request(&"x".repeat(17 << 20), 5))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
}

#[tokio::test]
async fn sampling_defaults_are_the_checkpoints() {
    let cluster = Cluster::start(demo()).await;
    let info = cluster
        .client
        .clone()
        .model_info(pb::ModelInfoRequest {})
        .await
        .unwrap();
    let info = info.into_inner();
    assert!(info.has_tokenizer);
    assert_eq!((info.vocab_size, info.max_model_len), (3072, 32768));
    assert_eq!(info.family, "minimax_m2");
}

/// A recorded conversation as the wire has it.
fn recorded(case: &Value) -> pb::Chat {
    let string = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let message = |message: &Value| pb::ChatMessage {
        role: string(&message["role"]),
        content: message["content"]
            .as_str()
            .map(|text| pb::chat_message::Content::Text(text.into())),
        reasoning_content: message["reasoning_content"].as_str().map(Into::into),
        tool_calls: message["tool_calls"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|call| pb::ToolCall {
                id: string(&call["id"]),
                name: string(&call["function"]["name"]),
                arguments_json: match &call["function"]["arguments"] {
                    Value::String(text) => text.clone(),
                    object => object.to_string(),
                },
            })
            .collect(),
        tool_call_id: string(&message["tool_call_id"]),
        ..Default::default()
    };
    let tool = |tool: &Value| pb::Tool {
        function_json: tool["function"].to_string(),
        ..Default::default()
    };
    pb::Chat {
        messages: case["messages"].as_array().unwrap().iter().map(message).collect(),
        tools: case["tools"].as_array().into_iter().flatten().map(tool).collect(),
        ..Default::default()
    }
}

#[tokio::test]
async fn recorded_answers_come_out_as_reasoning_content_and_calls() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/demo/prompts.jsonl");
    let mut calls = 0;
    for line in std::fs::read_to_string(path).unwrap().lines() {
        let case: Value = serde_json::from_str(line).unwrap();
        let ids = |value: &Value| -> Vec<u32> { serde_json::from_value(value.clone()).unwrap() };
        if !["tool", "tool result", "chat"].contains(&case["kind"].as_str().unwrap())
            || case["finished"] != true
        {
            continue;
        }
        let mut script = Script::new("a");
        script.forced = Some(ids(&case["completion_ids"]).into());
        let (cluster, _worker) = Cluster::with_worker(demo(), script).await;
        let request = pb::GenerateRequest {
            prompt: Some(Prompt::Chat(recorded(&case))),
            ..Default::default()
        };
        let answer = Answer::read(cluster.generate(request).await.unwrap()).await;
        assert_eq!(answer.tokens[0], ids(&case["completion_ids"]));
        assert_eq!(
            answer.usage.unwrap().prompt_tokens,
            case["prompt_tokens"],
            "{line}"
        );
        let expect = &case["expect"];
        let called = expect["tool_calls"].as_array();
        for (call, expected) in answer.calls[0].iter().zip(called.into_iter().flatten()) {
            assert_eq!(call.0, expected["function"]["name"], "{line}");
            let arguments: Value = serde_json::from_str(&call.1).unwrap();
            assert!(arguments.is_object());
            calls += 1;
        }
        let reason = match answer.calls[0].len() {
            0 => pb::FinishReason::Stop,
            _ => pb::FinishReason::ToolCalls,
        };
        assert_eq!(answer.reason(0), reason);
        assert!(!answer.text[0].contains("<minimax:tool_call>"), "{answer:?}");
        assert!(answer.usage.unwrap().reasoning_tokens > 0 || answer.reasoning[0].is_empty());
    }
    assert!(calls >= 2, "{calls}");
}

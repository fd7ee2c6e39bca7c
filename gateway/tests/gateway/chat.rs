//! Answers of chat completions, whole and streamed; requests are in `chat_request`.

use conclave_proto::v1;
use conclave_proto::v1::FinishReason;
use conclave_proto::v1::generate_response::Event;
use serde_json::{Value, json};

use crate::router::{finished, hello, logprob, start_saying, started, text, usage};

const PATH: &str = "/v1/chat/completions";

pub fn request(extra: Value) -> Value {
    let mut body = json!({"model": "demo", "messages": [{"role": "user", "content": "hi"}]});
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

fn reasoned(index: u32, reasoning: &str, text: &str) -> Event {
    Event::Delta(v1::Delta {
        index,
        reasoning: reasoning.into(),
        text: text.into(),
        token_ids: vec![9],
        ..Default::default()
    })
}

fn call(index: u32, at: u32, id: &str, name: &str, arguments: &str) -> Event {
    let tool_calls = vec![v1::ToolCallDelta {
        index: at,
        id: id.into(),
        name: name.into(),
        arguments: arguments.into(),
    }];
    Event::Delta(v1::Delta {
        index,
        tool_calls,
        token_ids: vec![7],
        ..Default::default()
    })
}

#[tokio::test]
async fn a_whole_answer_has_openais_shape() {
    let setup = start_saying(hello()).await;
    let reply = setup.client.post(PATH, &request(json!({}))).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(reply.header("content-type"), Some("application/json"));
    let mut answer = reply.json();
    let id = answer["id"].as_str().unwrap().to_owned();
    assert_eq!(id, format!("chatcmpl-{}", reply.header("x-request-id").unwrap()));
    assert!(answer["created"].as_u64().unwrap() > 1_700_000_000);
    answer["id"] = json!("x");
    answer["created"] = json!(0);
    assert_eq!(
        answer,
        json!({
            "id": "x", "object": "chat.completion", "created": 0, "model": "demo",
            "choices": [{
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": null},
                "logprobs": null, "finish_reason": "stop", "stop_reason": null,
            }],
            "service_tier": null, "system_fingerprint": null,
            "usage": {
                "prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5,
                "prompt_tokens_details": {"cached_tokens": 1},
                "completion_tokens_details": {"reasoning_tokens": 0},
            },
        })
    );
}

#[tokio::test]
async fn a_stream_has_role_pieces_finish_usage_and_done() {
    let setup = start_saying(hello()).await;
    let body = request(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let reply = setup.client.post(PATH, &body).await;
    assert_eq!(
        reply.header("content-type"),
        Some("text/event-stream; charset=utf-8")
    );
    let chunks = reply.chunks();
    let choices: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"]).collect();
    let choice = |delta: Value, finish: Value| json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish}]);
    assert_eq!(
        choices,
        [
            &choice(json!({"role": "assistant", "content": ""}), Value::Null),
            &choice(json!({"content": "Hel"}), Value::Null),
            &choice(json!({"content": "lo"}), Value::Null),
            &choice(json!({}), json!("stop")),
            &json!([]),
        ]
    );
    let (last, others) = chunks.split_last().unwrap();
    assert!(
        others
            .iter()
            .all(|chunk| chunk.as_object().unwrap().contains_key("usage") && chunk["usage"].is_null())
    );
    assert_eq!(last["usage"]["prompt_tokens_details"]["cached_tokens"], 1);
    assert!(
        chunks
            .iter()
            .all(|chunk| chunk["object"] == "chat.completion.chunk" && chunk["id"] == chunks[0]["id"])
    );
    let plain = setup
        .client
        .post(PATH, &request(json!({"stream": true})))
        .await
        .chunks();
    assert!(
        plain
            .iter()
            .all(|chunk| !chunk.as_object().unwrap().contains_key("usage"))
    );
    let options =
        json!({"stream": true, "stream_options": {"include_usage": true, "continuous_usage_stats": true}});
    let counted = setup.client.post(PATH, &request(options)).await.chunks();
    let totals: Vec<_> = counted
        .iter()
        .map(|chunk| chunk["usage"]["completion_tokens"].as_u64().unwrap())
        .collect();
    assert_eq!(totals, [0, 1, 2, 2, 2]);
}

#[tokio::test]
async fn reasoning_and_tool_calls_are_typed_whole_and_streamed() {
    let events = vec![
        started(&[1]),
        reasoned(0, "let me ", ""),
        reasoned(0, "see", ""),
        text(0, "Calling.", &[3]),
        call(0, 0, "call_1", "add", ""),
        call(0, 0, "", "", "{\"a\":"),
        call(0, 0, "", "", "1}"),
        call(0, 1, "call_2", "sub", "{}"),
        finished(0, FinishReason::ToolCalls),
        usage(1, 7, 0, 2),
    ];
    let setup = start_saying(events).await;
    let answer = setup.client.post(PATH, &request(json!({}))).await.json();
    assert_eq!(
        answer["choices"][0]["message"],
        json!({
            "role": "assistant", "content": "Calling.", "refusal": null,
            "reasoning_content": "let me see", "reasoning": "let me see",
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": "{\"a\":1}"}},
                {"id": "call_2", "type": "function", "function": {"name": "sub", "arguments": "{}"}},
            ],
        })
    );
    assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls");
    assert_eq!(
        answer["usage"]["completion_tokens_details"]["reasoning_tokens"],
        2
    );
    let chunks = setup
        .client
        .post(PATH, &request(json!({"stream": true})))
        .await
        .chunks();
    let deltas: Vec<Value> = chunks[1..]
        .iter()
        .map(|chunk| chunk["choices"][0]["delta"].clone())
        .collect();
    assert_eq!(
        deltas,
        [
            json!({"reasoning_content": "let me ", "reasoning": "let me "}),
            json!({"reasoning_content": "see", "reasoning": "see"}),
            json!({"content": "Calling."}),
            json!({"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "add", "arguments": ""}}]}),
            json!({"tool_calls": [{"index": 0, "function": {"arguments": "{\"a\":"}}]}),
            json!({"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]}),
            json!({"tool_calls": [{"index": 1, "id": "call_2", "type": "function", "function": {"name": "sub", "arguments": "{}"}}]}),
            json!({}),
        ]
    );
}

#[tokio::test]
async fn reasoning_is_left_out_where_it_is_not_wanted() {
    let events = vec![
        started(&[1]),
        reasoned(0, "let me see", ""),
        text(0, "Four.", &[3]),
        finished(0, FinishReason::Stop),
        usage(1, 3, 0, 2),
    ];
    let setup = start_saying(events).await;
    let body = |stream: bool| request(json!({"include_reasoning": false, "stream": stream}));
    let answer = setup.client.post(PATH, &body(false)).await.json();
    let message = json!({"role": "assistant", "content": "Four.", "refusal": null});
    assert_eq!(answer["choices"][0]["message"], message);
    let chunks = setup.client.post(PATH, &body(true)).await.chunks();
    let deltas: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]["delta"]).collect();
    assert_eq!(
        deltas,
        [
            &json!({"role": "assistant", "content": ""}),
            &json!({"content": "Four."}),
            &json!({}),
        ]
    );
}

#[tokio::test]
async fn several_choices_keep_their_index() {
    let events = vec![
        started(&[1]),
        text(1, "b", &[2]),
        text(0, "a", &[3]),
        finished(1, FinishReason::Length),
        finished(0, FinishReason::Stop),
        usage(1, 2, 0, 0),
    ];
    let setup = start_saying(events).await;
    let answer = setup.client.post(PATH, &request(json!({"n": 2}))).await.json();
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 2);
    assert_eq!(
        (&choices[0]["message"]["content"], &choices[0]["finish_reason"]),
        (&json!("a"), &json!("stop"))
    );
    assert_eq!(
        (&choices[1]["message"]["content"], &choices[1]["finish_reason"]),
        (&json!("b"), &json!("length"))
    );
    let chunks = setup
        .client
        .post(PATH, &request(json!({"n": 2, "stream": true})))
        .await
        .chunks();
    let order: Vec<_> = chunks
        .iter()
        .map(|chunk| chunk["choices"][0]["index"].as_u64().unwrap())
        .collect();
    assert_eq!(order, [1, 1, 0, 0, 1, 0]);
}

#[tokio::test]
async fn logprobs_and_token_ids_are_shown_where_asked_for() {
    let entry = v1::TokenLogprobs {
        sampled: Some(logprob(10, "é".as_bytes(), -0.5, 1)),
        top: vec![
            logprob(10, "é".as_bytes(), -0.5, 1),
            logprob(11, b"\xc3", f32::NEG_INFINITY, 2),
        ],
        text_offset: 0,
    };
    let delta = v1::Delta {
        text: "é".into(),
        token_ids: vec![10],
        logprobs: vec![entry],
        ..Default::default()
    };
    let setup = start_saying(vec![
        started(&[1, 2]),
        Event::Delta(delta),
        finished(0, FinishReason::Stop),
        usage(2, 1, 0, 0),
    ])
    .await;
    let body = json!({"logprobs": true, "top_logprobs": 2, "return_token_ids": true});
    let answer = setup.client.post(PATH, &request(body.clone())).await.json();
    let expected = json!({
        "content": [{
            "token": "é", "logprob": -0.5, "bytes": [195, 169],
            "top_logprobs": [
                {"token": "é", "logprob": -0.5, "bytes": [195, 169]},
                {"token": "\u{fffd}", "logprob": -9999.0, "bytes": [195]},
            ],
        }],
        "refusal": null,
    });
    assert_eq!(answer["choices"][0]["logprobs"], expected);
    assert_eq!(answer["choices"][0]["token_ids"], json!([10]));
    assert_eq!(answer["prompt_token_ids"], json!([1, 2]));
    assert_eq!(setup.seen.only().output.unwrap().logprobs, Some(2));
    let mut streamed = body;
    streamed["stream"] = json!(true);
    let chunks = setup.client.post(PATH, &request(streamed)).await.chunks();
    assert_eq!(chunks[0]["prompt_token_ids"], json!([1, 2]));
    assert_eq!(chunks[1]["choices"][0]["logprobs"], expected);
    assert_eq!(chunks[1]["choices"][0]["token_ids"], json!([10]));
    let as_ids = request(json!({"logprobs": true, "return_tokens_as_token_ids": true}));
    let answer = setup.client.post(PATH, &as_ids).await.json();
    assert_eq!(
        answer["choices"][0]["logprobs"]["content"][0]["token"],
        "token_id:10"
    );
}

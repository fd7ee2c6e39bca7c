//! Anthropic's Messages API; its errors are in `anthropic_errors`.

use conclave_proto::v1;
use conclave_proto::v1::FinishReason;
use conclave_proto::v1::chat_message::Content;
use conclave_proto::v1::generate_request::Prompt;
use conclave_proto::v1::generate_response::Event;
use conclave_proto::v1::tokenize_request::Input;
use conclave_proto::v1::tool_choice::Mode;
use serde_json::{Value, json};

use crate::router::{call, finished, hello, piece, start_saying, started, text, usage};

const PATH: &str = "/v1/messages";

pub fn request(extra: Value) -> Value {
    let mut body = json!({"model": "demo", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]});
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

/// Reasoning, a blank line, text, and two calls.
fn agentic() -> Vec<Event> {
    vec![
        started(&[1, 2, 3, 4]),
        piece("let me ", ""),
        piece("see", ""),
        piece("", "\n\n"),
        piece("", "Calling."),
        call(0, "c1", "add", ""),
        call(0, "", "", "{\"a\":"),
        call(0, "", "", "1}"),
        call(1, "c2", "now", ""),
        finished(0, FinishReason::ToolCalls),
        usage(4, 9, 3, 2),
    ]
}

#[tokio::test]
async fn a_whole_message_has_anthropics_shape() {
    let setup = start_saying(agentic()).await;
    let reply = setup.client.post(PATH, &request(json!({}))).await;
    let mut answer = reply.json();
    assert_eq!(
        answer["id"],
        format!("msg_{}", reply.header("request-id").unwrap())
    );
    answer["id"] = json!("x");
    let signature = answer["content"][0]["signature"].take();
    assert_eq!(signature.as_str().unwrap().len(), 64);
    assert_eq!(
        answer,
        json!({
            "id": "x", "type": "message", "role": "assistant", "model": "demo",
            "content": [
                {"type": "thinking", "thinking": "let me see", "signature": null},
                {"type": "text", "text": "Calling."},
                {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}},
                {"type": "tool_use", "id": "c2", "name": "now", "input": {}},
            ],
            "stop_reason": "tool_use", "stop_sequence": null,
            "usage": {
                "input_tokens": 1, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 3,
                "output_tokens": 9,
            },
        })
    );
    let hidden = setup
        .client
        .post(PATH, &request(json!({"thinking": {"type": "disabled"}})))
        .await
        .json();
    assert_eq!(hidden["content"][0]["type"], "text");
}

#[tokio::test]
async fn a_stream_has_anthropics_events_in_their_order() {
    let setup = start_saying(agentic()).await;
    let reply = setup.client.post(PATH, &request(json!({"stream": true}))).await;
    let events = reply.named_events();
    assert!(
        events.iter().all(|(name, data)| data["type"] == *name),
        "{events:?}"
    );
    assert!(!reply.body.contains("[DONE]"));
    let (_, first) = &events[0];
    assert_eq!(first["message"]["usage"]["input_tokens"], 4);
    assert_eq!(
        (&first["message"]["content"], &first["message"]["stop_reason"]),
        (&json!([]), &Value::Null)
    );
    let shown: Vec<Value> = events[1..]
        .iter()
        .map(|(_, data)| {
            let mut data = data.clone();
            if data["delta"]["type"] == "signature_delta" {
                data["delta"]["signature"] = json!("s");
            }
            data
        })
        .collect();
    let start = |index: usize, block: Value| json!({"type": "content_block_start", "index": index, "content_block": block});
    let delta =
        |index: usize, delta: Value| json!({"type": "content_block_delta", "index": index, "delta": delta});
    let stop = |index: usize| json!({"type": "content_block_stop", "index": index});
    assert_eq!(
        shown,
        [
            start(0, json!({"type": "thinking", "thinking": "", "signature": ""})),
            delta(0, json!({"type": "thinking_delta", "thinking": "let me "})),
            delta(0, json!({"type": "thinking_delta", "thinking": "see"})),
            delta(0, json!({"type": "signature_delta", "signature": "s"})),
            stop(0),
            start(1, json!({"type": "text", "text": ""})),
            delta(1, json!({"type": "text_delta", "text": "Calling."})),
            stop(1),
            start(
                2,
                json!({"type": "tool_use", "id": "c1", "name": "add", "input": {}})
            ),
            delta(2, json!({"type": "input_json_delta", "partial_json": "{\"a\":"})),
            delta(2, json!({"type": "input_json_delta", "partial_json": "1}"})),
            stop(2),
            start(
                3,
                json!({"type": "tool_use", "id": "c2", "name": "now", "input": {}})
            ),
            stop(3),
            json!({
                "type": "message_delta",
                "delta": {"stop_reason": "tool_use", "stop_sequence": null},
                "usage": {"input_tokens": 1, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 3, "output_tokens": 9},
            }),
            json!({"type": "message_stop"}),
        ]
    );
    let hidden = request(json!({"stream": true, "thinking": {"type": "disabled"}}));
    let events = setup.client.post(PATH, &hidden).await.named_events();
    assert_eq!(
        (&events[1].1["index"], &events[1].1["content_block"]["type"]),
        (&json!(0), &json!("text"))
    );
}

#[tokio::test]
async fn a_conversation_of_blocks_becomes_a_chat() {
    let setup = start_saying(hello()).await;
    let cache = json!({"type": "ephemeral"});
    let body = request(json!({
        "system": [
            // Claude Code's accounting: another in each conversation, and not for the model.
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197.84c; cc_entrypoint=sdk-cli;"},
            {"type": "text", "text": "be brief", "cache_control": cache},
        ],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": cache}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "xyz"},
                {"type": "text", "text": "Calling "},
                {"type": "text", "text": "now."},
                {"type": "tool_use", "id": "c1", "name": "add", "input": {"b": 2, "a": 1}},
                {"type": "tool_use", "id": "c2", "name": "add", "input": {}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": "3"},
                {"type": "tool_result", "tool_use_id": "c2", "is_error": true, "content": [{"type": "text", "text": "no"}]},
                {"type": "text", "text": "go on"},
            ]},
        ],
        "tools": [{"name": "add", "description": "adds", "input_schema": {"type": "object"}, "cache_control": cache}],
        "tool_choice": {"type": "tool", "name": "add", "disable_parallel_tool_use": true},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "stop_sequences": ["END"], "temperature": 0.5, "top_k": 5, "top_p": 0.5,
        "metadata": {"user_id": "u"}, "service_tier": "auto", "context_management": {"edits": []},
    }));
    let reply = setup.client.post("/v1/messages?beta=true", &body).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    let seen = setup.seen.only();
    let sampling = seen.sampling.unwrap();
    assert_eq!(
        (sampling.max_tokens, sampling.stop.as_slice()),
        (Some(9), &[String::from("END")][..])
    );
    let Some(Prompt::Chat(chat)) = seen.prompt else {
        panic!("no chat")
    };
    let shown: Vec<(String, String)> = chat
        .messages
        .iter()
        .map(|message| {
            let text = match message.content.clone().unwrap() {
                Content::Text(text) => text,
                Content::Parts(parts) => parts.parts.into_iter().map(|part| part.text).collect(),
            };
            (message.role.clone(), text)
        })
        .collect();
    let expected = [
        ("system", "be brief"),
        ("user", "hi"),
        ("assistant", "Calling now."),
        ("tool", "3"),
        ("tool", "no"),
        ("user", "go on"),
    ];
    assert_eq!(
        shown,
        expected.map(|(role, text)| (role.to_owned(), text.to_owned()))
    );
    let assistant = &chat.messages[2];
    assert_eq!(assistant.reasoning_content.as_deref(), Some("hm"));
    assert_eq!(assistant.tool_calls[0].arguments_json, r#"{"b":2,"a":1}"#);
    assert_eq!(
        (
            chat.messages[4].tool_call_id.as_str(),
            chat.messages[4].extra_json.as_str()
        ),
        ("c2", r#"{"is_error":true}"#)
    );
    assert_eq!(
        chat.tools[0].function_json,
        r#"{"name":"add","description":"adds","parameters":{"type":"object"}}"#
    );
    let choice = chat.tool_choice.unwrap();
    assert_eq!(
        (choice.mode(), choice.name.as_str(), chat.parallel_tool_calls),
        (Mode::Named, "add", Some(false))
    );
    assert_eq!(chat.template_kwargs_json, r#"{"enable_thinking":true}"#);
    assert_eq!(
        (chat.continue_final_message, chat.add_generation_prompt),
        (false, None)
    );
}

#[tokio::test]
async fn an_assistant_turn_at_the_end_is_continued() {
    let setup = start_saying(hello()).await;
    let messages =
        json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer is"}]);
    setup
        .client
        .post(PATH, &request(json!({"messages": messages})))
        .await;
    let Some(Prompt::Chat(chat)) = setup.seen.only().prompt else {
        panic!("no chat")
    };
    assert_eq!(
        (chat.continue_final_message, chat.add_generation_prompt),
        (true, Some(false))
    );
}

#[tokio::test]
async fn stop_reasons_are_anthropics() {
    for (reason, stopped_by, expected) in [
        (FinishReason::Stop, "", json!(["end_turn", null])),
        (FinishReason::Stop, "END", json!(["stop_sequence", "END"])),
        (FinishReason::Stop, "200", json!(["end_turn", null])),
        (FinishReason::Length, "", json!(["max_tokens", null])),
    ] {
        let end = v1::Finished {
            reason: reason.into(),
            stop_reason: stopped_by.into(),
            ..Default::default()
        };
        let setup = start_saying(vec![
            started(&[1]),
            text(0, "a", &[2]),
            Event::Finished(end),
            usage(1, 1, 0, 0),
        ])
        .await;
        let answer = setup
            .client
            .post(PATH, &request(json!({"stop_sequences": ["END"]})))
            .await
            .json();
        assert_eq!(json!([answer["stop_reason"], answer["stop_sequence"]]), expected);
    }
}

#[tokio::test]
async fn tokens_are_counted() {
    let setup = start_saying(hello()).await;
    let mut body = request(json!({"system": "s"}));
    body.as_object_mut().unwrap().remove("max_tokens");
    let reply = setup.client.post("/v1/messages/count_tokens", &body).await;
    assert_eq!(reply.json(), json!({"input_tokens": 2}));
    let seen = setup.seen.tokenize.lock().unwrap();
    let Some(Input::Chat(chat)) = &seen[0].input else {
        panic!("no chat")
    };
    assert_eq!(chat.messages.len(), 2);
}

//! Anthropic's Messages API.

use conclave_proto::v1;
use conclave_proto::v1::FinishReason;
use conclave_proto::v1::chat_message::Content;
use conclave_proto::v1::generate_request::Prompt;
use conclave_proto::v1::generate_response::Event;
use conclave_proto::v1::tokenize_request::Input;
use conclave_proto::v1::tool_choice::Mode;
use serde_json::{Value, json};
use tonic::Status;

use crate::router::{Step, finished, hello, say, start, start_saying, start_with, started, text, usage};

const PATH: &str = "/v1/messages";

fn request(extra: Value) -> Value {
    let mut body = json!({"model": "demo", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]});
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

/// Reasoning, a blank line, text, and two calls.
fn agentic() -> Vec<Event> {
    let delta = |reasoning: &str, text: &str| {
        Event::Delta(v1::Delta {
            reasoning: reasoning.into(),
            text: text.into(),
            ..Default::default()
        })
    };
    let call = |index: u32, id: &str, name: &str, arguments: &str| {
        let call = v1::ToolCallDelta {
            index,
            id: id.into(),
            name: name.into(),
            arguments: arguments.into(),
        };
        Event::Delta(v1::Delta {
            tool_calls: vec![call],
            ..Default::default()
        })
    };
    vec![
        started(&[1, 2, 3, 4]),
        delta("let me ", ""),
        delta("see", ""),
        delta("", "\n\n"),
        delta("", "Calling."),
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
        "system": [{"type": "text", "text": "be brief", "cache_control": cache}],
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

#[tokio::test]
async fn errors_have_anthropics_shape_wherever_they_arise() {
    let setup = start_with(
        |config| {
            config.api_keys = vec![String::from("secret")];
            config.limits.body_bytes = 2000;
        },
        |_| Err(Status::resource_exhausted("full")),
    )
    .await;
    let headers = [("x-api-key", "secret"), ("content-type", "application/json")];
    let good = request(json!({})).to_string();
    let cases = [
        (
            "POST",
            PATH,
            &headers[1..],
            good.clone(),
            401,
            "authentication_error",
        ),
        (
            "POST",
            "/v1/messages/batches",
            &headers,
            good.clone(),
            404,
            "not_found_error",
        ),
        (
            "GET",
            PATH,
            &headers[..],
            String::new(),
            405,
            "invalid_request_error",
        ),
        ("POST", PATH, &headers[..], good.clone(), 429, "rate_limit_error"),
        (
            "POST",
            PATH,
            &headers[..],
            "a".repeat(3000),
            413,
            "request_too_large",
        ),
        (
            "POST",
            PATH,
            &headers,
            String::from("{"),
            400,
            "invalid_request_error",
        ),
    ];
    for (method, path, headers, body, status, kind) in cases {
        let reply = setup.client.send(method, path, headers, body.as_bytes()).await;
        let answer = reply.json();
        assert_eq!(reply.status, status, "{reply:?}");
        assert_eq!(
            (&answer["type"], &answer["error"]["type"]),
            (&json!("error"), &json!(kind)),
            "{reply:?}"
        );
        assert_eq!(answer["request_id"], reply.header("x-request-id").unwrap());
    }
}

#[tokio::test]
async fn bad_fields_are_named_in_the_message() {
    let setup = start_saying(hello()).await;
    let user = |content: Value| json!({"messages": [{"role": "user", "content": content}]});
    let assistant = |content: Value| json!({"messages": [{"role": "assistant", "content": content}]});
    for (fields, named) in [
        (json!({"max_tokens": null}), "max_tokens"),
        (json!({"max_tokens": "many"}), "max_tokens"),
        (json!({"messages": []}), "messages"),
        (
            json!({"messages": [{"role": "robot", "content": "a"}]}),
            "messages[0].role",
        ),
        (json!({"messages": [{"role": "user"}]}), "messages[0]"),
        (user(json!(5)), "messages[0].content"),
        (user(json!([])), "messages[0].content"),
        (
            user(json!([{"type": "image", "source": {}}])),
            "messages[0].content[0]",
        ),
        (user(json!([{"type": "text"}])), "messages[0].content[0].text"),
        (
            user(json!([{"type": "tool_result"}])),
            "messages[0].content[0].tool_use_id",
        ),
        (
            user(json!([{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}])),
            "messages[0].content[0].content[0]",
        ),
        (
            assistant(json!([{"type": "tool_use", "id": "a", "name": "b"}])),
            "messages[0].content[0].input",
        ),
        (
            assistant(json!([{"type": "tool_use", "id": "a", "name": "b", "input": []}])),
            "messages[0].content[0].input",
        ),
        (
            assistant(json!([{"type": "tool_use", "name": "b", "input": {}}])),
            "messages[0].content[0].id",
        ),
        (
            assistant(json!([{"type": "server_tool_use"}])),
            "messages[0].content[0]",
        ),
        (json!({"system": [{"type": "image"}]}), "system[0]"),
        (json!({"tools": [{"name": "a"}]}), "tools[0].input_schema"),
        (
            json!({"tools": [{"type": "bash_20250124", "name": "bash"}]}),
            "tools[0].type",
        ),
        (json!({"tool_choice": {"type": "any"}}), "tool_choice"),
        (json!({"tool_choice": {"type": "tool"}}), "tool_choice.name"),
        (json!({"tool_choice": {"type": "some"}}), "tool_choice.type"),
        (json!({"thinking": {"type": "deep"}}), "thinking.type"),
        (json!({"output_format": {"type": "xml"}}), "output_format.type"),
        (json!({"mcp_servers": [{}]}), "mcp_servers"),
        (json!({"temperature": 1e300}), "temperature"),
    ] {
        let reply = setup.client.post(PATH, &request(fields.clone())).await;
        let message = reply.json()["error"]["message"].as_str().unwrap().to_owned();
        assert_eq!(reply.status, 400, "{fields}: {message}");
        assert!(message.starts_with(named), "{fields}: {message}");
    }
    assert!(setup.seen.generate.lock().unwrap().is_empty());
}

#[tokio::test]
async fn silence_is_a_ping_and_a_failure_an_error_event() {
    let setup = start(|_| {
        let mut steps = say(vec![
            started(&[1]),
            Event::KeepAlive(v1::KeepAlive::default()),
            text(0, "a", &[2]),
        ]);
        steps.push(Step::Fail(Status::unavailable("gone")));
        Ok(steps)
    })
    .await;
    let events = setup
        .client
        .post(PATH, &request(json!({"stream": true})))
        .await
        .named_events();
    let names: Vec<_> = events.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        names,
        [
            "message_start",
            "ping",
            "content_block_start",
            "content_block_delta",
            "error"
        ]
    );
    assert_eq!(events.last().unwrap().1["error"]["type"], "overloaded_error");
}

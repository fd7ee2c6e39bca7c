//! OpenAI's Responses API; what it stores is in `responses_stored`.

use conclave_proto::v1::FinishReason;
use conclave_proto::v1::chat_message::Content;
use conclave_proto::v1::generate_request::Prompt;
use conclave_proto::v1::generate_response::Event;
use conclave_proto::v1::structured_output::Kind;
use conclave_proto::v1::tool_choice::Mode;
use serde_json::json;
use tonic::Status;

use crate::router::{
    Setup, Step, call, finished, hello, piece, say, start, start_saying, started, text, usage,
};

const PATH: &str = "/v1/responses";

pub fn agentic() -> Vec<Event> {
    vec![
        started(&[1, 2, 3, 4]),
        piece("let me see", ""),
        piece("", "Call"),
        piece("", "ing."),
        call(0, "c1", "add", "{\"a\""),
        call(0, "", "", ":1}"),
        finished(0, FinishReason::ToolCalls),
        usage(4, 9, 3, 2),
    ]
}

/// The conversation that the last call carried: role, text, reasoning, calls.
pub fn conversation(setup: &Setup) -> Vec<(String, String, String, usize)> {
    let request = setup.seen.generate.lock().unwrap().last().unwrap().clone();
    let Some(Prompt::Chat(chat)) = request.prompt else {
        panic!("no chat")
    };
    chat.messages
        .into_iter()
        .map(|message| {
            let text = match message.content.unwrap() {
                Content::Text(text) => text,
                Content::Parts(parts) => parts.parts.into_iter().map(|part| part.text).collect(),
            };
            (
                message.role,
                text,
                message.reasoning_content.unwrap_or_default(),
                message.tool_calls.len(),
            )
        })
        .collect()
}

pub fn turn(role: &str, text: &str, reasoning: &str, calls: usize) -> (String, String, String, usize) {
    (role.into(), text.into(), reasoning.into(), calls)
}

#[tokio::test]
async fn a_whole_response_has_openais_shape() {
    let setup = start_saying(agentic()).await;
    let tools = json!([{"type": "function", "name": "add", "parameters": {"type": "object"}}]);
    let body = json!({"model": "demo", "input": "hi", "instructions": "be brief", "tools": tools, "metadata": {"a": "b"}});
    let reply = setup.client.post(PATH, &body).await;
    let mut answer = reply.json();
    let id = answer["id"]
        .as_str()
        .unwrap()
        .strip_prefix("resp_")
        .unwrap()
        .to_owned();
    answer["id"] = json!("x");
    answer["created_at"] = json!(0);
    assert_eq!(
        answer,
        json!({
            "id": "x", "object": "response", "created_at": 0, "status": "completed", "background": false,
            "error": null, "incomplete_details": null, "model": "demo",
            "output": [
                {"type": "reasoning", "id": format!("rs_{id}_0"), "summary": [], "status": "completed",
                 "content": [{"type": "reasoning_text", "text": "let me see"}]},
                {"type": "message", "id": format!("msg_{id}_1"), "status": "completed", "role": "assistant",
                 "content": [{"type": "output_text", "text": "Calling.", "annotations": [], "logprobs": []}]},
                {"type": "function_call", "id": format!("fc_{id}_2"), "call_id": "c1", "name": "add",
                 "arguments": "{\"a\":1}", "status": "completed"},
            ],
            "usage": {
                "input_tokens": 4, "input_tokens_details": {"cached_tokens": 3},
                "output_tokens": 9, "output_tokens_details": {"reasoning_tokens": 2}, "total_tokens": 13,
            },
            "service_tier": "default", "truncation": "disabled", "instructions": "be brief",
            "max_output_tokens": null, "metadata": {"a": "b"}, "parallel_tool_calls": true,
            "previous_response_id": null, "reasoning": {"effort": null, "summary": null}, "store": true,
            "temperature": null, "text": {"format": {"type": "text"}}, "tool_choice": "auto",
            "tools": [{"type": "function", "name": "add", "description": null, "parameters": {"type": "object"}, "strict": null}],
            "top_p": null, "user": null,
        })
    );
}

#[tokio::test]
async fn a_stream_has_openais_events_in_their_order() {
    let setup = start_saying(agentic()).await;
    let reply = setup
        .client
        .post(PATH, &json!({"input": "hi", "stream": true}))
        .await;
    let events = reply.named_events();
    let names: Vec<_> = events
        .iter()
        .map(|(name, _)| name.trim_start_matches("response."))
        .collect();
    assert_eq!(
        names,
        [
            "created",
            "in_progress",
            "output_item.added",
            "content_part.added",
            "reasoning_text.delta",
            "reasoning_text.done",
            "content_part.done",
            "output_item.done",
            "output_item.added",
            "content_part.added",
            "output_text.delta",
            "output_text.delta",
            "output_text.done",
            "content_part.done",
            "output_item.done",
            "output_item.added",
            "function_call_arguments.delta",
            "function_call_arguments.delta",
            "function_call_arguments.done",
            "output_item.done",
            "completed",
        ]
    );
    for (at, (name, data)) in events.iter().enumerate() {
        assert_eq!(
            (data["type"].as_str(), data["sequence_number"].as_u64()),
            (Some(name.as_str()), Some(at as u64))
        );
    }
    let whole = &events.last().unwrap().1["response"];
    assert_eq!(events[0].1["response"]["status"], "in_progress");
    assert_eq!(events[7].1["item"], whole["output"][0]);
    assert_eq!(events[14].1["item"], whole["output"][1]);
    assert_eq!(events[19].1["item"], whole["output"][2]);
    assert_eq!(events[12].1["text"], "Calling.");
    assert_eq!(events[18].1["arguments"], "{\"a\":1}");
    assert_eq!(events[10].1["item_id"], whole["output"][1]["id"]);
    assert_eq!(whole["usage"]["total_tokens"], 13);
    let stored = setup
        .client
        .get(&format!("{PATH}/{}", whole["id"].as_str().unwrap()))
        .await;
    assert_eq!(stored.json(), *whole);
}

#[tokio::test]
async fn items_become_a_conversation() {
    let setup = start_saying(agentic()).await;
    let sealed = setup
        .client
        .post(
            PATH,
            &json!({"input": "hi", "store": false, "include": ["reasoning.encrypted_content"]}),
        )
        .await
        .json()["output"][0]["encrypted_content"]
        .clone();
    let input = json!([
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": null, "encrypted_content": sealed},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I call.", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{\"a\":1}"},
        {"type": "function_call", "call_id": "c2", "name": "add", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]},
        {"type": "message", "role": "assistant", "content": "3"},
        {"type": "reasoning", "summary": [], "encrypted_content": "gAAAAforeign"},
        {"role": "user", "content": "and?"},
    ]);
    let body = json!({
        "input": input, "max_output_tokens": 7, "temperature": 0.5, "top_p": 0.9, "parallel_tool_calls": false,
        "tools": [{"type": "function", "name": "add", "description": "adds", "parameters": {"type": "object"}, "strict": true}],
        "tool_choice": {"type": "function", "name": "add"}, "reasoning": {"effort": "low"},
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
        "prompt_cache_key": "k", "service_tier": "auto", "stream_options": {"include_obfuscation": false},
    });
    let reply = setup.client.post(PATH, &body).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(
        reply.json()["tool_choice"],
        json!({"type": "function", "name": "add"})
    );
    assert_eq!(
        conversation(&setup),
        [
            turn("developer", "be brief", "", 0),
            turn("user", "ab", "", 0),
            turn("assistant", "I call.", "let me see", 2),
            turn("tool", "1", "", 0),
            turn("tool", "2", "", 0),
            turn("assistant", "3", "so", 0),
            turn("assistant", "", "", 0),
            turn("user", "and?", "", 0),
        ]
    );
    let seen = setup.seen.generate.lock().unwrap().pop().unwrap();
    let sampling = seen.sampling.unwrap();
    assert_eq!((sampling.max_tokens, sampling.temperature), (Some(7), Some(0.5)));
    assert_eq!(
        seen.structured.unwrap().kind,
        Some(Kind::JsonSchema(r#"{"type":"object"}"#.into()))
    );
    let Some(Prompt::Chat(chat)) = seen.prompt else {
        panic!("no chat")
    };
    assert_eq!(
        chat.tools[0].function_json,
        r#"{"name":"add","description":"adds","parameters":{"type":"object"}}"#
    );
    assert!(chat.tools[0].strict);
    assert_eq!(chat.tool_choice.unwrap().mode(), Mode::Named);
    assert_eq!(chat.template_kwargs_json, r#"{"reasoning_effort":"low"}"#);
}

#[tokio::test]
async fn an_answer_cut_at_its_bound_is_incomplete() {
    let setup = start_saying(vec![
        started(&[1]),
        text(0, "a", &[2]),
        finished(0, FinishReason::Length),
        usage(1, 1, 0, 0),
    ])
    .await;
    let answer = setup.client.post(PATH, &json!({"input": "hi"})).await.json();
    assert_eq!(
        (&answer["status"], &answer["incomplete_details"]["reason"]),
        (&json!("incomplete"), &json!("max_output_tokens"))
    );
    assert_eq!(answer["output"][0]["status"], "incomplete");
    let events = setup
        .client
        .post(PATH, &json!({"input": "hi", "stream": true}))
        .await
        .named_events();
    assert_eq!(events.last().unwrap().0, "response.incomplete");
}

#[tokio::test]
async fn failures_are_statuses_before_the_stream_and_events_in_it() {
    let setup = start(|_| Err(Status::resource_exhausted("full"))).await;
    assert_eq!(
        setup
            .client
            .post(PATH, &json!({"input": "hi", "stream": true}))
            .await
            .status,
        429
    );
    let setup = start(|_| {
        Ok([
            say(vec![started(&[1]), text(0, "a", &[2])]),
            vec![Step::Fail(Status::internal("lost"))],
        ]
        .concat())
    })
    .await;
    let events = setup
        .client
        .post(PATH, &json!({"input": "hi", "stream": true}))
        .await
        .named_events();
    let (name, last) = events.last().unwrap();
    assert_eq!(
        (name.as_str(), &last["response"]["status"]),
        ("response.failed", &json!("failed"))
    );
    assert_eq!(
        last["response"]["error"],
        json!({"code": "internal_error", "message": "lost"})
    );
    let id = last["response"]["id"].as_str().unwrap();
    assert_eq!(setup.client.get(&format!("{PATH}/{id}")).await.status, 404);
}

#[tokio::test]
async fn wrong_fields_are_named() {
    let setup = start_saying(hello()).await;
    for (body, param) in [
        (json!({}), "input"),
        (json!({"input": 5}), "input"),
        (json!({"input": []}), "input"),
        (json!({"input": [{"content": "a"}]}), "input[0].role"),
        (json!({"input": [{"role": "user"}]}), "input[0].content"),
        (
            json!({"input": [{"role": "robot", "content": "a"}]}),
            "input[0].role",
        ),
        (
            json!({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
            "input[0].content[0]",
        ),
        (
            json!({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}),
            "input[0].content[0].text",
        ),
        (
            json!({"input": [{"type": "function_call", "name": "a", "arguments": "{}"}]}),
            "input[0].call_id",
        ),
        (
            json!({"input": [{"type": "function_call_output", "call_id": "a"}]}),
            "input[0].output",
        ),
        (
            json!({"input": [{"type": "item_reference", "id": "fc_a_0"}]}),
            "input[0].id",
        ),
        (
            json!({"input": [{"type": "computer_call", "id": "a"}]}),
            "input[0].type",
        ),
        (
            json!({"input": "a", "tools": [{"type": "namespace", "name": "n", "tools": [{"type": "mcp", "name": "a"}]}]}),
            "tools[0].tools[0].type",
        ),
        (
            json!({"input": "a", "tools": [{"type": "web_search"}]}),
            "tools[0].type",
        ),
        (
            json!({"input": "a", "tools": [{"type": "function"}]}),
            "tools[0].name",
        ),
        (
            json!({"input": "a", "tools": [{"type": "function", "name": "a", "parameters": 5}]}),
            "tools[0].parameters",
        ),
        (json!({"input": "a", "tool_choice": "required"}), "tool_choice"),
        (
            json!({"input": "a", "tool_choice": {"type": "mcp"}}),
            "tool_choice",
        ),
        (
            json!({"input": "a", "text": {"format": {"type": "xml"}}}),
            "text.format.type",
        ),
        (
            json!({"input": "a", "text": {"format": {"type": "json_schema"}}}),
            "text.format.schema",
        ),
        (json!({"input": "a", "metadata": []}), "metadata"),
        (
            json!({"input": "a", "max_output_tokens": 1e30}),
            "max_output_tokens",
        ),
        (json!({"input": "a", "temperature": 1e300}), "temperature"),
        (json!({"input": "a", "background": true}), "background"),
        (json!({"input": "a", "conversation": "c"}), "conversation"),
        (json!({"input": "a", "truncation": "auto"}), "truncation"),
        (json!({"input": "a", "top_logprobs": 3}), "top_logprobs"),
        (
            json!({"input": "a", "previous_response_id": "resp_none"}),
            "previous_response_id",
        ),
    ] {
        let reply = setup.client.post(PATH, &body).await;
        assert_eq!(
            (reply.status, reply.error().2),
            (400, json!(param)),
            "{body}: {reply:?}"
        );
    }
    assert!(setup.seen.generate.lock().unwrap().is_empty());
}

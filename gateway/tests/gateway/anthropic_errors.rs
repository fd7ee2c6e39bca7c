//! Errors in Anthropic's shape: before an answer and in the middle of one.

use conclave_proto::v1;
use conclave_proto::v1::generate_response::Event;
use serde_json::{Value, json};
use tonic::Status;

use crate::anthropic::request;
use crate::router::{Step, hello, say, start, start_saying, start_with, started, text};

const PATH: &str = "/v1/messages";

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

//! The bundled model through HTTP answers as recorded, token for token (issue: end to end on real input).

use conclave_tests::{Client, Server, client::ids, data};
use serde_json::{Value, json};

fn ask(client: &Client, case: &Value) -> Value {
    let mut body = json!({
        "model": "conclave-demo", "messages": case["messages"], "temperature": 0, "max_tokens": 700,
        "return_token_ids": true,
    });
    if !case["tools"].is_null() {
        body["tools"] = case["tools"].clone();
    }
    let answer = client.post("/v1/chat/completions", &body);
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.body
}

fn calls(message: &Value) -> Vec<(String, Value)> {
    let Some(list) = message["tool_calls"].as_array() else {
        return Vec::new();
    };
    let arguments = |call: &Value| match &call["function"]["arguments"] {
        Value::String(text) => serde_json::from_str(text).expect("arguments are JSON"),
        object => object.clone(),
    };
    list.iter()
        .map(|c| {
            (
                c["function"]["name"].as_str().expect("a name").to_string(),
                arguments(c),
            )
        })
        .collect()
}

#[test]
fn recorded_answers_come_back_token_for_token() {
    let server = Server::serve(&[]);
    let client = Client::new(&server.http);
    for kind in ["chat", "tool", "tool result"] {
        for case in data::demo_prompts(kind) {
            let answer = ask(&client, &case);
            let choice = &answer["choices"][0];
            let what = format!("{kind}: {}", case["messages"]);
            assert_eq!(ids(&choice["token_ids"]), ids(&case["completion_ids"]), "{what}");
            assert_eq!(answer["usage"]["prompt_tokens"], case["prompt_tokens"], "{what}");
            let (message, expect) = (&choice["message"], &case["expect"]);
            let text = |v: &Value| v.as_str().unwrap_or_default().trim().to_string();
            assert_eq!(text(&message["content"]), text(&expect["content"]), "{what}");
            assert_eq!(
                text(&message["reasoning_content"]),
                text(&expect["reasoning_content"]),
                "{what}"
            );
            assert_eq!(calls(message), calls(expect), "{what}");
            let finish = if expect["tool_calls"].is_array() {
                "tool_calls"
            } else {
                "stop"
            };
            assert_eq!(choice["finish_reason"], finish, "{what}");
        }
    }
}

#[test]
fn streamed_pieces_add_up_to_the_whole_answer() {
    let server = Server::serve(&[]);
    let client = Client::new(&server.http);
    for case in data::demo_prompts("chat") {
        let whole = ask(&client, &case);
        let body = json!({
            "messages": case["messages"], "temperature": 0, "max_tokens": 700, "stream": true,
            "stream_options": {"include_usage": true},
        });
        let (mut content, mut reasoning, mut usage) = (String::new(), String::new(), Value::Null);
        client.stream("/v1/chat/completions", &body, |_, event| {
            let delta = &event["choices"][0]["delta"];
            content += delta["content"].as_str().unwrap_or_default();
            reasoning += delta["reasoning_content"].as_str().unwrap_or_default();
            if event["usage"].is_object() {
                usage = event["usage"].clone();
            }
        });
        let message = &whole["choices"][0]["message"];
        assert_eq!(content, message["content"].as_str().unwrap_or_default());
        assert_eq!(
            reasoning,
            message["reasoning_content"].as_str().unwrap_or_default()
        );
        assert_eq!(usage["completion_tokens"], whole["usage"]["completion_tokens"]);
    }
}

//! Forced tool calls, and strict tools.

use conclave_tests::{Client, Server};
use serde_json::{Value, json};

use super::{chat, message};

fn tools(strict: bool) -> Value {
    json!([
        {"type": "function", "function": {"name": "get_weather", "strict": strict, "parameters": {
            "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["c", "f"]}},
            "required": ["city", "days", "unit"], "additionalProperties": false}}},
        {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
    ])
}

#[test]
fn tool_choice_forces_calls_and_strict_tools_type_them() {
    let server = Server::serve(&["--workers", "1"]);
    let client = Client::new(&server.http);
    let call = |choice: &Value| -> Vec<(String, Value)> {
        assert_eq!(choice["finish_reason"], "tool_calls", "{choice}");
        let calls = choice["message"]["tool_calls"].as_array().expect("calls");
        let arguments = |call: &Value| {
            let text = call["function"]["arguments"].as_str().expect("arguments");
            serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
        };
        let name = |call: &Value| call["function"]["name"].as_str().expect("a name").to_owned();
        calls.iter().map(|call| (name(call), arguments(call))).collect()
    };
    let auto = message(&client, &chat(json!({"tools": tools(false)})));
    assert_eq!(
        auto["finish_reason"], "stop",
        "left to itself it says hello: {auto}"
    );
    let required =
        chat(json!({"tools": tools(true), "tool_choice": "required", "parallel_tool_calls": false}));
    let calls = call(&message(&client, &required));
    assert_eq!(calls.len(), 1, "{calls:?}");
    for named in ["get_weather", "now"] {
        let choice = json!({"type": "function", "function": {"name": named}});
        let body = chat(json!({"tools": tools(true), "tool_choice": choice, "parallel_tool_calls": false}));
        let calls = call(&message(&client, &body));
        assert_eq!(calls.len(), 1, "{calls:?}");
        assert_eq!(calls[0].0, named);
        if named == "get_weather" {
            let arguments = &calls[0].1;
            assert!(
                arguments["city"].is_string() && arguments["days"].is_i64(),
                "{arguments}"
            );
            assert!(
                ["c", "f"].contains(&arguments["unit"].as_str().unwrap_or_default()),
                "{arguments}"
            );
        }
    }
    let none = message(
        &client,
        &chat(json!({"tools": tools(true), "tool_choice": "none"})),
    );
    assert!(
        none["message"].get("tool_calls").is_none() && none["finish_reason"] == "stop",
        "{none}"
    );
    // Where calls are allowed, an answer of some form is one of two outputs.
    let either = message(
        &client,
        &chat(json!({"tools": tools(false), "response_format": {"type": "json_object"}})),
    );
    let content = either["message"]["content"]
        .as_str()
        .map(serde_json::from_str::<Value>);
    assert!(
        either["finish_reason"] == "tool_calls" || content.is_some_and(|json| json.is_ok()),
        "{either}"
    );
    let both = client.post(
        "/v1/chat/completions",
        &chat(json!({"tools": tools(false), "tool_choice": "required", "response_format": {"type": "json_object"}})),
    );
    assert_eq!(
        (both.status, &both.body["error"]["param"]),
        (400, &json!("response_format")),
        "{}",
        both.body
    );
}

/// What a custom tool of the Responses API is given has the form that its grammar says.
#[test]
fn a_custom_tools_input_follows_its_grammar() {
    let server = Server::serve(&["--workers", "1"]);
    let client = Client::new(&server.http);
    let ask = |syntax: &str, definition: &str, strict: bool| {
        let format = json!({"type": "grammar", "syntax": syntax, "definition": definition});
        let body = json!({
            "input": "hi", "temperature": 0,
            "tools": [{"type": "web_search"}, {"type": "custom", "name": "order", "format": format, "strict": strict}],
            "tool_choice": {"type": "custom", "name": "order"}, "parallel_tool_calls": false,
        });
        client.post("/v1/responses", &body)
    };
    let input = |syntax: &str, definition: &str| -> String {
        let answer = ask(syntax, definition, false);
        assert_eq!(answer.status, 200, "{}", answer.body);
        let call = answer.body["output"].as_array().and_then(|items| items.last());
        let call = call.filter(|item| item["type"] == "custom_tool_call");
        let input = call.and_then(|call| call["input"].as_str());
        input
            .unwrap_or_else(|| panic!("no call: {}", answer.body))
            .to_owned()
    };
    let number = input("regex", "^[1-9][0-9]{3}/[ab]$");
    let (digits, letter) = number.split_once('/').expect("a slash");
    assert!(
        digits.len() == 4 && digits.parse::<u32>().is_ok() && ["a", "b"].contains(&letter),
        "{number:?}"
    );
    let lark =
        "start: line line+ \"end\"\nline: (\"add\" | \"drop\") \" \" /[a-z]{1,8}/ LF\n%import common.LF";
    let lines = input("lark", lark);
    let (body, end) = lines.rsplit_once('\n').expect("lines");
    assert_eq!(end, "end", "{lines:?}");
    for line in body.lines() {
        let (word, name) = line.split_once(' ').expect("two words");
        assert!(["add", "drop"].contains(&word) && !name.is_empty(), "{lines:?}");
    }
    let answer = ask("lark", "start: \"(\" start? \")\"", true);
    let error = &answer.body["error"];
    assert_eq!(
        (answer.status, error["param"].as_str()),
        (400, Some("tools[1].format.definition")),
        "{error}"
    );
}

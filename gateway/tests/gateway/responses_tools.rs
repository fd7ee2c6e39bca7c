//! Tools of the Responses API that are no functions, as coding agents send them.

use conclave_proto::v1::FinishReason;
use conclave_proto::v1::chat_message::Content;
use conclave_proto::v1::generate_request::Prompt;
use conclave_proto::v1::generate_response::Event;
use conclave_proto::v1::tool_choice::Mode;
use serde_json::{Value, json};

use crate::router::{Setup, call, finished, hello, start_saying, started, usage};

const PATH: &str = "/v1/responses";
const PATCH: &str = "*** Begin Patch\n+\"é\"\n";

/// What a coding agent lists: its own functions and a free-form tool, a server of tools, and what it hopes for.
fn tools() -> Value {
    json!([
        {"type": "function", "name": "shell", "parameters": {"type": "object"}, "strict": false},
        {"type": "custom", "name": "apply_patch", "description": "Edits files.",
         "format": {"type": "grammar", "syntax": "lark", "definition": "start: \"x\"+"}},
        {"type": "web_search", "external_web_access": false},
        {"type": "namespace", "name": "mcp__docs", "description": "Docs", "tools": [
            {"type": "function", "name": "find", "parameters": {"type": "object"}}]},
        {"type": "image_generation", "output_format": "png"},
    ])
}

fn calls() -> Vec<Event> {
    let input = json!({"input": PATCH}).to_string();
    let (head, tail) = input.split_at(13);
    vec![
        started(&[1]),
        call(0, "c1", "apply_patch", head),
        call(0, "", "", tail),
        call(1, "c2", "mcp__docs.find", "{}"),
        finished(0, FinishReason::ToolCalls),
        usage(1, 2, 0, 0),
    ]
}

fn items(response: &Value) -> Vec<Value> {
    let item = |item: &Value| {
        let mut item = item.clone();
        item.as_object_mut().unwrap().remove("id").unwrap();
        item
    };
    response["output"].as_array().unwrap().iter().map(item).collect()
}

fn expected() -> [Value; 2] {
    [
        json!({"type": "custom_tool_call", "call_id": "c1", "name": "apply_patch", "input": PATCH, "status": "completed"}),
        json!({"type": "function_call", "call_id": "c2", "namespace": "mcp__docs", "name": "find", "arguments": "{}",
               "status": "completed"}),
    ]
}

fn chat(setup: &Setup) -> conclave_proto::v1::Chat {
    let request = setup.seen.generate.lock().unwrap().last().unwrap().clone();
    match request.prompt {
        Some(Prompt::Chat(chat)) => chat,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_custom_tool_is_a_function_to_the_model_alone() {
    let setup = start_saying(calls()).await;
    let choice = json!({"type": "custom", "name": "apply_patch"});
    let body = json!({"input": "hi", "tools": tools(), "tool_choice": choice});
    let reply = setup.client.post(PATH, &body).await;
    let response = reply.json();
    assert_eq!(items(&response), expected(), "{response}");
    let kinds = |list: &Value| -> Vec<Value> {
        list.as_array()
            .unwrap()
            .iter()
            .map(|tool| tool["type"].clone())
            .collect()
    };
    assert_eq!(
        kinds(&response["tools"]),
        ["function", "custom", "namespace"],
        "what the model was shown"
    );
    assert_eq!(response["tool_choice"], choice);
    let chat = chat(&setup);
    let shown: Vec<Value> = chat
        .tools
        .iter()
        .map(|tool| serde_json::from_str(&tool.function_json).unwrap())
        .collect();
    let names: Vec<&Value> = shown.iter().map(|tool| &tool["name"]).collect();
    assert_eq!(names, ["shell", "apply_patch", "mcp__docs.find"]);
    let description = shown[1]["description"].as_str().unwrap();
    assert!(
        description.starts_with("Edits files.") && description.contains("start: \"x\"+"),
        "{description}"
    );
    assert_eq!(shown[1]["parameters"]["required"], json!(["input"]));
    let grammars: Vec<&str> = chat.tools.iter().map(|tool| tool.grammar.as_str()).collect();
    assert_eq!(grammars, ["", "start: \"x\"+", ""]);
    let choice = chat.tool_choice.unwrap();
    assert_eq!(
        (choice.mode(), choice.name.as_str()),
        (Mode::Named, "apply_patch")
    );
}

#[tokio::test]
async fn a_custom_call_streams_its_input_as_text() {
    let setup = start_saying(calls()).await;
    let body = json!({"input": "hi", "tools": tools(), "stream": true});
    let events = setup.client.post(PATH, &body).await.named_events();
    let of = |name: &str| -> Vec<&Value> {
        events
            .iter()
            .filter(|(found, _)| found == name)
            .map(|(_, event)| event)
            .collect()
    };
    let deltas: Vec<&str> = of("response.custom_tool_call_input.delta")
        .iter()
        .map(|event| event["delta"].as_str().unwrap())
        .collect();
    assert_eq!(deltas, [&PATCH[..3], &PATCH[3..]], "as the arguments come");
    let done = of("response.custom_tool_call_input.done");
    assert_eq!(done.len(), 1);
    assert_eq!(done[0]["input"], PATCH);
    assert!(done[0]["item_id"].as_str().unwrap().starts_with("ctc_"));
    let added = of("response.output_item.added");
    assert_eq!(
        (&added[0]["item"]["type"], &added[0]["item"]["input"]),
        (&json!("custom_tool_call"), &json!(""))
    );
    assert_eq!(of("response.function_call_arguments.done")[0]["name"], "find");
    let (_, last) = events.last().unwrap();
    assert_eq!(items(&last["response"]), expected());
}

#[tokio::test]
async fn calls_and_their_outputs_come_back_as_the_model_wrote_them() {
    let setup = start_saying(hello()).await;
    let [mut custom, mut function] = expected();
    (custom["id"], function["id"]) = (json!("ctc_1"), json!("fc_1"));
    let input = json!([
        {"role": "user", "content": "hi"}, custom, function,
        {"type": "custom_tool_call_output", "call_id": "c1", "output": "Done."},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "none"}]},
    ]);
    let reply = setup
        .client
        .post(PATH, &json!({"input": input, "tools": tools()}))
        .await;
    assert_eq!(reply.status, 200, "{reply:?}");
    let messages = chat(&setup).messages;
    let roles: Vec<&str> = messages.iter().map(|message| message.role.as_str()).collect();
    assert_eq!(roles, ["user", "assistant", "tool", "tool"]);
    let calls = &messages[1].tool_calls;
    assert_eq!(calls[0].arguments_json, json!({"input": PATCH}).to_string());
    assert_eq!(calls[1].name, "mcp__docs.find");
    assert_eq!(messages[2].content, Some(Content::Text("Done.".into())));
}

#[tokio::test]
async fn what_a_client_would_have_to_run_in_another_way_is_refused_by_name() {
    let setup = start_saying(hello()).await;
    let grammar = |format: Value| json!([{"type": "custom", "name": "a", "format": format}]);
    for (tools, param) in [
        (json!([{"type": "local_shell"}]), "tools[0].type"),
        (json!([{"type": "apply_patch"}]), "tools[0].type"),
        (json!([{"type": "custom"}]), "tools[0].name"),
        (
            json!([{"type": "web_search"}, {"type": "custom"}]),
            "tools[1].name",
        ),
        (grammar(json!({"type": "xml"})), "tools[0].format.type"),
        (
            grammar(json!({"type": "grammar", "syntax": "ebnf", "definition": "a"})),
            "tools[0].format.syntax",
        ),
        (
            grammar(json!({"type": "grammar", "syntax": "lark"})),
            "tools[0].format.definition",
        ),
        (json!([{"type": "namespace", "tools": []}]), "tools[0].name"),
        (
            json!([{"type": "namespace", "name": "n", "tools": [{"type": "mcp"}]}]),
            "tools[0].tools[0].type",
        ),
    ] {
        let reply = setup
            .client
            .post(PATH, &json!({"input": "a", "tools": tools}))
            .await;
        assert_eq!((reply.status, reply.error().2), (400, json!(param)), "{reply:?}");
    }
    let alone = json!({"input": "a", "tools": [{"type": "web_search"}], "tool_choice": "required"});
    assert_eq!(setup.client.post(PATH, &alone).await.error().2, "tools[0].type");
    let without = json!({"input": [{"type": "custom_tool_call", "call_id": "a", "name": "b"}]});
    assert_eq!(
        setup.client.post(PATH, &without).await.error().2,
        "input[0].input"
    );
    assert!(setup.seen.generate.lock().unwrap().is_empty());
}

/// As Codex offers tools.
#[tokio::test]
async fn functions_may_be_in_namespaces_and_a_search_is_left_out_beside_them() {
    let said = vec![
        started(&[1]),
        call(0, "c1", "agents.spawn", "{}"),
        call(1, "c2", "plain.name", "{}"),
        finished(0, FinishReason::ToolCalls),
        usage(1, 1, 0, 0),
    ];
    let setup = start_saying(said).await;
    let spawn = json!({"type": "function", "name": "spawn", "description": "begins one", "parameters": {"type": "object"}});
    let body = json!({
        "input": [
            {"role": "user", "content": "go"},
            {"type": "function_call", "call_id": "c0", "namespace": "agents", "name": "spawn", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c0", "output": "done"},
        ],
        "tools": [
            {"type": "namespace", "name": "agents", "description": "Helpers.", "tools": [spawn, {"type": "function", "name": "stop"}]},
            {"type": "web_search", "external_web_access": false},
        ],
        "tool_choice": {"type": "function", "namespace": "agents", "name": "spawn"},
    });
    let answer = setup.client.post(PATH, &body).await.json();
    let names: Vec<_> = answer["output"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| (&item["namespace"], &item["name"]))
        .collect();
    assert_eq!(
        names,
        [
            (&json!("agents"), &json!("spawn")),
            (&Value::Null, &json!("plain.name"))
        ]
    );
    assert_eq!(answer["tools"].as_array().unwrap().len(), 1, "{answer}");
    assert_eq!(answer["tool_choice"], body["tool_choice"]);
    let chat = chat(&setup);
    assert_eq!(chat.tool_choice.unwrap().name, "agents.spawn");
    assert_eq!(chat.messages[1].tool_calls[0].name, "agents.spawn");
    let functions: Vec<&str> = chat
        .tools
        .iter()
        .map(|tool| tool.function_json.as_str())
        .collect();
    assert_eq!(
        functions,
        [
            r#"{"name":"agents.spawn","description":"Helpers.\n\nbegins one","parameters":{"type":"object"}}"#,
            r#"{"name":"agents.stop"}"#,
        ]
    );
}

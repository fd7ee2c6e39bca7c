//! `conclave render` and `conclave parse` on every template case and every parser case, and what they refuse.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// A refusal comes well within this time, on a busy machine too: templates end after 100 ms of processor time.
const REFUSED_WITHIN: Duration = Duration::from_secs(60);

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

fn demo() -> String {
    repository("models/demo").display().to_string()
}

fn conclave(arguments: &[&str], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_conclave"))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut stdin = child.stdin.take().expect("piped");
    // A command that refuses its flags does not read.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    child.wait_with_output().expect("ends")
}

fn printed(arguments: &[&str], input: &str) -> String {
    let output = conclave(arguments, input);
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn refused(arguments: &[&str], input: &str) -> String {
    let started = Instant::now();
    let output = conclave(arguments, input);
    assert!(started.elapsed() < REFUSED_WITHIN, "{arguments:?}");
    assert_eq!(output.status.code(), Some(1), "{arguments:?}");
    assert!(output.stdout.is_empty());
    String::from_utf8(output.stderr).expect("UTF-8")
}

fn cases(file: &str) -> Vec<Value> {
    let text = fs::read_to_string(repository("tests/data/text").join(file)).expect("cases");
    text.lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect()
}

/// Arguments as clients send them: JSON in a string.
fn as_clients_send(messages: &Value) -> Value {
    let mut messages = messages.clone();
    for message in messages.as_array_mut().expect("a list") {
        let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
        for call in calls.into_iter().flatten() {
            let arguments = match call.get("function") {
                Some(function) => function["arguments"].to_string(),
                None => call["arguments"].to_string(),
            };
            let name = call.get("function").unwrap_or(call)["name"].clone();
            *call =
                json!({"id": "x", "type": "function", "function": {"name": name, "arguments": arguments}});
        }
    }
    messages
}

#[test]
fn every_template_case_renders_exactly() {
    let template = repository("tests/data/text/chat_template.jinja")
        .display()
        .to_string();
    let model = demo();
    let cases = cases("template_cases.jsonl");
    assert_eq!(cases.len(), 8);
    for case in cases {
        let mut request = json!({
            "messages": as_clients_send(&case["messages"]),
            "add_generation_prompt": case["add_generation_prompt"],
        });
        if case["tools"].is_array() {
            request["tools"] = case["tools"].clone();
        }
        let arguments = ["render", "--model", &model, "--chat-template", &template];
        let text = printed(&arguments, &request.to_string());
        assert_eq!(text, case["expect"].as_str().expect("text"), "{}", case["name"]);
    }
}

#[test]
fn tokens_are_ids_and_markers_are_single_ones() {
    let request = json!({"messages": [{"role": "user", "content": "Hello </think>"}]}).to_string();
    let model = demo();
    let ids: Vec<u32> =
        serde_json::from_str(&printed(&["render", &model, "--tokens"], &request)).expect("a list of ids");
    // Document start, turn starts and <think> of the template; what the user wrote is no marker.
    assert_eq!(ids[0], 3069);
    assert_eq!(ids.iter().filter(|id| **id == 3070).count(), 3);
    assert_eq!(ids.iter().filter(|id| **id == 3063).count(), 1);
    assert_eq!(ids.iter().filter(|id| **id == 3064).count(), 0);
}

fn words(value: &Value) -> String {
    let text = value.as_str().unwrap_or_default();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn every_parser_case_parses_whole_and_cut_at_every_byte() {
    let folder = tempfile::tempdir().expect("temporary directory");
    let tools = folder.path().join("tools.json");
    let (file, model) = (tools.display().to_string(), demo());
    let cases = cases("tool_parser_cases.jsonl");
    assert_eq!(cases.len(), 36);
    for case in cases {
        let name = &case["name"];
        fs::write(&tools, case["tools"].to_string()).expect("writes");
        let raw = case["output"].as_str().expect("text");
        let whole = printed(&["parse", "--model", &model, "--tools", &file], raw);
        let cut = printed(
            &["parse", "--model", &model, "--tools", &file, "--cut-every-byte"],
            raw,
        );
        assert_eq!(whole, cut, "{name}");
        let parsed: Value = serde_json::from_str(&whole).expect("JSON");
        let expect = &case["expect"];
        assert_eq!(words(&parsed["reasoning"]), words(&expect["reasoning"]), "{name}");
        assert_eq!(words(&parsed["content"]), words(&expect["content"]), "{name}");
        let calls = expect["tool_calls"].as_array().expect("a list");
        let calls: Vec<Value> = calls
            .iter()
            .map(|call| json!({"name": call["name"], "arguments": call["arguments"]}))
            .collect();
        // As text: order of keys and digits count.
        assert_eq!(
            parsed["tool_calls"].to_string(),
            json!(calls).to_string(),
            "{name}"
        );
    }
}

#[test]
fn parsers_are_chosen_by_flags() {
    let folder = tempfile::tempdir().expect("temporary directory");
    let tools = folder.path().join("tools.json");
    fs::write(&tools, r#"[{"type": "function", "function": {"name": "f"}}]"#).expect("writes");
    let (file, model) = (tools.display().to_string(), demo());
    let raw = "<think>a</think>b<tool_call>{\"name\": \"f\", \"arguments\": {\"x\": 1.10}}</tool_call>";
    let flags = ["--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"];
    let arguments = [&["parse", &model, "--tools", &file][..], &flags].concat();
    let expect =
        r#"{"reasoning": "a", "content": "b", "tool_calls": [{"name": "f", "arguments": {"x": 1.10}}]}"#;
    assert_eq!(printed(&arguments, raw).trim_end(), expect);
    let none = [
        "parse",
        &model,
        "--tools",
        &file,
        "--tool-call-parser=none",
        "--reasoning-parser=none",
    ];
    let parsed: Value = serde_json::from_str(&printed(&none, raw)).expect("JSON");
    assert_eq!(
        (parsed["content"].as_str(), &parsed["tool_calls"]),
        (Some(raw), &json!([]))
    );
    let unknown = refused(&["parse", &model, "--tool-call-parser", "hermes9"], raw);
    assert!(
        unknown.contains("tool_call_parser") && unknown.contains("hermes9"),
        "{unknown}"
    );
}

#[test]
fn a_call_cut_at_max_tokens_is_shown_as_the_text_it_is() {
    let folder = tempfile::tempdir().expect("temporary directory");
    let tools = folder.path().join("tools.json");
    fs::write(
        &tools,
        r#"[{"function": {"name": "f", "parameters": {"properties": {"s": {"type": "string"}}}}}]"#,
    )
    .expect("writes");
    let (file, model) = (tools.display().to_string(), demo());
    let raw = "</think><minimax:tool_call><invoke name=\"f\"><parameter name=\"s\">half";
    for cut in [&[][..], &["--cut-every-byte"]] {
        let arguments = [
            &["parse", &model, "--tools", &file, "--finish-reason=length"][..],
            cut,
        ]
        .concat();
        let parsed: Value = serde_json::from_str(&printed(&arguments, raw)).expect("JSON");
        assert_eq!(
            parsed["tool_calls"],
            json!([{"name": "f", "arguments": "{\"s\": \"half"}])
        );
        let arguments = [&["parse", &model, "--tools", &file][..], cut].concat();
        let parsed: Value = serde_json::from_str(&printed(&arguments, raw)).expect("JSON");
        assert_eq!(
            parsed["tool_calls"],
            json!([{"name": "f", "arguments": {"s": "half"}}])
        );
    }
}

#[test]
fn template_bombs_are_clear_errors_in_time() {
    let folder = tempfile::tempdir().expect("temporary directory");
    let file = folder.path().join("bomb.jinja");
    let (template, model) = (file.display().to_string(), demo());
    let request = r#"{"messages": [{"role": "user", "content": "hi"}]}"#;
    for (source, problem) in [
        (
            "{% for a in range(999) %}{% for b in range(999) %}{% for c in range(999) %}{% endfor %}{% endfor %}{% endfor %}",
            "too many steps",
        ),
        ("{{ '-' * 10000000000 }}", "messages: "),
        ("{{ messages | tojson(indent=1000000000) }}", "messages: "),
        ("{% include 'chat_template' %}", "messages: "),
        (
            "{% for i in range(100) %}{{ 'a' * 1000000 }}{% endfor %}",
            "chat template",
        ),
    ] {
        fs::write(&file, source).expect("writes");
        let error = refused(&["render", &model, "--chat-template", &template], request);
        assert!(error.contains(problem), "{source}: {error}");
    }
}

#[test]
fn requests_that_cannot_be_rendered_name_the_field() {
    let model = demo();
    for (request, problem) in [
        ("{}", "messages"),
        ("[]", "object"),
        (
            r#"{"messages": [{"role": "tool", "tool_call_id": "x", "content": "1"}]}"#,
            "tool role",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}"#,
            "tools[0].function",
        ),
    ] {
        let error = refused(&["render", "--model", &model], request);
        assert!(error.contains(problem), "{request}: {error}");
    }
    assert!(refused(&["parse", &model, "--tools", "/nowhere.json"], "x").contains("/nowhere.json"));
}

//! Output held to a form: every spelling of every kind, forced tool calls, preemption, the loss of a worker, and
//! constraints that no server should have to compile.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use conclave_tests::{Client, Server, metrics, server::signal};
use serde_json::{Value, json};

/// A refusal costs at most so much processor time, of router and gateway with all they do; the compiler's own bound of
/// one second has its test beside it.
const REFUSED_WITHIN: Duration = Duration::from_secs(5);
/// A loss is noticed by then, on a busy machine of two cores.
const WITHIN: Duration = Duration::from_secs(120);

fn completion(extra: Value) -> Value {
    let mut body = json!({"prompt": "The answer is", "temperature": 0, "max_tokens": 60});
    merge(&mut body, extra);
    body
}

fn chat(extra: Value) -> Value {
    let mut body =
        json!({"messages": [{"role": "user", "content": "Hello!"}], "temperature": 0, "max_tokens": 400});
    merge(&mut body, extra);
    body
}

fn merge(body: &mut Value, extra: Value) {
    for (key, value) in extra.as_object().expect("an object") {
        body[key] = value.clone();
    }
}

fn text(client: &Client, body: &Value) -> String {
    let answer = client.post("/v1/completions", body);
    assert_eq!(answer.status, 200, "{body}: {}", answer.body);
    let choice = &answer.body["choices"][0];
    assert_eq!(choice["finish_reason"], "stop", "{body}: {choice}");
    choice["text"].as_str().expect("text").to_owned()
}

fn message(client: &Client, body: &Value) -> Value {
    let answer = client.post("/v1/chat/completions", body);
    assert_eq!(answer.status, 200, "{body}: {}", answer.body);
    answer.body["choices"][0].clone()
}

fn tools(strict: bool) -> Value {
    json!([
        {"type": "function", "function": {"name": "get_weather", "strict": strict, "parameters": {
            "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["c", "f"]}},
            "required": ["city", "days", "unit"], "additionalProperties": false}}},
        {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
    ])
}

#[test]
fn every_spelling_of_every_kind_holds_the_output() {
    let server = Server::serve(&["--workers", "2"]);
    let client = Client::new(&server.http);
    for extra in [
        json!({"structured_outputs": {"choice": ["blue sky", "red sky"]}}),
        json!({"guided_choice": ["blue sky", "red sky"]}),
    ] {
        assert!(["blue sky", "red sky"].contains(&text(&client, &completion(extra)).as_str()));
    }
    for extra in [
        json!({"structured_outputs": {"regex": "[a-f]{3}-[0-9]{2,4}"}}),
        json!({"guided_regex": "^[a-f]{3}-[0-9]{2,4}$"}),
    ] {
        let text = text(&client, &completion(extra));
        let (letters, digits) = text.split_once('-').expect("a dash");
        assert!(
            letters.len() == 3 && letters.bytes().all(|b| (b'a'..=b'f').contains(&b)),
            "{text}"
        );
        assert!(
            (2..=4).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit()),
            "{text}"
        );
    }
    for extra in [
        json!({"structured_outputs": {"grammar": "start: \"<\" (\"a\" | \"b\")~2..4 \">\""}}),
        json!({"guided_grammar": "root ::= \"<\" part part \">\"\npart ::= \"a\" | \"b\""}),
    ] {
        let text = text(&client, &completion(extra));
        let inner = text.strip_prefix('<').and_then(|rest| rest.strip_suffix('>'));
        let inner = inner.unwrap_or_else(|| panic!("{text}"));
        assert!(
            (2..=4).contains(&inner.len()) && inner.bytes().all(|b| b == b'a' || b == b'b'),
            "{text}"
        );
    }
    let schema = json!({"type": "object", "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
        "required": ["sum", "ok"], "additionalProperties": false});
    for extra in [
        json!({"structured_outputs": {"json": schema}}),
        json!({"guided_json": schema}),
        json!({"guided_json": schema.to_string()}),
    ] {
        holds(&text(&client, &completion(extra)));
    }
    let strict =
        json!({"type": "json_schema", "json_schema": {"name": "sum", "strict": true, "schema": schema}});
    let choice = message(&client, &chat(json!({"response_format": strict})));
    holds(choice["message"]["content"].as_str().expect("content"));
    assert!(
        choice["message"]["reasoning_content"].is_string(),
        "reasoning is free: {choice}"
    );
    let choice = message(
        &client,
        &chat(json!({"response_format": {"type": "json_object"}})),
    );
    let content = choice["message"]["content"].as_str().expect("content");
    let object = serde_json::from_str::<Value>(content).unwrap_or_else(|error| panic!("{error}: {content}"));
    assert!(object.is_object(), "{content}");
    let plain = message(&client, &chat(json!({"response_format": {"type": "text"}})));
    assert_eq!(plain, message(&client, &chat(json!({}))), "text is no constraint");

    // Several choices each follow their own; sampling, log-probabilities and streams are as ever.
    let body =
        completion(json!({"n": 4, "temperature": 1, "seed": 5, "logprobs": 2, "guided_regex": "[0-9]{5}"}));
    let answer = client.post("/v1/completions", &body);
    let choices = answer.body["choices"].as_array().expect("choices");
    let texts: Vec<&str> = choices
        .iter()
        .filter_map(|choice| choice["text"].as_str())
        .collect();
    assert!(
        texts.len() == 4
            && texts
                .iter()
                .all(|t| t.len() == 5 && t.bytes().all(|b| b.is_ascii_digit())),
        "{texts:?}"
    );
    let mut streamed = String::new();
    let stream = completion(json!({"stream": true, "guided_choice": ["blue sky", "red sky"]}));
    client.stream("/v1/completions", &stream, |_, event| {
        streamed += event["choices"][0]["text"].as_str().unwrap_or_default();
    });
    assert!(["blue sky", "red sky"].contains(&streamed.as_str()));

    let metrics = client.get_text("/metrics");
    let count = |bucket: &str| -> f64 {
        let name = format!("conclave:grammar_mask_seconds_bucket{bucket}");
        let line = metrics
            .lines()
            .find(|line| line.starts_with("conclave:grammar_mask_seconds_bucket") && line.contains(bucket));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok())
            .unwrap_or_else(|| panic!("no {name}"))
    };
    println!(
        "masks: {} of {} within 1 ms",
        count("le=\"0.001\""),
        count("le=\"+Inf\"")
    );
}

fn holds(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert!(
        value["sum"].as_u64().is_some_and(|sum| sum <= 99) && value["ok"].is_boolean(),
        "{text}"
    );
    assert_eq!(value.as_object().map(serde_json::Map::len), Some(2), "{text}");
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

/// Constrained requests of several kinds, sampled, each with its own seed.
fn constrained(i: u64) -> Value {
    let mut body = json!({
        "prompt": (0..40).map(|k| (k * 29 + i * 83 + 7) % 3000).collect::<Vec<u64>>(),
        "max_tokens": 150, "temperature": 0.9, "seed": 40 + i, "stream": true, "return_token_ids": true,
    });
    let constraint = match i % 4 {
        0 => json!({"guided_regex": "([a-z]{2,6} ){20}[0-9]{60}"}),
        1 => {
            json!({"structured_outputs": {"json": {"type": "array", "minItems": 12, "items": {"type": "object",
            "properties": {"k": {"type": "integer"}, "v": {"enum": ["x", "yy"]}}, "required": ["k", "v"], "additionalProperties": false}}}})
        }
        2 => json!({"guided_grammar": "start: item~40..60\nitem: \"a\" | \"bc\" | /[0-9]{3}/ \";\""}),
        _ => json!({"guided_choice": ["w".repeat(120), "x".repeat(120)]}),
    };
    merge(&mut body, constraint);
    body
}

fn streamed_ids(client: &Client, body: &Value, mut at_token: impl FnMut(usize)) -> Vec<u64> {
    let mut all = Vec::new();
    client.stream("/v1/completions", body, |_, event| {
        if let Some(list) = event["choices"][0]["token_ids"].as_array() {
            all.extend(list.iter().filter_map(Value::as_u64));
            at_token(all.len());
        }
    });
    all
}

fn all_at_once(client: &Client, bodies: &[Value], at_token: impl Fn(usize, usize) + Sync) -> Vec<Vec<u64>> {
    thread::scope(|scope| {
        let at_token = &at_token;
        let run = |(i, body): (usize, &Value)| {
            let body = body.clone();
            scope.spawn(move || streamed_ids(client, &body, |tokens| at_token(i, tokens)))
        };
        let running: Vec<_> = bodies.iter().enumerate().map(run).collect();
        running
            .into_iter()
            .map(|stream| stream.join().expect("a stream"))
            .collect()
    })
}

#[test]
fn a_killed_worker_changes_no_token_of_constrained_output() {
    let server = Server::serve(&["--workers", "3"]);
    let client = Client::new(&server.http);
    let bodies: Vec<Value> = (0..8).map(constrained).collect();
    let undisturbed: Vec<_> = bodies
        .iter()
        .map(|body| streamed_ids(&client, body, |_| ()))
        .collect();
    assert!(undisturbed.iter().all(|ids| ids.len() > 20), "{undisturbed:?}");
    for victim in 0..2 {
        let killed = AtomicBool::new(false);
        let disturbed = all_at_once(&client, &bodies, |stream, tokens| {
            if stream == 0 && tokens >= 20 && !killed.swap(true, Ordering::SeqCst) {
                signal(server.worker_pids()[victim], libc::SIGKILL);
            }
        });
        assert_eq!(disturbed, undisturbed, "worker {victim} killed");
    }
    // The streams may be whole before the second loss is noticed.
    metrics::wait_for(&client, "conclave:workers_lost_total", WITHIN, |lost| lost >= 2.0);
    println!("2 kills, {} streams each: the same tokens", bodies.len());
}

#[test]
fn preemption_changes_no_token_of_constrained_output() {
    // 40 pages of 16 tokens; 40 tokens of prompt and up to 150 more are 12 pages, and eight streams want 96.
    let server = Server::serve(&[
        "--workers",
        "1",
        "--kv-cache-memory-bytes",
        "1966080",
        "--max-model-len",
        "256",
    ]);
    let client = Client::new(&server.http);
    let bodies: Vec<Value> = (0..8).map(constrained).collect();
    let alone: Vec<_> = bodies
        .iter()
        .map(|body| streamed_ids(&client, body, |_| ()))
        .collect();
    let together = all_at_once(&client, &bodies, |_, _| ());
    let preempted = metrics::value(&client.get_text("/metrics"), "vllm:num_preemptions_total");
    println!("{preempted:?} preemptions");
    assert!(preempted.is_some_and(|count| count > 0.0), "{preempted:?}");
    assert_eq!(together, alone);
}

/// The table of constraints that have felled servers: each is a 400 that names its field, soon, and the next good one
/// is served as before.
#[test]
fn bad_constraints_are_refused_soon_and_harm_nobody() {
    let server = Server::serve(&["--workers", "1"]);
    let client = Client::new(&server.http);
    let good = completion(json!({"guided_regex": "[a-c]{8}"}));
    let expected = text(&client, &good);
    let nested = |depth: usize| format!("{}{{}}{}", "{\"items\":".repeat(depth), "}".repeat(depth));
    let many = |n: usize| {
        (0..n)
            .map(|i| format!("\"value {i}\""))
            .collect::<Vec<_>>()
            .join(",")
    };
    let refused = [
        ("guided_regex", json!({"guided_regex": "foo**"})),
        ("guided_regex", json!({"guided_regex": "(a"})),
        ("guided_regex", json!({"guided_regex": ""})),
        ("guided_regex", json!({"guided_regex": "[^\\s\\S]"})),
        ("guided_regex", json!({"guided_regex": "(".repeat(10_000)})),
        ("guided_json", json!({"guided_json": nested(10_000)})),
        ("guided_json", json!({"guided_json": "{\"type\": \"nothing\"}"})),
        ("guided_json", json!({"guided_json": false})),
        ("guided_json", json!({"guided_json": {"$ref": "#"}})),
        ("guided_json", json!({"guided_json": {"$ref": "#/$defs/missing"}})),
        (
            "guided_json",
            json!({"guided_json": {"$ref": "http://example.com/schema"}}),
        ),
        (
            "guided_json",
            json!({"guided_json": format!("{{\"enum\": [{}]}}", many(400_000))}),
        ),
        ("guided_grammar", json!({"guided_grammar": "start: start \"a\""})),
        ("guided_grammar", json!({"guided_grammar": "start: missing"})),
        ("guided_grammar", json!({"guided_grammar": ""})),
        ("guided_choice", json!({"guided_choice": []})),
        ("guided_choice", json!({"guided_choice": [""]})),
        (
            "guided_regex",
            json!({"guided_regex": "a", "guided_choice": ["a"]}),
        ),
    ];
    let mut slowest = Duration::ZERO;
    for (param, extra) in refused {
        let before = server.processor_time();
        let answer = client.post("/v1/completions", &completion(extra.clone()));
        slowest = slowest.max(server.processor_time() - before);
        let shown: String = extra.to_string().chars().take(120).collect();
        assert_eq!(answer.status, 400, "{shown}: {}", answer.body);
        let error = &answer.body["error"];
        let named = error["param"].as_str().unwrap_or_default();
        assert!(named == param || named == "guided_choice", "{shown}: {error}");
        assert!(
            !error["code"].is_null() && error["message"].as_str().is_some_and(|m| m.len() < 1200),
            "{error}"
        );
        assert_eq!(text(&client, &good), expected, "after {shown}");
    }
    // Fifty megabytes never get as far as the compiler.
    let enormous = format!(
        "{{\"prompt\":\"a\",\"guided_json\":{{\"enum\":[{}]}}}}",
        many(3_500_000)
    );
    assert!(enormous.len() > 50 << 20);
    assert_eq!(
        client.post_bytes("/v1/completions", enormous.as_bytes()).status,
        413
    );
    // Costly elsewhere, harmless here: compiled lazily, and bounded for each token.
    for extra in [
        json!({"guided_regex": "(a+)+$"}),
        json!({"guided_regex": "a{1,1000000}"}),
        json!({"guided_json": {"type": "object", "properties": {"next": {"$ref": "#"}}}}),
        json!({"guided_grammar": "start: e\ne: e e | \"a\" | \"b\" | \"ab\""}),
    ] {
        let before = server.processor_time();
        let mut body = completion(extra);
        body["max_tokens"] = json!(20);
        let answer = client.post("/v1/completions", &body);
        slowest = slowest.max(server.processor_time() - before);
        assert!([200, 400].contains(&answer.status), "{body}: {}", answer.body);
        assert_eq!(text(&client, &good), expected, "after {body}");
    }
    println!("the slowest took {slowest:?}");
    assert!(slowest < REFUSED_WITHIN, "{slowest:?}");
}

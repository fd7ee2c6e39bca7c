//! The HTTP APIs of a running server, clause by clause: what OpenAI's, vLLM's and Anthropic's clients send is taken, and
//! what they read is there. The shapes in detail have their tests in the gateway.

use conclave_tests::{Client, Server, server::PATIENT};
use serde_json::{Value, json};

fn with(mut body: Value, extra: Value) -> Value {
    for (key, value) in extra.as_object().expect("an object") {
        body[key] = value.clone();
    }
    body
}

fn ok(client: &Client, path: &str, body: &Value) -> Value {
    let answer = client.post(path, body);
    assert_eq!(answer.status, 200, "{path} {body}: {}", answer.body);
    answer.body
}

fn refused(client: &Client, path: &str, body: &Value, param: &str) {
    let answer = client.post(path, body);
    let error = &answer.body["error"];
    assert_eq!(
        (answer.status, &error["param"]),
        (400, &json!(param)),
        "{path} {body}: {error}"
    );
    assert!(
        error["message"].is_string() && error["type"].is_string() && error["code"].is_string(),
        "{error}"
    );
}

fn hello() -> Value {
    json!({"model": "conclave-demo", "messages": [{"role": "user", "content": "Hello!"}], "temperature": 0})
}

fn tools() -> Value {
    json!([{"type": "function", "function": {"name": "get_weather", "description": "The weather", "parameters":
        {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}])
}

fn chat_completions(client: &Client) {
    const PATH: &str = "/v1/chat/completions";
    let plain = ok(client, PATH, &hello());
    let message = &plain["choices"][0]["message"];
    assert_eq!(plain["choices"][0]["finish_reason"], "stop");
    assert!(
        message["content"].is_string() && message["reasoning_content"].is_string(),
        "{plain}"
    );
    assert_eq!(message["reasoning"], message["reasoning_content"]);
    // Accepted, and without effect on the answer.
    let ignored = json!({"metadata": {"a": "b"}, "prediction": {"type": "content", "content": "x"}, "service_tier": "flex", "user": "u",
        "store": true, "seed": 3, "of_tomorrow": {"x": [1]}, "safety_identifier": "s", "prompt_cache_key": "k", "response_format": {"type": "text"}});
    assert_eq!(
        ok(client, PATH, &with(hello(), ignored))["choices"],
        plain["choices"]
    );
    // Content in parts, developer and tool roles, a call and its result.
    let parts = json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]}]});
    assert!(ok(client, PATH, &with(hello(), parts))["choices"][0]["message"]["content"].is_string());
    let turns = json!({"tools": tools(), "messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "What is the weather in Bonn?"},
        {"role": "assistant", "content": null, "reasoning_content": "I ask.", "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": "{\"city\": \"Bonn\"}"}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "Sunny, 20 degrees"}]},
    ]});
    ok(client, PATH, &with(hello(), turns));
    for choice in [
        json!("auto"),
        json!("none"),
        json!("required"),
        json!({"type": "function", "function": {"name": "get_weather"}}),
    ] {
        let asked = json!({"tools": tools(), "tool_choice": choice, "parallel_tool_calls": false});
        let answer = ok(client, PATH, &with(hello(), asked));
        let is_forced = choice != "auto" && choice != "none";
        assert_eq!(
            answer["choices"][0]["finish_reason"] == "tool_calls",
            is_forced,
            "{choice}: {answer}"
        );
    }
    // A stream of the same: deltas add up to the whole answer, the call's name once, its arguments in pieces.
    let forced = with(
        hello(),
        json!({"tools": tools(), "tool_choice": "required", "parallel_tool_calls": false}),
    );
    let whole = ok(client, PATH, &forced);
    let mut events = Vec::new();
    let streamed = with(
        forced,
        json!({"stream": true, "stream_options": {"include_usage": true}}),
    );
    client.stream(PATH, &streamed, |_, event| events.push(event.clone()));
    let deltas: Vec<&Value> = events.iter().map(|event| &event["choices"][0]["delta"]).collect();
    let joined = |pointer: &str| -> String {
        deltas
            .iter()
            .filter_map(|delta| delta.pointer(pointer)?.as_str())
            .collect()
    };
    let call = &whole["choices"][0]["message"]["tool_calls"][0]["function"];
    assert_eq!(
        joined("/tool_calls/0/function/arguments"),
        call["arguments"].as_str().unwrap_or_default()
    );
    assert_eq!(
        joined("/tool_calls/0/function/name"),
        call["name"].as_str().unwrap_or_default()
    );
    assert_eq!(
        joined("/reasoning_content"),
        whole["choices"][0]["message"]["reasoning_content"]
            .as_str()
            .unwrap_or_default()
    );
    let last = events.last().expect("events");
    assert_eq!(
        (
            last["choices"].as_array().map(Vec::len),
            last["usage"]["total_tokens"].is_u64()
        ),
        (Some(0), true),
        "{last}"
    );
    // Choices, log-probabilities, bounds, the template's switches.
    let several = ok(
        client,
        PATH,
        &with(
            hello(),
            json!({"n": 3, "logprobs": true, "top_logprobs": 2, "max_completion_tokens": 5, "temperature": 1, "seed": 7}),
        ),
    );
    let choices = several["choices"].as_array().expect("choices");
    assert_eq!(choices.len(), 3);
    for choice in choices {
        let entries = choice["logprobs"]["content"].as_array().expect("logprobs");
        assert!(
            entries.len() <= 5
                && entries
                    .iter()
                    .all(|entry| entry["top_logprobs"].as_array().map(Vec::len) == Some(2)),
            "{choice}"
        );
    }
    let open = json!({"messages": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello th"}],
        "add_generation_prompt": false, "continue_final_message": true, "chat_template_kwargs": {"model_identity": "You are X."}});
    ok(client, PATH, &with(hello(), open));
    for (param, extra) in [
        ("suffix", json!({"suffix": "x"})),
        (
            "chat_template",
            json!({"chat_template": "{{ '-' * 10000000000 }}"}),
        ),
        ("functions", json!({"functions": []})),
        ("n", json!({"n": 1_000_000_000})),
        (
            "stream_options",
            json!({"stream_options": {"include_usage": true}}),
        ),
        ("tool_choice", json!({"tool_choice": "required"})),
        ("messages", json!({"messages": []})),
    ] {
        refused(client, PATH, &with(hello(), extra), param);
    }
}

fn completions(client: &Client) {
    const PATH: &str = "/v1/completions";
    let prompt = || json!({"prompt": "The router", "max_tokens": 5, "temperature": 0});
    refused(client, PATH, &with(prompt(), json!({"suffix": "end"})), "suffix");
    let plain = ok(client, PATH, &prompt());
    let echoed = ok(
        client,
        PATH,
        &with(prompt(), json!({"echo": true, "logprobs": 1})),
    );
    let text = |answer: &Value| {
        answer["choices"][0]["text"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    assert_eq!(text(&echoed), format!("The router{}", text(&plain)));
    let logprobs = &echoed["choices"][0]["logprobs"];
    assert_eq!(
        logprobs["tokens"].as_array().map(Vec::len),
        logprobs["token_logprobs"].as_array().map(Vec::len)
    );
    let best = ok(
        client,
        PATH,
        &with(
            prompt(),
            json!({"best_of": 4, "n": 2, "temperature": 1, "seed": 1}),
        ),
    );
    assert_eq!(best["choices"].as_array().map(Vec::len), Some(2));
    refused(
        client,
        PATH,
        &with(prompt(), json!({"best_of": 4, "stream": true})),
        "best_of",
    );
    let lists = ok(client, PATH, &with(prompt(), json!({"prompt": ["a", "b"]})));
    assert_eq!(lists["choices"].as_array().map(Vec::len), Some(2));
}

fn responses(client: &Client) {
    const PATH: &str = "/v1/responses";
    let input = |text: &str| json!({"model": "conclave-demo", "input": text, "temperature": 0});
    let first = ok(client, PATH, &input("Hello!"));
    let kinds: Vec<&str> = first["output"]
        .as_array()
        .expect("output")
        .iter()
        .filter_map(|item| item["type"].as_str())
        .collect();
    assert_eq!(kinds, ["reasoning", "message"], "{first}");
    let next = ok(
        client,
        PATH,
        &with(
            input("What is 27 + 45?"),
            json!({"previous_response_id": first["id"]}),
        ),
    );
    let tokens = |answer: &Value| answer["usage"]["input_tokens"].as_u64().unwrap_or_default();
    assert!(
        tokens(&next) > tokens(&first) + 10,
        "the first turn is part of it: {next}"
    );
    refused(
        client,
        PATH,
        &with(input("x"), json!({"previous_response_id": "resp_none"})),
        "previous_response_id",
    );
    let tool = json!({"tools": [{"type": "function", "name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}], "tool_choice": "required"});
    let called = ok(client, PATH, &with(input("Hello!"), tool));
    let call = called["output"]
        .as_array()
        .expect("output")
        .iter()
        .find(|item| item["type"] == "function_call");
    assert!(
        call.is_some_and(|call| call["name"] == "get_weather" && call["call_id"].is_string()),
        "{called}"
    );
}

fn messages(client: &Client) {
    const PATH: &str = "/v1/messages";
    let system = json!([{"type": "text", "text": "You are brief. ".repeat(40), "cache_control": {"type": "ephemeral"}}]);
    let body = json!({"model": "conclave-demo", "max_tokens": 80, "system": system, "temperature": 0,
        "messages": [{"role": "user", "content": "Hello!"}], "thinking": {"type": "enabled", "budget_tokens": 1024}});
    let first = ok(client, PATH, &body);
    let kinds: Vec<&str> = first["content"]
        .as_array()
        .expect("content")
        .iter()
        .filter_map(|block| block["type"].as_str())
        .collect();
    assert_eq!(kinds, ["thinking", "text"], "{first}");
    assert_eq!(first["stop_reason"], "end_turn");
    let again = ok(client, PATH, &body);
    assert!(
        again["usage"]["cache_read_input_tokens"]
            .as_u64()
            .is_some_and(|tokens| tokens > 50),
        "{again}"
    );
    let counted = ok(
        client,
        "/v1/messages/count_tokens",
        &json!({"model": "conclave-demo", "system": body["system"], "messages": body["messages"]}),
    );
    let usage = &again["usage"];
    let read = |key: &str| usage[key].as_u64().unwrap_or_default();
    assert_eq!(
        counted["input_tokens"].as_u64(),
        Some(read("input_tokens") + read("cache_read_input_tokens") + read("cache_creation_input_tokens"))
    );
    let stopped = ok(
        client,
        PATH,
        &with(body.clone(), json!({"stop_sequences": ["e"]})),
    );
    assert_eq!(
        (&stopped["stop_reason"], &stopped["stop_sequence"]),
        (&json!("stop_sequence"), &json!("e"))
    );
    let tool = json!({"tools": [{"name": "get_weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}],
        "tool_choice": {"type": "tool", "name": "get_weather"}});
    let used = ok(client, PATH, &with(body.clone(), tool.clone()));
    let block = used["content"]
        .as_array()
        .expect("content")
        .iter()
        .find(|block| block["type"] == "tool_use")
        .cloned();
    let block = block.unwrap_or_else(|| panic!("{used}"));
    assert!(
        block["input"].is_object() && used["stop_reason"] == "tool_use",
        "{used}"
    );
    let turns = json!({"tools": tool["tools"], "messages": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": used["content"]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block["id"], "content": [{"type": "text", "text": "Sunny"}]}]}]});
    ok(client, PATH, &with(body.clone(), turns));
    let wrong = client.post(PATH, &with(body, json!({"max_tokens": 0})));
    assert_eq!(
        (wrong.status, &wrong.body["type"], &wrong.body["error"]["type"]),
        (400, &json!("error"), &json!("invalid_request_error")),
        "{}",
        wrong.body
    );
}

fn everything_else(client: &Client) {
    assert_eq!(client.get("/v1/models").body["data"][0]["id"], "conclave-demo");
    assert_eq!(
        client.get("/v1/models/conclave-demo").body["max_model_len"],
        32_768
    );
    assert_eq!(client.get("/v1/models/other").status, 404);
    let tokens = ok(client, "/tokenize", &json!({"prompt": "expert parallelism"}));
    let back = ok(client, "/detokenize", &json!({"tokens": tokens["tokens"]}));
    assert_eq!(back["prompt"], "expert parallelism");
    for path in ["/version", "/health", "/ready", "/ping"] {
        assert_eq!(client.get(path).status, 200, "{path}");
    }
    // What the dashboard that comes with vLLM reads.
    let metrics = client.get_text("/metrics");
    for name in [
        "e2e_request_latency_seconds_bucket",
        "prompt_tokens_total",
        "generation_tokens_total",
        "time_per_output_token_seconds_bucket",
        "inter_token_latency_seconds_bucket",
        "num_requests_running",
        "num_requests_waiting",
        "time_to_first_token_seconds_bucket",
        "kv_cache_usage_perc",
        "gpu_cache_usage_perc",
        "request_prompt_tokens_bucket",
        "request_generation_tokens_bucket",
        "request_success_total",
        "request_queue_time_seconds_sum",
        "request_prefill_time_seconds_sum",
        "request_decode_time_seconds_sum",
        "request_max_num_generation_tokens_sum",
    ] {
        assert!(metrics.contains(&format!("\nvllm:{name}{{")), "{name}: {metrics}");
    }
    assert!(
        client.get("/openapi.json").body["openapi"]
            .as_str()
            .is_some_and(|version| version.starts_with("3."))
    );
    assert!(client.get_text("/docs").contains("<html"));
}

#[test]
fn every_clause_of_the_http_apis() {
    let server = Server::serve_with(&["--workers", "1"], &PATIENT);
    let client = Client::new(&server.http);
    chat_completions(&client);
    completions(&client);
    responses(&client);
    messages(&client);
    everything_else(&client);
}

#[test]
fn grpc_is_not_open_to_the_network_where_http_asks_for_a_key() {
    let guarded = ["--workers", "1", "--host", "0.0.0.0", "--api-key", "secret"];
    let server = Server::serve(&guarded);
    assert!(server.http.starts_with("0.0.0.0:"), "{}", server.http);
    assert!(server.grpc.starts_with("127.0.0.1:"), "{}", server.grpc);
    drop(server);
    let server = Server::serve(&[&guarded[..], &["--grpc-host", "0.0.0.0"]].concat());
    assert!(server.grpc.starts_with("0.0.0.0:"), "{}", server.grpc);
    server.wait_for_line("whoever reaches the gRPC port needs no key");
}

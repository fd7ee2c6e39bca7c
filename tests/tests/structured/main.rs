//! Output held to a form: every spelling of every kind here, and in files of their own forced tool calls, preemption
//! and the loss of a worker, and what no server should have to compile or can not fulfil.

mod failures;
mod limits;
mod tools;

use conclave_tests::{Client, Server};
use serde_json::{Value, json};

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

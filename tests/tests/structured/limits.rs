//! Constraints that no server should have to compile, and requests that forbid what their own constraint asks for.

use std::time::Duration;

use conclave_tests::{Client, Server, metrics};
use serde_json::json;

use super::{chat, completion, merge, text};

/// A refusal costs at most so much processor time, of router and gateway with all they do; the compiler's own bound of
/// one second has its test beside it.
const REFUSED_WITHIN: Duration = Duration::from_secs(5);

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

/// Where the grammar is finished only its end is left, whatever `min_tokens` says: the form wins.
#[test]
fn min_tokens_yield_to_a_finished_grammar() {
    let server = Server::serve(&["--workers", "2"]);
    let client = Client::new(&server.http);
    let form = completion(json!({"guided_choice": ["blue sky"]}));
    let end = client.complete_ids(form.clone()).len();
    for extra in [
        json!({"min_tokens": 50}),
        json!({"min_tokens": 50, "temperature": 1, "seed": 7}),
        json!({"min_tokens": 50, "stop": ["never"], "stop_token_ids": [7]}),
        json!({"min_tokens": 60, "ignore_eos": false}),
    ] {
        let mut body = form.clone();
        merge(&mut body, extra);
        assert_eq!(text(&client, &body), "blue sky", "{body}");
        assert_eq!(client.complete_ids(body.clone()).len(), end, "{body}");
    }
    // As long as the grammar leaves a choice, they hold.
    let body = |min: u32| {
        completion(json!({"guided_regex": "(ab)*", "min_tokens": min, "temperature": 1, "seed": 3}))
    };
    let (free, held) = (
        client.complete_ids(body(0)).len(),
        client.complete_ids(body(40)).len(),
    );
    assert!(free < 40 && held >= 40, "{free} and {held} tokens");
    // A stop token that the form asks for ends it, and so does the end of a forced call.
    let all = client.complete_ids(form.clone());
    let body =
        completion(json!({"guided_choice": ["blue sky"], "min_tokens": 50, "stop_token_ids": [all[1]]}));
    assert_eq!(client.complete_ids(body), all[..2]);
    let tool = json!([{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]);
    let forced = chat(
        json!({"tools": tool, "tool_choice": "required", "parallel_tool_calls": false, "min_tokens": 400}),
    );
    let answer = client.post("/v1/chat/completions", &forced);
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(
        answer.body["choices"][0]["finish_reason"], "tool_calls",
        "{}",
        answer.body
    );
}

/// A request whose own fields leave no token ends as its own fault, and others go on.
#[test]
fn what_forbids_every_token_is_a_bad_request() {
    let server = Server::serve(&["--workers", "2"]);
    let client = Client::new(&server.http);
    let good = completion(json!({"guided_regex": "[a-c]{8}"}));
    let expected = text(&client, &good);
    let every = ["b", "bl", "blu", "blue", "blue ", " sky", "sky", "s", "sk"];
    for extra in [
        json!({"guided_choice": ["blue sky"], "bad_words": every}),
        json!({"guided_choice": ["blue sky"], "bad_words": every, "n": 3, "temperature": 1}),
    ] {
        let body = completion(extra);
        let answer = client.post("/v1/completions", &body);
        assert_eq!(answer.status, 400, "{body}: {}", answer.body);
        let error = &answer.body["error"];
        assert_eq!(
            (&error["type"], &error["code"]),
            (&json!("invalid_request_error"), &json!("unsatisfiable")),
            "{error}"
        );
        assert!(
            error["message"]
                .as_str()
                .is_some_and(|text| text.contains("bad_words")),
            "{error}"
        );
        assert_eq!(text(&client, &good), expected, "after {body}");
    }
    let lost = metrics::value(&client.get_text("/metrics"), "conclave:workers_lost_total");
    assert_eq!(lost, Some(0.0));
}

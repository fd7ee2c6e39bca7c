//! Starting, stopping and what operators see.

use std::time::Duration;

use conclave_tests::{Client, Server, data, server::PATIENT};
use serde_json::{Value, json};

#[test]
fn sigterm_finishes_what_runs_and_exits_with_zero() {
    let server = Server::serve(&[]);
    let client = Client::new(&server.http);
    let request = json!({"prompt": "Tell me", "max_tokens": 300, "ignore_eos": true, "stream": true});
    let (started, has_started) = std::sync::mpsc::channel();
    let stream = std::thread::spawn(move || {
        client.stream("/v1/completions", &request, |n, _| {
            if n == 1 {
                started.send(()).expect("the test waits");
            }
        })
    });
    has_started
        .recv_timeout(Duration::from_secs(120))
        .expect("a first token");
    let status = server.stop();
    assert_eq!(status.code(), Some(0));
    let events = stream.join().expect("the stream ends with [DONE]");
    let finish = events
        .iter()
        .find_map(|e| e["choices"][0]["finish_reason"].as_str());
    assert_eq!(finish, Some("length"));
}

#[test]
fn a_checkpoint_without_tokenizer_is_served_by_ids() {
    let model = data::tiny("tiny-hd64/awq");
    let server = Server::serve(&[
        model.to_str().expect("UTF-8"),
        "--skip-tokenizer-init",
        "--workers",
        "1",
    ]);
    let client = Client::new(&server.http);
    let ids = client
        .complete_ids(json!({"prompt": [1, 17, 301], "max_tokens": 4, "ignore_eos": true, "temperature": 0}));
    assert_eq!(ids.len(), 4);
    let text = client.post("/v1/completions", &json!({"prompt": "text", "max_tokens": 4}));
    assert_eq!(text.status, 400, "{}", text.body);
    assert_eq!(text.body["error"]["param"], "prompt");
}

#[test]
fn equal_prompts_are_served_from_the_prefix_cache() {
    let server = Server::serve_with(&["--workers", "2"], &PATIENT);
    let client = Client::new(&server.http);
    let prompt: Vec<u64> = (0..200).map(|i| (i * 37 + 11) % 3000).collect();
    let body = json!({"prompt": prompt, "max_tokens": 2, "temperature": 0});
    let cached = |answer: &Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
    assert_eq!(
        cached(&client.post("/v1/completions", &body).body).unwrap_or(0),
        0
    );
    let again = client.post("/v1/completions", &body).body;
    assert!(cached(&again).expect("cached_tokens") >= 184, "{again}");
    let salted = json!({"prompt": prompt, "max_tokens": 2, "temperature": 0, "cache_salt": "another tenant"});
    assert_eq!(
        cached(&client.post("/v1/completions", &salted).body).unwrap_or(0),
        0
    );
}

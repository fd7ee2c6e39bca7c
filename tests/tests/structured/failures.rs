//! Constrained output goes on as it was: after the loss of a worker, and after preemption.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use conclave_tests::{Client, Server, metrics, server::signal};
use serde_json::{Value, json};

use super::merge;

/// A loss is noticed by then, on a busy machine of two cores.
const WITHIN: Duration = Duration::from_secs(120);

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

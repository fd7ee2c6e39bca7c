//! A worker that dies takes no request with it: the tokens are those of an undisturbed run (L1 and L2).
//!
//! Proves invariant S2 of ARCHITECTURE.md.

use std::thread;

use conclave_tests::{Client, Server, server::signal};
use serde_json::{Value, json};

fn body(i: u64) -> Value {
    json!({
        "prompt": (0..40).map(|k| (k * 31 + i * 97 + 5) % 3000).collect::<Vec<u64>>(),
        "max_tokens": 200, "ignore_eos": true, "temperature": 0.8, "seed": 100 + i,
        "frequency_penalty": 0.2, "stream": true, "return_token_ids": true,
    })
}

fn streamed_ids(client: &Client, body: &Value, mut at_token: impl FnMut(usize)) -> Vec<u64> {
    let mut all = Vec::new();
    client.stream("/v1/completions", body, |_, event| {
        if let Some(list) = event["choices"][0]["token_ids"].as_array() {
            all.extend(list.iter().map(|id| id.as_u64().expect("a token id")));
            at_token(all.len());
        }
    });
    all
}

#[test]
fn killing_a_worker_in_mid_stream_changes_no_token() {
    let server = Server::serve(&["--workers", "3"]);
    let client = Client::new(&server.http);
    let bodies: Vec<Value> = (0..6).map(body).collect();
    let undisturbed: Vec<_> = bodies.iter().map(|b| streamed_ids(&client, b, |_| ())).collect();
    for victim in 0..2 {
        let streams: Vec<Vec<u64>> = thread::scope(|scope| {
            let (server, client) = (&server, &client);
            let run = |(i, b): (usize, &Value)| {
                let b = b.clone();
                scope.spawn(move || {
                    streamed_ids(client, &b, |tokens| {
                        if i == 0 && tokens == 40 {
                            signal(server.worker_pids()[victim], libc::SIGKILL);
                        }
                    })
                })
            };
            let running: Vec<_> = bodies.iter().enumerate().map(run).collect();
            running
                .into_iter()
                .map(|handle| handle.join().expect("a stream"))
                .collect()
        });
        assert_eq!(streams, undisturbed, "worker {victim} killed");
    }
}

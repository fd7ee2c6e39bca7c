//! Streams that run beside whatever a test does to a server, and must not notice any of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use serde_json::{Value, json};

use crate::{Client, client::ids};

/// Running streams; each asks the same again and again.
pub struct Healthy {
    stop: Arc<AtomicBool>,
    streams: Vec<JoinHandle<()>>,
}

/// Sampled, penalised and with log-probabilities, so that a disturbance of any of these shows.
fn body(stream: u64) -> Value {
    json!({
        "prompt": (0..40).map(|k| (k * 31 + stream * 97 + 5) % 3000).collect::<Vec<u64>>(),
        "max_tokens": 60, "ignore_eos": true, "temperature": 0.8, "seed": 100 + stream,
        "frequency_penalty": 0.2, "stream": true, "return_token_ids": true, "logprobs": 1,
    })
}

/// Token ids and log-probabilities of one whole stream.
fn run(client: &Client, body: &Value) -> (Vec<u64>, Vec<Value>) {
    let (mut tokens, mut logprobs) = (Vec::new(), Vec::new());
    client.stream("/v1/completions", body, |_, event| {
        let choice = &event["choices"][0];
        if choice["token_ids"].is_array() {
            tokens.extend(ids(&choice["token_ids"]));
        }
        if let Some(list) = choice["logprobs"]["token_logprobs"].as_array() {
            logprobs.extend(list.iter().cloned());
        }
    });
    assert_eq!((tokens.len(), logprobs.len()), (60, 60));
    (tokens, logprobs)
}

impl Healthy {
    /// Records each stream alone, then starts all of them.
    pub fn start(client: &Client, streams: u64) -> Healthy {
        let stop = Arc::new(AtomicBool::new(false));
        let alone: Vec<_> = (0..streams)
            .map(body)
            .map(|body| (run(client, &body), body))
            .collect();
        let start = |(stream, (alone, body)): (usize, _)| {
            let (client, stop) = (client.clone(), Arc::clone(&stop));
            std::thread::spawn(move || {
                let mut runs = 0;
                loop {
                    assert_eq!(run(&client, &body), alone, "healthy stream {stream}, run {runs}");
                    runs += 1;
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                }
            })
        };
        let streams = alone.into_iter().enumerate().map(start).collect();
        Healthy { stop, streams }
    }

    /// Ends the streams, each after a whole run; fails if one differed from its undisturbed run.
    pub fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        for stream in self.streams {
            stream.join().expect("a healthy stream is not disturbed");
        }
    }
}

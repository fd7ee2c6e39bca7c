//! Level L2 on real processes: the same prompts give the same tokens and log-probabilities with any number of
//! workers, any batch-mates, any chunking and with the prefix cache on or off.
//!
//! Proves invariants E1 and K1 of ARCHITECTURE.md.

use std::thread;

use conclave_tests::{Client, Server, data};
use serde_json::{Value, json};

/// Prompts of several lengths, some with a common prefix.
fn prompts(vocab: u64) -> Vec<Vec<u64>> {
    let word = |i: u64, salt: u64| (i * 7919 + salt * 104_729 + 13) % vocab;
    let shared: Vec<u64> = (0..70).map(|i| word(i, 1)).collect();
    let mut all: Vec<Vec<u64>> = [1, 5, 16, 17, 100]
        .iter()
        .map(|&n| (0..n).map(|i| word(i, n)).collect())
        .collect();
    all.extend((0..3).map(|k| {
        shared
            .iter()
            .copied()
            .chain((0..9).map(|i| word(i, 50 + k)))
            .collect()
    }));
    all
}

/// One request per prompt; every second one is sampled with a seed and penalties.
fn requests(vocab: u64) -> Vec<Value> {
    let with_settings = |(i, prompt): (usize, Vec<u64>)| {
        let mut body =
            json!({"prompt": prompt, "max_tokens": 24, "ignore_eos": true, "logprobs": 2, "temperature": 0});
        if i % 2 == 1 {
            body["temperature"] = json!(0.9);
            body["seed"] = json!(4711 + i);
            body["presence_penalty"] = json!(0.5);
            body["repetition_penalty"] = json!(1.1);
        }
        body
    };
    prompts(vocab)
        .into_iter()
        .enumerate()
        .map(with_settings)
        .collect()
}

/// What must be equal: the tokens and every log-probability, as text.
fn outcome(client: &Client, body: &Value) -> (Vec<u64>, String) {
    let mut body = body.clone();
    body["return_token_ids"] = json!(true);
    let answer = client.post("/v1/completions", &body);
    assert_eq!(answer.status, 200, "{}", answer.body);
    let choice = &answer.body["choices"][0];
    (
        conclave_tests::client::ids(&choice["token_ids"]),
        choice["logprobs"]["token_logprobs"].to_string(),
    )
}

fn all_at_once(client: &Client, requests: &[Value]) -> Vec<(Vec<u64>, String)> {
    thread::scope(|scope| {
        let running: Vec<_> = requests
            .iter()
            .map(|body| scope.spawn(|| outcome(client, body)))
            .collect();
        running
            .into_iter()
            .map(|handle| handle.join().expect("a request"))
            .collect()
    })
}

fn serve(model: &str, args: &[&str]) -> Server {
    let mut all = vec![model, "--skip-tokenizer-init"];
    all.extend(args);
    Server::serve(&all)
}

fn compare(model: &std::path::Path, vocab: u64) {
    let model = model.to_str().expect("a UTF-8 path");
    let requests = requests(vocab);
    let server = serve(model, &["--workers", "1", "--no-enable-prefix-caching"]);
    let client = Client::new(&server.http);
    let alone: Vec<_> = requests.iter().map(|body| outcome(&client, body)).collect();
    assert_eq!(
        all_at_once(&client, &requests),
        alone,
        "{model}: batch-mates changed a result"
    );
    drop(server);
    for args in [
        &["--workers", "2"][..],
        &[
            "--workers",
            "3",
            "--max-num-batched-tokens",
            "16",
            "--max-num-seqs",
            "16",
        ],
        &[
            "--workers",
            "5",
            "--max-num-batched-tokens",
            "33",
            "--max-num-seqs",
            "9",
            "--block-size",
            "8",
        ],
    ] {
        let server = serve(model, args);
        let client = Client::new(&server.http);
        assert_eq!(
            all_at_once(&client, &requests),
            alone,
            "{model} {args:?}: first round"
        );
        assert_eq!(
            all_at_once(&client, &requests),
            alone,
            "{model} {args:?}: from the prefix cache"
        );
    }
}

#[test]
fn bf16_tokens_do_not_depend_on_workers_batch_chunks_or_cache() {
    compare(&data::tiny("tiny-hd64/bf16"), 384);
}

#[test]
fn fp8_tokens_do_not_depend_on_workers_batch_chunks_or_cache() {
    compare(&data::demo_model(), 3072);
}

#[test]
fn int4_tokens_do_not_depend_on_workers_batch_chunks_or_cache() {
    compare(&data::tiny("tiny-hd64/ct-int4"), 384);
}

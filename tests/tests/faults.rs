//! What a cluster does when a device breaks or logits are no numbers, and that a soak leaves nothing behind.

use conclave_tests::{Client, Server, client::ids, server};
use serde_json::{Value, json};
use std::process::Command;
use std::thread;

fn body(max_tokens: u64) -> Value {
    json!({
        "prompt": (0..40).map(|k| (k * 31 + 5) % 3000).collect::<Vec<u64>>(),
        "max_tokens": max_tokens, "ignore_eos": true, "temperature": 0, "return_token_ids": true,
    })
}

#[test]
fn a_device_that_breaks_takes_no_request_with_it() {
    let answer = |server: &Server| {
        let answer = Client::new(&server.http).post("/v1/completions", &body(60));
        assert_eq!(answer.status, 200, "{}", answer.body);
        ids(&answer.body["choices"][0]["token_ids"])
    };
    let undisturbed = answer(&Server::serve(&["--workers=1"]));
    let server = Server::serve(&["--workers=1", "--inject-fault=kernel@20"]);
    assert_eq!(answer(&server), undisturbed);
    server.wait_for_line("a fault was provoked");
}

#[test]
fn a_nan_fails_one_request() {
    let server = Server::serve(&["--workers=1", "--inject-fault=nan@8"]);
    let answers: Vec<u16> = thread::scope(|scope| {
        let ask = || {
            Client::new(&server.http)
                .post("/v1/completions", &body(40))
                .status
        };
        let running: Vec<_> = (0..4).map(|_| scope.spawn(ask)).collect();
        let answers = running
            .into_iter()
            .map(|thread| thread.join().expect("an answer"));
        answers.collect()
    });
    let failed = answers.iter().filter(|status| **status != 200).count();
    assert_eq!(failed, 1, "{answers:?}");
}

/// What it printed, its errors behind it, and whether nothing was wrong.
fn soak(arguments: &[&str]) -> (String, bool) {
    let output = Command::new(server::binary())
        .args(["bench", "--scenario=soak"])
        .args(arguments)
        .output()
        .expect("run conclave");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    (format!("{text}\n{errors}"), output.status.success())
}

#[test]
fn a_short_soak_leaves_nothing_behind() {
    let wanted = ["--duration=5s", "--request-rate=20", "--random-input-len=600"];
    let (text, good) = soak(&[&wanted[..], &["--random-output-len=40", "--workers=2"]].concat());
    assert!(good, "{text}");
    assert!(
        text.contains("afterwards: 0 requests run, 0 KV pages are held"),
        "{text}"
    );
}

/// With pages for one of the longest sequences sixteen clients must give way to each other; with the usual ones nobody does,
/// and a soak that was to see it says so.
#[test]
fn a_soak_sees_whether_pages_ran_out() {
    let crowd = [
        "--expect-preemption",
        "--duration=4s",
        "--request-rate=200",
        "--random-input-len=64",
    ];
    let few = "--serve-args=--kv-cache-memory-bytes=2MB --max-model-len=600";
    let (text, good) = soak(&[&crowd[..], &["--random-output-len=500", few]].concat());
    assert!(good, "{text}");
    assert!(
        text.contains("afterwards: 0 requests run, 0 KV pages are held"),
        "{text}"
    );
    let (text, good) = soak(&[&crowd[..], &["--random-output-len=20"]].concat());
    assert!(!good && text.contains("KV pages never ran out"), "{text}");
}

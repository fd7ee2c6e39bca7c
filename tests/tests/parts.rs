//! Router, workers and gateway as processes of their own, as deploy/compose.yaml starts them: they find each other, serve,
//! survive the loss of a worker, and end with status 0.

use std::time::Duration;

use conclave_tests::server::signal;
use conclave_tests::{Client, Server};
use serde_json::json;

#[test]
fn the_parts_serve_on_their_own_and_survive_a_worker() {
    let router = Server::router(&["--expected-workers", "2"]);
    let (grpc, cluster) = (router.address("gRPC"), router.address("workers"));
    let (first, second) = (Server::worker(&cluster, &[]), Server::worker(&cluster, &[]));
    let gateway = Server::gateway(&[&grpc]);
    let client = Client::new(&gateway.address("HTTP"));

    let ask = || {
        let question =
            json!({"messages": [{"role": "user", "content": "What is 27 + 45?"}], "temperature": 0});
        let answer = client.post("/v1/chat/completions", &question);
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.body["choices"][0]["message"]["content"].clone()
    };
    let whole = ask();
    assert!(whole.as_str().is_some_and(|text| text.contains("72")), "{whole}");
    signal(first.pid(), libc::SIGKILL);
    assert_eq!(ask(), whole);

    for (name, process) in [("router", router), ("gateway", gateway), ("worker", second)] {
        let status = process.stop();
        assert_eq!(status.code(), Some(0), "{name}");
    }
}

#[test]
fn a_worker_with_another_secret_is_refused() {
    let router = Server::router(&[]);
    let cluster = router.address("workers");
    let mut stranger = Server::spawn(
        &["worker", "--router", &cluster],
        &[("CONCLAVE_CLUSTER_TOKEN", "another secret")],
    );
    let status = stranger.wait(Duration::from_secs(120));
    assert_eq!(status.code(), Some(1));
    assert!(stranger.output().contains("refused"), "{}", stranger.output());
}

//! Router, workers and gateway as processes of their own, as deploy/compose.yaml starts them: they find each other, serve,
//! survive the loss of a worker, and end with status 0.

use std::time::Duration;

use conclave_tests::server::signal;
use conclave_tests::{Client, Server};
use serde_json::json;

const TOKEN: (&str, &str) = ("CONCLAVE_CLUSTER_TOKEN", "a secret of this test");

fn worker(router: &str) -> Server {
    Server::spawn(&["worker", "--router", router, "--threads", "1"], &[TOKEN])
}

#[test]
fn the_parts_serve_on_their_own_and_survive_a_worker() {
    let ports = [
        "--grpc-port",
        "0",
        "--cluster-port",
        "0",
        "--expected-workers",
        "2",
    ];
    let router = Server::spawn(&[&["router"], &ports[..]].concat(), &[TOKEN]);
    let (grpc, cluster) = (router.address("gRPC"), router.address("workers"));
    let (first, second) = (worker(&cluster), worker(&cluster));
    let gateway = Server::spawn(&["gateway", "--router", &grpc, "--port", "0"], &[]);
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
    let router = Server::spawn(&["router", "--grpc-port", "0", "--cluster-port", "0"], &[TOKEN]);
    let cluster = router.address("workers");
    let mut stranger = Server::spawn(
        &["worker", "--router", &cluster],
        &[("CONCLAVE_CLUSTER_TOKEN", "another secret")],
    );
    let status = stranger.wait(Duration::from_secs(120));
    assert_eq!(status.code(), Some(1));
    assert!(stranger.output().contains("refused"), "{}", stranger.output());
}

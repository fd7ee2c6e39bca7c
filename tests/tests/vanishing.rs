//! Clients that leave, and clients that stop reading: what they held is free within moments, no step is spent on them
//! afterwards, and nobody else notices.
//!
//! The same at the router alone, with scripted workers and exact counts: `router/tests/limits.rs`; at the gateway
//! alone: `gateway/tests/gateway/wire.rs`.
//!
//! Proves invariant B1 of ARCHITECTURE.md.

use std::io::{BufRead, BufReader, Read};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use conclave_tests::client::unread;
use conclave_tests::metrics::{self, value};
use conclave_tests::{Client, Healthy, Server, data};
use serde_json::json;

const SOON: Duration = Duration::from_secs(120);
/// Clients that come together: as many as there are slots, so that each of them gets to its phase; or more, to queue.
const WITH_SLOTS: usize = 15;
const CROWD: usize = 50;

const FIGURES: [&str; 4] = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "conclave:kv_pages_referenced",
    "conclave:worker_slots_used",
];

/// Waits until nothing is left of earlier clients, those included that the gateway has not seen yet: it accepts
/// connections in turn, and none is open but the one that asks.
fn is_idle(http: &str) {
    let deadline = Instant::now() + SOON;
    loop {
        let text = Client::new(http).get_text("/metrics");
        let is = |name: &str, wanted: f64| value(&text, name) == Some(wanted);
        if FIGURES.iter().all(|name| is(name, 0.0)) && is("conclave_gateway_connections", 1.0) {
            return;
        }
        assert!(Instant::now() < deadline, "not idle after {SOON:?}:\n{text}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn wait_for_figure(http: &str, name: &str, wanted: f64) {
    metrics::wait_for(&Client::new(http), name, SOON, |figure| figure == wanted);
}

/// Reads events until one holds `text`.
fn read_until(socket: &mut BufReader<TcpStream>, text: &str) {
    let mut line = String::new();
    while !line.contains(text) {
        line.clear();
        let length = socket.read_line(&mut line).expect("the stream goes on");
        assert!(length > 0, "the stream ended before {text:?}");
    }
}

/// `times` times some clients, that leave when `ready` returns.
fn vanish(
    times: usize,
    clients: usize,
    address: &str,
    path: &str,
    body: &str,
    ready: impl Fn(&mut BufReader<TcpStream>),
) {
    for _ in 0..times {
        let open = |_| BufReader::new(unread(address, path, body));
        let sockets: Vec<_> = (0..clients).map(open).collect();
        for mut socket in sockets {
            ready(&mut socket);
        }
    }
}

#[test]
fn a_thousand_clients_that_vanish_in_every_phase_leave_nothing_behind() {
    let server = Server::serve(&["--workers", "2", "--max-num-seqs", "8"]);
    let http = &server.http;
    let text = |prompt: &str| {
        json!({"prompt": prompt, "max_tokens": 4000, "ignore_eos": true, "stream": true}).to_string()
    };
    let long_prompt = "What is expert parallelism? ".repeat(300);
    let chat = &data::demo_prompts("tool")[0];
    let call = json!({
        "messages": chat["messages"], "tools": chat["tools"], "temperature": 0, "max_tokens": 700, "stream": true,
    });

    // While decoding: a token has come.
    vanish(19, WITH_SLOTS, http, "/v1/completions", &text("Once"), |socket| {
        read_until(socket, "\"text\":")
    });
    is_idle(http);
    // In a tool call: the call's name has come, its arguments have not all.
    vanish(
        1,
        WITH_SLOTS,
        http,
        "/v1/chat/completions",
        &call.to_string(),
        |socket| read_until(socket, "\"tool_calls\":"),
    );
    is_idle(http);
    // In prefill, or just before.
    vanish(8, CROWD, http, "/v1/completions", &text(&long_prompt), |_| ());
    is_idle(http);
    // Queued, behind sixteen that fill every slot.
    let running: Vec<_> = (0..16)
        .map(|_| unread(http, "/v1/completions", &text("Long")))
        .collect();
    wait_for_figure(http, "vllm:num_requests_running", 16.0);
    vanish(6, CROWD, http, "/v1/completions", &text("Queued"), |_| ());
    wait_for_figure(http, "vllm:num_requests_waiting", 0.0);
    drop(running);
    is_idle(http);

    // No step runs for clients that are gone.
    let client = Client::new(http);
    let steps = || value(&client.get_text("/metrics"), "vllm:generation_tokens_total");
    let before = steps();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(steps(), before);
    let answer = client.post("/v1/completions", &json!({"prompt": "Hello", "max_tokens": 3}));
    assert_eq!(answer.status, 200, "{}", answer.body);
}

#[test]
fn a_stream_that_nobody_reads_ends_alone() {
    let server = Server::serve(&["--workers", "2"]);
    let http = &server.http;
    let client = Client::new(http);
    // Far more than the buffers of two sockets hold.
    let long =
        json!({"prompt": "Once", "max_tokens": 30000, "ignore_eos": true, "stream": true, "logprobs": 20});
    let mut lazy = unread(http, "/v1/completions", &long.to_string());
    wait_for_figure(http, "vllm:num_requests_running", 1.0);
    let healthy = Healthy::start(&client, 4);
    healthy.finish();
    drop(client);
    // The gateway cuts the connection after its time limit for writing, long before the answer is whole.
    is_idle(http);
    // What the client finds, should it come back, ends in mid-stream.
    let mut rest = Vec::new();
    let _ = lazy.read_to_end(&mut rest);
    assert!(!String::from_utf8_lossy(&rest).contains("[DONE]"));
}

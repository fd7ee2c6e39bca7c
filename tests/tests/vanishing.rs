//! Clients that leave, and clients that stop reading: what they held is free within moments, no step is spent on them
//! afterwards, and nobody else notices.
//!
//! The same at the router alone, with scripted workers and exact counts: `router/tests/limits.rs`; at the gateway
//! alone: `gateway/tests/gateway/wire.rs`.
//!
//! Proves invariant B1 of ARCHITECTURE.md.

use std::io::{BufRead, BufReader, Read};
use std::net::TcpStream;
use std::time::Duration;

use conclave_tests::client::unread;
use conclave_tests::metrics::{value, wait_for};
use conclave_tests::{Client, Healthy, Server, data};
use serde_json::json;

const SOON: Duration = Duration::from_secs(30);
/// Clients that come together: as many as there are slots, so that each of them gets to its phase; or more, to queue.
const WITH_SLOTS: usize = 15;
const CROWD: usize = 50;

fn is_idle(client: &Client) {
    for figure in [
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "conclave:kv_pages_referenced",
        "conclave:worker_slots_used",
    ] {
        wait_for(client, figure, SOON, |n| n == 0.0);
    }
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
    let (client, http) = (Client::new(&server.http), &server.http);
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
    is_idle(&client);
    // In a tool call: the call's name has come, its arguments have not all.
    vanish(
        1,
        WITH_SLOTS,
        http,
        "/v1/chat/completions",
        &call.to_string(),
        |socket| read_until(socket, "\"tool_calls\":"),
    );
    is_idle(&client);
    // In prefill, or just before.
    vanish(8, CROWD, http, "/v1/completions", &text(&long_prompt), |_| ());
    is_idle(&client);
    // Queued, behind sixteen that fill every slot.
    let running: Vec<_> = (0..16)
        .map(|_| unread(http, "/v1/completions", &text("Long")))
        .collect();
    wait_for(&client, "vllm:num_requests_running", SOON, |n| n == 16.0);
    vanish(6, CROWD, http, "/v1/completions", &text("Queued"), |_| ());
    wait_for(&client, "vllm:num_requests_waiting", SOON, |n| n == 0.0);
    drop(running);
    is_idle(&client);

    // No step runs for clients that are gone.
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
    let client = Client::new(&server.http);
    // Far more than the buffers of two sockets hold.
    let long =
        json!({"prompt": "Once", "max_tokens": 30000, "ignore_eos": true, "stream": true, "logprobs": 20});
    let mut lazy = unread(&server.http, "/v1/completions", &long.to_string());
    wait_for(&client, "vllm:num_requests_running", SOON, |n| n == 1.0);
    let healthy = Healthy::start(&client, 4);
    healthy.finish();
    // The gateway cuts the connection after its time limit for writing, long before the answer is whole.
    wait_for(
        &client,
        "vllm:num_requests_running",
        Duration::from_secs(120),
        |n| n == 0.0,
    );
    is_idle(&client);
    // What the client finds, should it come back, ends in mid-stream.
    let mut rest = Vec::new();
    let _ = lazy.read_to_end(&mut rest);
    assert!(!String::from_utf8_lossy(&rest).contains("[DONE]"));
}

//! Several routers behind one gateway, each with a worker of its own: prefixes stay where they were computed, the load
//! is shared, and a router that is drained loses nothing.

use std::sync::Mutex;
use std::thread;

use conclave_tests::client::ids;
use conclave_tests::server::{PATIENT, TOKEN, signal};
use conclave_tests::{Client, Server};
use serde_json::{Value, json};

const CONVERSATIONS: usize = 24;
const TURNS: usize = 8;
const AT_ONCE: usize = 6;
/// Tokens that all conversations begin with.
const SHARED: u64 = 1536;
/// Tokens that each turn adds, beside the answer's.
const ADDED: u64 = 60;

struct Group {
    routers: Vec<Server>,
    // Killed with the group.
    _workers: Vec<Server>,
    gateway: Server,
    client: Client,
}

fn start(count: usize) -> Group {
    let env = [&[TOKEN], &PATIENT[..]].concat();
    let router = || Server::spawn(&["router", "--grpc-port", "0", "--cluster-port", "0"], &env);
    let routers: Vec<Server> = (0..count).map(|_| router()).collect();
    let worker = |router: &Server| Server::worker(&router.address("workers"), &[]);
    let workers = routers.iter().map(worker).collect();
    let addresses: Vec<String> = routers.iter().map(|router| router.address("gRPC")).collect();
    let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
    let gateway = Server::gateway(&addresses);
    let client = Client::new(&gateway.address("HTTP"));
    conclave_tests::metrics::wait_for(
        &client,
        "conclave:workers",
        std::time::Duration::from_secs(90),
        |workers| workers as usize == count,
    );
    // A router serves once its worker has loaded, and the gateway sees it within a second.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(90);
    loop {
        let health = client.get("/health").body;
        let serving = health["routers"].as_array().map_or(0, |routers| {
            routers
                .iter()
                .filter(|router| router["state"] == "serving")
                .count()
        });
        if serving == count {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "{health}");
        thread::sleep(std::time::Duration::from_millis(100));
    }
    thread::sleep(std::time::Duration::from_millis(1500));
    Group {
        routers,
        _workers: workers,
        gateway,
        client,
    }
}

fn token(salt: u64, position: u64) -> u64 {
    (salt * 7919 + position * 104_729 + position * position) % 3000
}

/// Agents that append to what they sent before, some at a time; the answer's tokens are part of the next prompt.
fn converse(client: &Client) {
    let next = Mutex::new(0..CONVERSATIONS as u64);
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let Some(conversation) = next.lock().expect("the counter").next() else {
                        return;
                    };
                    let mut prompt: Vec<u64> = (0..SHARED).map(|at| token(1, at)).collect();
                    for turn in 0..TURNS as u64 {
                        let salt = 100 + conversation * 50 + turn;
                        prompt.extend((0..ADDED).map(|at| token(salt, at)));
                        let body = json!({"prompt": prompt, "max_tokens": 6, "ignore_eos": true, "temperature": 0, "return_token_ids": true});
                        let answer = client.post("/v1/completions", &body);
                        assert_eq!(answer.status, 200, "{}", answer.body);
                        prompt.extend(ids(&answer.body["choices"][0]["token_ids"]));
                    }
                }
            });
        }
    });
}

/// A counter of each router, in the order of their addresses.
fn of_each(text: &str, name: &str) -> Vec<f64> {
    let lines = text
        .lines()
        .filter(|line| line.starts_with(name) && line[name.len()..].starts_with('{'));
    let mut found: Vec<(String, f64)> = lines
        .map(|line| {
            let router = line
                .split("router=\"")
                .nth(1)
                .and_then(|rest| rest.split('"').next());
            let value = line.rsplit(' ').next().and_then(|value| value.parse().ok());
            (router.unwrap_or_default().to_owned(), value.unwrap_or(0.0))
        })
        .collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    let mut sums: Vec<(String, f64)> = Vec::new();
    for (router, value) in found {
        match sums.last_mut() {
            Some(last) if last.0 == router => last.1 += value,
            _ => sums.push((router, value)),
        }
    }
    sums.into_iter().map(|(_, value)| value).collect()
}

/// Share of the prompts' tokens that were found in a prefix cache, and the requests of each router.
fn figures(client: &Client) -> (f64, Vec<f64>) {
    let text = client.get_text("/metrics");
    let sum = |name: &str| of_each(&text, name).iter().sum::<f64>();
    let rate = sum("vllm:prefix_cache_hits_total") / sum("vllm:prefix_cache_queries_total");
    (rate, of_each(&text, "vllm:request_success_total"))
}

#[test]
fn three_routers_share_agents_and_one_may_be_drained() {
    let single = {
        let group = start(1);
        converse(&group.client);
        figures(&group.client).0
    };
    let group = start(3);
    converse(&group.client);
    let (rate, requests) = figures(&group.client);
    println!(
        "prefix hit rate: {single:.4} with one router, {rate:.4} with three; requests of each: {requests:?}"
    );
    assert!(
        rate > single * 0.95,
        "{rate} with three routers, {single} with one"
    );
    let even = (CONVERSATIONS * TURNS) as f64 / 3.0;
    assert_eq!(requests.len(), 3);
    assert!(
        requests.iter().all(|count| (count - even).abs() <= 0.2 * even),
        "{requests:?}"
    );

    // One is told to go while all are at work.
    let Group {
        mut routers,
        gateway,
        client,
        ..
    } = group;
    let drained = routers.remove(0);
    let done: Vec<Value> = thread::scope(|scope| {
        let run = |at: u64| {
            let client = &client;
            scope.spawn(move || {
                thread::sleep(std::time::Duration::from_millis(at * 30));
                let body =
                    json!({"prompt": [1, 2, 3 + at], "max_tokens": 60, "ignore_eos": true, "temperature": 0});
                let answer = client.post("/v1/completions", &body);
                assert_eq!(answer.status, 200, "{}", answer.body);
                answer.body["usage"]["completion_tokens"].clone()
            })
        };
        let running: Vec<_> = (0..40).map(run).collect();
        thread::sleep(std::time::Duration::from_millis(300));
        signal(drained.pid(), libc::SIGTERM);
        running
            .into_iter()
            .map(|request| request.join().expect("a request"))
            .collect()
    });
    assert!(done.iter().all(|tokens| *tokens == 60), "{done:?}");
    assert_eq!(drained.stop().code(), Some(0));
    println!("a router drained under {} requests: none lost", done.len());
    assert_eq!(gateway.stop().code(), Some(0));
}

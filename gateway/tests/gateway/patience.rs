//! Who is waited for, and how long: senders and readers that are slow, clients that leave, routers that say nothing.
//!
//! Proves invariant B1 of ARCHITECTURE.md.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use conclave_gateway::Limits;
use serde_json::json;
use tokio::io::AsyncWriteExt;

use crate::client::{PATIENCE, Reply, read_to_end, read_until};
use crate::router::{Step, hello, say, start, start_with, started, text};

pub const SHORT: Duration = Duration::from_millis(300);

#[tokio::test]
async fn slow_senders_lose_their_connection() {
    let setup = start_with(
        |config| {
            config.limits.header_read_timeout = SHORT;
            config.limits.body_read_timeout = SHORT;
        },
        |_| Ok(say(hello())),
    )
    .await;
    let partial_body = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 14\r\n\r\n{\"pro";
    for (name, bytes, status) in [
        ("says nothing", "", 0),
        ("part of the HTTP/2 preface", "PRI * HT", 0),
        ("half a request line", "GET /ver", 0),
        ("half the headers", "GET /version HTTP/1.1\r\nHost: a\r\n", 0),
        ("half the body", partial_body, 408),
    ] {
        let began = Instant::now();
        let mut stream = setup.client.connect().await;
        stream.write_all(bytes.as_bytes()).await.unwrap();
        let reply = Reply::parse(&read_to_end(&mut stream).await);
        assert_eq!(reply.status, status, "{name}");
        let usual = Limits::default().header_read_timeout;
        assert!(began.elapsed() < usual, "{name}");
    }
    // One byte at a time does not win time: the last one comes too late.
    let mut stream = setup.client.connect().await;
    for byte in "GET /version HTTP/1.1\r\nHost: abcdefghijklmnopqrstuvwxyz\r\n\r\n".bytes() {
        if stream.write_all(&[byte]).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let answer = read_to_end(&mut stream).await;
    assert!(!String::from_utf8_lossy(&answer).contains("200 OK"));
    // A kept connection that is idle is closed as well.
    let mut stream = setup.client.connect().await;
    stream
        .write_all(b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n")
        .await
        .unwrap();
    assert!(
        String::from_utf8(read_to_end(&mut stream).await)
            .unwrap()
            .contains("200 OK")
    );
}

/// More text than all buffers between router and client hold.
pub fn endless() -> Vec<Step> {
    let piece = "x".repeat(16 << 10);
    let mut steps = say(vec![started(&[1])]);
    steps.extend((0..4096).map(|_| Step::Say(text(0, &piece, &[1]))));
    steps
}

#[tokio::test]
async fn a_stream_that_nobody_reads_is_cut_and_its_call_dropped() {
    let setup = start_with(|config| config.limits.write_timeout = SHORT, |_| Ok(endless())).await;
    let mut slow = setup.client.connect().await;
    let body = json!({"prompt": "a", "stream": true}).to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    slow.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    wait_for(|| setup.seen.dropped.load(Ordering::SeqCst) == 1).await;
    // Others are not disturbed.
    assert_eq!(setup.client.get("/version").await.status, 200);
    let rest = read_to_end(&mut slow).await;
    assert!(!rest.ends_with(b"0\r\n\r\n"), "a cut stream must not look whole");
}

#[tokio::test]
async fn a_large_whole_answer_that_nobody_reads_is_cut() {
    let setup = start_with(
        |config| config.limits.write_timeout = SHORT,
        |_| {
            let mut steps = endless();
            steps.extend(say(vec![
                crate::router::finished(0, conclave_proto::v1::FinishReason::Stop),
                crate::router::usage(1, 1, 0, 0),
            ]));
            Ok(steps)
        },
    )
    .await;
    let mut slow = setup.client.connect().await;
    slow.write_all(
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 14\r\n\r\n{\"prompt\":\"a\"}",
    )
    .await
    .unwrap();
    wait_for(|| setup.seen.generate.lock().unwrap().len() == 1).await;
    // Until only the connection that asks is left.
    wait_until(async || {
        let figures = setup.client.get("/metrics").await.body;
        figures
            .lines()
            .any(|line| line == "conclave_gateway_connections 1")
    })
    .await;
    let all = read_to_end(&mut slow).await;
    assert!(all.len() < 4096 * (16 << 10), "{}", all.len());
}

pub async fn wait_for(mut condition: impl FnMut() -> bool) {
    wait_until(async || condition()).await;
}

pub async fn wait_until(mut condition: impl AsyncFnMut() -> bool) {
    tokio::time::timeout(PATIENCE, async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("the condition never came true");
}

#[tokio::test]
async fn clients_that_leave_drop_their_calls() {
    let setup =
        start(|_| Ok([say(vec![started(&[1]), text(0, "a", &[1])]), vec![Step::Hang]].concat())).await;
    let post = |body: &str| {
        format!(
            "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    const CLIENTS: usize = 50;
    for stream in [true, false] {
        let body = json!({"prompt": ["a", "b"], "stream": stream}).to_string();
        let mut connections = Vec::new();
        for _ in 0..CLIENTS {
            let mut connection = setup.client.connect().await;
            connection.write_all(post(&body).as_bytes()).await.unwrap();
            connections.push(connection);
        }
        wait_for(|| setup.seen.running.load(Ordering::SeqCst) == 2 * CLIENTS).await;
        drop(connections);
        wait_for(|| setup.seen.running.load(Ordering::SeqCst) == 0).await;
    }
    assert_eq!(setup.seen.dropped.load(Ordering::SeqCst), 4 * CLIENTS);
}

const STREAMS: [(&str, &str); 2] = [
    ("/v1/completions", r#"{"prompt":"a","stream":true}"#),
    (
        "/v1/chat/completions",
        r#"{"messages":[{"role":"user","content":"a"}],"stream":true}"#,
    ),
];

#[tokio::test]
async fn while_a_router_is_silent_comments_are_sent() {
    let setup = start_with(
        |config| config.limits.keep_alive_interval = Duration::from_millis(50),
        |_| Ok(vec![Step::Hang]),
    )
    .await;
    for (path, body) in STREAMS {
        let mut stream = setup.client.connect().await;
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream
            .write_all(format!("{head}{body}").as_bytes())
            .await
            .unwrap();
        for _ in 0..2 {
            read_until(&mut stream, ": keep-alive\n\n").await;
        }
    }
}

#[tokio::test]
async fn a_routers_keep_alive_becomes_a_comment() {
    use conclave_proto::v1::KeepAlive;
    use conclave_proto::v1::generate_response::Event;
    let setup = start_with(
        |config| config.limits.keep_alive_interval = Duration::from_secs(3600),
        |_| Ok([say(vec![Event::KeepAlive(KeepAlive::default())]), say(hello())].concat()),
    )
    .await;
    for (path, body) in STREAMS {
        let body = serde_json::from_str(body).unwrap();
        let reply = setup.client.post(path, &body).await;
        assert!(reply.body.starts_with(": keep-alive\n\n"), "{reply:?}");
        assert_eq!(reply.body.matches(": keep-alive").count(), 1, "{reply:?}");
        assert!(reply.body.ends_with("data: [DONE]\n\n"));
    }
}

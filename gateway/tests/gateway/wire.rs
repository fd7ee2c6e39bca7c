//! The wire: ambiguous requests, headers, pipelining, connection limits.
//!
//! Proves invariant B1 of ARCHITECTURE.md.

use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::client::{Reply, read_to_end, read_until};
use crate::router::{hello, say, start_saying, start_with};

#[tokio::test]
async fn requests_with_two_readings_are_refused_and_the_connection_ends() {
    let setup = start_saying(hello()).await;
    let body = "{\"prompt\":\"a\"}";
    let post = |headers: &str, body: &str| {
        format!("POST /v1/completions HTTP/1.1\r\nHost: a\r\n{headers}\r\n{body}")
    };
    let chunked = format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
    let length = body.len();
    let cases = [
        (
            "CL.TE",
            post(
                &format!("Content-Length: {length}\r\nTransfer-Encoding: chunked\r\n"),
                &chunked,
            ),
        ),
        (
            "TE.CL",
            post(
                &format!("Transfer-Encoding: chunked\r\nContent-Length: {length}\r\n"),
                &chunked,
            ),
        ),
        (
            "TE.TE",
            post(
                "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
                &chunked,
            ),
        ),
        (
            "TE twice",
            post(
                "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
                &chunked,
            ),
        ),
        ("TE not chunked", post("Transfer-Encoding: gzip\r\n", &chunked)),
        ("TE xchunked", post("Transfer-Encoding: xchunked\r\n", &chunked)),
        (
            "TE space before colon",
            post("Transfer-Encoding : chunked\r\n", &chunked),
        ),
        ("TE folded", post("Transfer-Encoding:\r\n chunked\r\n", &chunked)),
        (
            "CL twice",
            post(
                &format!("Content-Length: {length}\r\nContent-Length: {length}\r\n"),
                body,
            ),
        ),
        (
            "CL differ",
            post(
                &format!("Content-Length: {length}\r\nContent-Length: 3\r\n"),
                body,
            ),
        ),
        (
            "CL list",
            post(&format!("Content-Length: {length}, {length}\r\n"), body),
        ),
        ("CL signed", post(&format!("Content-Length: +{length}\r\n"), body)),
        ("CL negative", post("Content-Length: -1\r\n", body)),
        (
            "CL huge",
            post("Content-Length: 99999999999999999999999\r\n", body),
        ),
        (
            "two hosts",
            post(&format!("Host: b\r\nContent-Length: {length}\r\n"), body),
        ),
        (
            "bare line feeds",
            post(&format!("Content-Length: {length}\r\n"), body).replace("\r\n", "\n"),
        ),
        (
            "bare line feed",
            format!("POST /v1/completions HTTP/1.1\r\nHost: a\nContent-Length: {length}\r\n\r\n{body}"),
        ),
        (
            "bare carriage return",
            format!(
                "POST /v1/completions HTTP/1.1\r\nHost: a\rX: b\r\nContent-Length: {length}\r\n\r\n{body}"
            ),
        ),
        (
            "folded header",
            post(&format!("X: a\r\n b\r\nContent-Length: {length}\r\n"), body),
        ),
        (
            "NUL in header",
            post(&format!("X: a\0b\r\nContent-Length: {length}\r\n"), body),
        ),
        (
            "no colon",
            post(&format!("nonsense\r\nContent-Length: {length}\r\n"), body),
        ),
        (
            "HTTP/1.0 with TE",
            post("Transfer-Encoding: chunked\r\n", &chunked).replacen("HTTP/1.1", "HTTP/1.0", 1),
        ),
        (
            "HTTP/3.0",
            post(&format!("Content-Length: {length}\r\n"), body).replacen("HTTP/1.1", "HTTP/3.0", 1),
        ),
        (
            "space in target",
            post(&format!("Content-Length: {length}\r\n"), body).replacen(
                "/v1/completions",
                "/v1/ completions",
                1,
            ),
        ),
        (
            "chunk size not hex",
            post("Transfer-Encoding: chunked\r\n", &chunked).replacen("e\r\n{", "z\r\n{", 1),
        ),
        (
            "chunk size overflow",
            post("Transfer-Encoding: chunked\r\n", "fffffffffffffffff\r\n"),
        ),
        (
            "chunk without its end",
            post(
                "Transfer-Encoding: chunked\r\n",
                &format!("{:x}\r\n{body}X0\r\n\r\n", body.len()),
            ),
        ),
        (
            "nonsense",
            String::from("\x16\x03\x01\x02\x00\x01\x00\x01\x7c\x03\x03 hello\r\n\r\n"),
        ),
    ];
    for (name, request) in cases {
        // A second request behind it must never be answered.
        let bytes = format!("{request}GET /version HTTP/1.1\r\nHost: a\r\n\r\n");
        let mut stream = setup.client.connect().await;
        stream.write_all(bytes.as_bytes()).await.unwrap();
        let all = read_to_end(&mut stream).await;
        let reply = Reply::parse(&all);
        assert!(matches!(reply.status, 0 | 400), "{name}: {reply:?}");
        assert!(!String::from_utf8_lossy(&all).contains("\"version\""), "{name}");
    }
    assert!(setup.seen.generate.lock().unwrap().is_empty());
}

#[tokio::test]
async fn pipelined_and_split_requests_are_answered_in_order() {
    let setup = start_saying(hello()).await;
    let post = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 14\r\n\r\n{\"prompt\":\"a\"}";
    let last = "GET /version HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    for step in [1, 7, 10_000] {
        let mut stream = setup.client.connect().await;
        stream.set_nodelay(true).unwrap();
        for piece in format!("{post}{post}{last}").as_bytes().chunks(step) {
            stream.write_all(piece).await.unwrap();
        }
        let all = String::from_utf8(read_to_end(&mut stream).await).unwrap();
        assert_eq!(all.matches("text_completion").count(), 2, "{all}");
        assert!(all.ends_with("{\"version\":\"0.1.0\"}"), "{all}");
    }
}

#[tokio::test]
async fn headers_have_a_size_and_a_number() {
    let setup = start_with(
        |config| {
            config.limits.header_bytes = 4096;
            config.limits.header_count = 10;
        },
        |_| Ok(say(hello())),
    )
    .await;
    let with = async |headers: String| {
        setup
            .client
            .raw(format!("GET /version HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{headers}\r\n").as_bytes())
            .await
            .status
    };
    assert_eq!(with(format!("X: {}\r\n", "a".repeat(3000))).await, 200);
    assert_eq!(with(format!("X: {}\r\n", "a".repeat(5000))).await, 431);
    assert_eq!(with("X: a\r\n".repeat(8)).await, 200);
    assert_eq!(with("X: a\r\n".repeat(9)).await, 431);
    let mut stream = setup.client.connect().await;
    // An endless request line must not be buffered.
    let _ = stream.write_all("GET /".as_bytes()).await;
    for _ in 0..64 {
        if stream.write_all(&[b'a'; 4096]).await.is_err() {
            break;
        }
    }
    assert!(matches!(
        Reply::parse(&read_to_end(&mut stream).await).status,
        0 | 414 | 431
    ));
}

#[tokio::test]
async fn connections_beyond_the_limit_are_told_so() {
    let setup = start_with(|config| config.limits.connections = 2, |_| Ok(say(hello()))).await;
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut stream = setup.client.connect().await;
        stream
            .write_all(b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n")
            .await
            .unwrap();
        read_until(&mut stream, "version").await;
        held.push(stream);
    }
    let mut third = setup.client.connect().await;
    let reply = Reply::parse(&read_to_end(&mut third).await);
    assert_eq!(
        (reply.status, reply.error().3),
        (503, json!("too_many_connections"))
    );
    drop(held);
    wait_for_status(&setup.client, 200).await;
}

async fn wait_for_status(client: &crate::client::Client, status: u16) {
    tokio::time::timeout(crate::client::PATIENCE, async {
        while client.get("/version").await.status != status {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("the status never came");
}

#[tokio::test]
async fn an_expected_continue_is_given_only_to_bodies_that_fit() {
    let setup = start_with(|config| config.limits.body_bytes = 100, |_| Ok(say(hello()))).await;
    let head = |length: usize| {
        format!(
            "POST /v1/completions HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
        )
    };
    let mut stream = setup.client.connect().await;
    stream.write_all(head(14).as_bytes()).await.unwrap();
    let mut piece = [0; 25];
    stream.read_exact(&mut piece).await.unwrap();
    assert_eq!(&piece, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"{\"prompt\":\"a\"}").await.unwrap();
    assert_eq!(Reply::parse(&read_to_end(&mut stream).await).status, 200);
    let mut stream = setup.client.connect().await;
    stream.write_all(head(1 << 40).as_bytes()).await.unwrap();
    assert_eq!(Reply::parse(&read_to_end(&mut stream).await).status, 413);
}

//! Bodies by their size: of one request, and of all together.

use serde_json::json;

use crate::router::{hello, say, start_saying, start_with};

const TEXT: &str = "/v1/completions";

#[tokio::test]
async fn the_body_limit_is_exact() {
    let setup = start_with(|config| config.limits.body_bytes = 1000, |_| Ok(say(hello()))).await;
    let body = |bytes: usize| {
        let frame = "{\"prompt\":\"\"}".len();
        format!("{{\"prompt\":\"{}\"}}", "a".repeat(bytes - frame))
    };
    for (bytes, status) in [(1000, 200), (1001, 413), (5_000_000, 413)] {
        let reply = setup.client.post_text(TEXT, body(bytes)).await;
        assert_eq!(reply.status, status, "{bytes}");
        let chunked = chunked(body(bytes).as_bytes());
        assert_eq!(setup.client.raw(&chunked).await.status, status, "{bytes} chunked");
    }
    let declared = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 1073741824\r\n\r\n";
    let reply = setup.client.raw(declared).await;
    assert_eq!((reply.status, reply.error().3), (413, json!("request_too_large")));
}

fn chunked(body: &[u8]) -> Vec<u8> {
    let head =
        "POST /v1/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n";
    let mut bytes = head.as_bytes().to_vec();
    for piece in body.chunks(700) {
        bytes.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
        bytes.extend_from_slice(piece);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"0\r\n\r\n");
    bytes
}

#[tokio::test]
async fn the_default_limit_takes_ten_mebibytes() {
    let setup = start_saying(hello()).await;
    let frame = "{\"prompt\":\"\"}".len();
    for (bytes, status) in [(10 << 20, 200), ((10 << 20) + 1, 413)] {
        let body = format!("{{\"prompt\":\"{}\"}}", "a".repeat(bytes - frame));
        assert_eq!(
            setup.client.post_as(TEXT, "", body).await.status,
            status,
            "{bytes}"
        );
    }
}

#[tokio::test]
async fn bodies_in_memory_have_a_common_bound() {
    let setup = start_with(
        |config| config.limits.bodies_in_memory_bytes = 64 << 10,
        |_| Ok(say(hello())),
    )
    .await;
    let body = |bytes: usize| format!("{{\"prompt\":\"{}\"}}", "a".repeat(bytes));
    assert_eq!(setup.client.post_as(TEXT, "", body(1000)).await.status, 200);
    let reply = setup.client.post_as(TEXT, "", body(200_000)).await;
    assert_eq!((reply.status, reply.error().3), (503, json!("server_busy")));
    // What was reserved came back.
    assert_eq!(setup.client.post_as(TEXT, "", body(1000)).await.status, 200);
}

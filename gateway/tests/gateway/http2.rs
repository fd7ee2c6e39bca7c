//! HTTP/2 on the wire: streams of one connection, and floods.
//!
//! Proves invariant B1 of ARCHITECTURE.md.

use std::sync::atomic::Ordering;

use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::json;
use tokio::io::AsyncWriteExt;

use crate::client::read_to_end;
use crate::patience::{SHORT, endless, wait_for};
use crate::router::{hello, say, start_saying, start_with};

#[tokio::test]
async fn http2_with_prior_knowledge_streams_many_at_once() {
    let setup = start_saying(hello()).await;
    let stream = setup.client.connect().await;
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    let requests = (0..40).map(|_| {
        let mut sender = sender.clone();
        async move {
            let body = json!({"prompt": "a", "stream": true}).to_string();
            let request =
                http::Request::post("http://a/v1/completions").body(Full::new(bytes::Bytes::from(body)));
            let response = sender.send_request(request.unwrap()).await.unwrap();
            assert_eq!(response.status(), 200);
            response.into_body().collect().await.unwrap().to_bytes()
        }
    });
    for body in futures::future::join_all(requests).await {
        assert!(body.ends_with(b"data: [DONE]\n\n"));
    }
}

#[tokio::test]
async fn an_http2_stream_that_nobody_reads_ends_alone() {
    let setup = start_with(
        |config| config.limits.write_timeout = SHORT,
        |request| Ok(if request.n == 2 { endless() } else { say(hello()) }),
    )
    .await;
    let stream = setup.client.connect().await;
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    let mut post = async |n: u32| {
        let body = json!({"prompt": "a", "stream": true, "n": n}).to_string();
        let request =
            http::Request::post("http://a/v1/completions").body(Full::new(bytes::Bytes::from(body)));
        sender.send_request(request.unwrap()).await.unwrap()
    };
    let unread = post(2).await;
    wait_for(|| setup.seen.dropped.load(Ordering::SeqCst) == 1).await;
    let read = post(1).await;
    let read = read.into_body().collect().await.unwrap().to_bytes();
    assert!(read.ends_with(b"data: [DONE]\n\n"));
    assert!(
        unread.into_body().collect().await.is_err(),
        "a cut stream must not look whole"
    );
}

#[tokio::test]
async fn http2_floods_end_the_connection() {
    let setup = start_saying(hello()).await;
    let frame = |kind: u8, flags: u8, stream: u32, payload: &[u8]| {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let mut bytes = length[1..].to_vec();
        bytes.extend_from_slice(&[kind, flags]);
        bytes.extend_from_slice(&stream.to_be_bytes());
        bytes.extend_from_slice(payload);
        bytes
    };
    // GET /version, all from HPACK's static table but the path.
    let get = [&[0x82, 0x86, 0x41, 0x01, b'a', 0x04, 0x08][..], b"/version"].concat();
    let rapid_reset: Vec<u8> = (0..2000_u32)
        .flat_map(|at| {
            let stream = 2 * at + 1;
            [
                frame(1, 5, stream, &get),
                frame(3, 0, stream, &8_u32.to_be_bytes()),
            ]
            .concat()
        })
        .collect();
    let continuation = {
        let mut bytes = frame(1, 1, 1, &get);
        (0..5000).for_each(|_| bytes.extend(frame(9, 0, 1, &[0x00, 0x01, b'x', 0x01, b'y'])));
        bytes
    };
    let empty_data = {
        let mut bytes = frame(1, 4, 1, &get);
        (0..50_000).for_each(|_| bytes.extend(frame(0, 0, 1, &[])));
        bytes
    };
    let unknown_stream = frame(0, 0, 99, b"data");
    for (name, flood) in [
        ("rapid reset", rapid_reset),
        ("continuation", continuation),
        ("empty data", empty_data),
        ("data on an idle stream", unknown_stream),
    ] {
        let mut stream = setup.client.connect().await;
        let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        bytes.extend(frame(4, 0, 0, &[]));
        bytes.extend(flood);
        let _ = stream.write_all(&bytes).await;
        let all = read_to_end(&mut stream).await;
        let goaway = all
            .windows(9)
            .any(|window| window[3] == 7 && window[5..9] == [0; 4]);
        assert!(goaway || all.len() < 200, "{name}: {} bytes", all.len());
    }
    assert_eq!(setup.client.get("/version").await.status, 200);
}

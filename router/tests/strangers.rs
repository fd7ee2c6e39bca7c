//! Connections to the workers' port without the cluster's token keep no worker out.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use support::{Answer, Cluster, Script, ScriptedWorker, config, expected, request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// The router lets so many be.
const STRANGERS: usize = 256;

/// Speaks HTTP/2 and then waits.
async fn stranger(cluster: &Cluster) -> TcpStream {
    let mut stream = TcpStream::connect(cluster.router.cluster_address())
        .await
        .unwrap();
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    let preface = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &settings].concat();
    stream.write_all(&preface).await.unwrap();
    stream
}

/// Whether the router has closed it, once everything before was read.
async fn is_closed(stream: &mut TcpStream, within: Duration) -> bool {
    let mut bytes = [0; 256];
    let end = async { while stream.read(&mut bytes).await.is_ok_and(|read| read > 0) {} };
    timeout(within, end).await.is_ok()
}

#[tokio::test]
async fn the_oldest_of_too_many_makes_room_and_workers_get_in_and_stay() {
    let cluster = Cluster::start(config()).await;
    let mut first = stranger(&cluster).await;
    let mut others = Vec::new();
    for _ in 0..STRANGERS {
        others.push(stranger(&cluster).await);
    }
    // Long before its own time is over.
    assert!(is_closed(&mut first, Duration::from_secs(3)).await);
    let _worker = cluster.attach(Script::new("a")).await;
    cluster.serving().await;
    for _ in 0..2 * STRANGERS {
        others.push(stranger(&cluster).await);
    }
    let answer = Answer::read(cluster.generate(request(&[5, 6], 8)).await.unwrap()).await;
    assert_eq!(answer.tokens, [expected(&[5, 6], 8)]);
    let mut last = others.pop().unwrap();
    assert!(is_closed(&mut last, Duration::from_secs(30)).await, "none stays");
    assert_eq!(cluster.metric("conclave:workers_lost_total").await, 0.0);
}

#[tokio::test]
async fn a_stranger_that_says_too_much_is_cut_off() {
    let cluster = Cluster::start(config()).await;
    let loud = Script::new("a").with(|hello| {
        hello.cluster_token = "no".into();
        hello.device_name = "x".repeat(1 << 20);
    });
    let refused = ScriptedWorker::attach(cluster.cluster_address(), loud).await;
    let status = refused.err().unwrap();
    assert_ne!(
        status.code(),
        tonic::Code::Unauthenticated,
        "it was read to its end: {status:?}"
    );
    let _worker = cluster.attach(Script::new("b")).await;
    cluster.serving().await;
}

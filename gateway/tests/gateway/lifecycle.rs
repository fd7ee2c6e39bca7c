//! Start, drain, end.

use std::time::{Duration, Instant};

use conclave_gateway::{Gateway, GatewayConfig};
use serde_json::json;
use tokio::io::AsyncWriteExt;

use crate::client::{PATIENCE, read_to_end, read_until};
use crate::router::{Step, hello, say, start_with, started, text};

fn config(routers: &[&str]) -> GatewayConfig {
    GatewayConfig::new(
        "127.0.0.1:0".parse().unwrap(),
        routers.iter().map(|router| (*router).to_owned()).collect(),
    )
}

async fn refusal(config: GatewayConfig) -> String {
    let error = Gateway::bind(config).await.err().expect("must be refused");
    format!("{error:#}")
}

#[tokio::test]
async fn bad_configurations_are_named() {
    assert!(refusal(config(&[])).await.contains("router"));
    for bad in ["", "not an address", "http://", "http://host", "host"] {
        let message = refusal(config(&[bad])).await;
        assert!(
            message.contains("router") && message.contains(bad),
            "{bad}: {message}"
        );
    }
    let mut empty_key = config(&["127.0.0.1:1"]);
    empty_key.api_keys = vec![String::from(" ")];
    assert!(refusal(empty_key).await.contains("api key"));
    let mut no_file = config(&["127.0.0.1:1"]);
    no_file.api_key_file = Some("/does/not/exist".into());
    assert!(refusal(no_file).await.contains("/does/not/exist"));
    let mut bad_origin = config(&["127.0.0.1:1"]);
    bad_origin.cors_origins = vec![String::from("a\nb")];
    assert!(refusal(bad_origin).await.contains("cors origin"));
    let taken = Gateway::bind(config(&["127.0.0.1:1"])).await.unwrap();
    let mut again = config(&["127.0.0.1:1"]);
    again.listen = taken.local_addr();
    assert!(refusal(again).await.contains(&taken.local_addr().to_string()));
}

async fn open_stream(client: &crate::client::Client) -> tokio::net::TcpStream {
    let mut stream = client.connect().await;
    let body = json!({"prompt": "a", "stream": true}).to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream
        .write_all(format!("{head}{body}").as_bytes())
        .await
        .unwrap();
    stream
}

#[tokio::test]
async fn what_runs_at_shutdown_is_finished() {
    let mut setup = start_with(
        |_| {},
        |_| {
            let mut steps = say(hello());
            steps.insert(2, Step::Wait(Duration::from_millis(500)));
            Ok(steps)
        },
    )
    .await;
    let mut stream = open_stream(&setup.client).await;
    read_until(&mut stream, "Hel").await;
    drop(setup.stop.take());
    let rest = String::from_utf8(read_to_end(&mut stream).await).unwrap();
    assert!(rest.contains("[DONE]"), "{rest}");
    tokio::time::timeout(PATIENCE, setup.served)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(
        tokio::net::TcpStream::connect(setup.client.address)
            .await
            .is_err()
    );
}

#[tokio::test]
async fn what_runs_too_long_at_shutdown_ends_with_an_error_event() {
    let mut setup = start_with(
        |config| config.drain_timeout = Duration::from_millis(300),
        |_| Ok([say(vec![started(&[1]), text(0, "a", &[1])]), vec![Step::Hang]].concat()),
    )
    .await;
    let mut stream = open_stream(&setup.client).await;
    read_until(&mut stream, "\"a\"").await;
    let began = Instant::now();
    drop(setup.stop.take());
    let rest = String::from_utf8(read_to_end(&mut stream).await).unwrap();
    assert!(
        rest.contains("shutting_down") && rest.contains("[DONE]"),
        "{rest}"
    );
    tokio::time::timeout(PATIENCE, setup.served)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(began.elapsed() < config(&[]).drain_timeout, "the usual time");
}

//! One streamed completion over HTTP/1.1, and GET of a text.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use super::{Prompts, Timing};

/// Longest line of an event stream, and longest text that is read whole.
const MAX_TEXT_BYTES: usize = 4 << 20;

/// Streams one completion from `host:port`.
pub async fn complete(address: &str, key: Option<&str>, prompts: &Prompts, index: usize) -> Result<Timing> {
    let body = json!({
        "prompt": prompts.tokens(index),
        "max_tokens": prompts.output,
        "ignore_eos": true,
        "temperature": 0,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    let mut request = Request::post("/v1/completions").header(header::CONTENT_TYPE, "application/json");
    if let Some(key) = key {
        request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
    }
    let request = request
        .header(header::HOST, address)
        .body(Full::from(body.to_string()))?;
    let started = Instant::now();
    let response = send(address, request).await?;
    if response.status() != StatusCode::OK {
        let status = response.status();
        bail!("{status}: {}", read_whole(response).await?);
    }
    read_events(response.into_body(), started).await
}

/// The text at a path, if it answers 200.
pub async fn get(address: &str, path: &str) -> Result<String> {
    let request = Request::get(path)
        .header(header::HOST, address)
        .body(Full::default())?;
    let response = send(address, request).await?;
    if response.status() != StatusCode::OK {
        bail!("{path}: {}", response.status());
    }
    read_whole(response).await
}

async fn send(address: &str, request: Request<Full<Bytes>>) -> Result<Response<Incoming>> {
    let stream = TcpStream::connect(address)
        .await
        .with_context(|| format!("nobody answers at {address}"))?;
    stream.set_nodelay(true)?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Its errors come back through the response.
    tokio::spawn(connection);
    Ok(sender.send_request(request).await?)
}

async fn read_whole(response: Response<Incoming>) -> Result<String> {
    let body = Limited::new(response.into_body(), MAX_TEXT_BYTES);
    let bytes = body
        .collect()
        .await
        .map_err(|error| anyhow::anyhow!(error))?
        .to_bytes();
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

async fn read_events(mut body: Incoming, started: Instant) -> Result<Timing> {
    let mut timing = Timing::default();
    let mut last = started;
    let mut pending = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        let now = Instant::now();
        pending.extend_from_slice(&data);
        if pending.len() > MAX_TEXT_BYTES {
            bail!("an event is longer than {MAX_TEXT_BYTES} bytes");
        }
        while let Some(end) = pending.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            let Some(event) = line.strip_prefix(b"data: ") else {
                continue;
            };
            if event.starts_with(b"[DONE]") {
                return Ok(timing);
            }
            let event: Value = serde_json::from_slice(event).context("an event is no JSON")?;
            if let Some(error) = event.get("error") {
                bail!("the stream ended with an error: {error}");
            }
            let has_tokens = event["choices"]
                .as_array()
                .is_some_and(|choices| !choices.is_empty());
            if has_tokens {
                if timing.first.is_zero() {
                    timing.first = now - started;
                } else {
                    timing.gaps.push(now - last);
                }
                last = now;
                timing.total = now - started;
            }
            if let Some(usage) = event.get("usage").filter(|usage| usage.is_object()) {
                let count = |name: &str| usage[name].as_u64().unwrap_or(0) as u32;
                timing.prompt_tokens = count("prompt_tokens");
                timing.tokens = count("completion_tokens");
            }
        }
    }
    bail!("the stream ended without [DONE]")
}

//! HTTP/1.1 as a client of a gateway: one connection per call, texts read whole, and event streams.

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

/// Longest line of an event stream, and longest text that is read whole.
const MAX_TEXT_BYTES: usize = 4 << 20;

/// host:port of an `http://` URL.
pub fn address(field: &str, url: &str) -> Result<String> {
    let Some(rest) = url.strip_prefix("http://") else {
        bail!("{field} is {url:?}: give http://host:port");
    };
    let rest = rest.trim_end_matches('/');
    let host = rest.strip_suffix("/v1").unwrap_or(rest);
    if host.is_empty() || host.contains('/') {
        bail!("{field} is {url:?}: give http://host:port without a path");
    }
    Ok(match host.rsplit_once(':') {
        Some((_, port)) if port.parse::<u16>().is_ok() => host.to_owned(),
        _ => format!("{host}:80"),
    })
}

/// The text at a path, if it answers 200.
pub async fn get(address: &str, key: Option<&str>, path: &str) -> Result<String> {
    let request = with_key(Request::get(path), key)
        .header(header::HOST, address)
        .body(Full::default())?;
    let response = send(address, request).await?;
    if response.status() != StatusCode::OK {
        bail!("{path}: {}", response.status());
    }
    read_whole(response).await
}

/// Posts a body with `"stream": true`; the events come as they are sent. An answer other than 200 is an error with the
/// server's message.
pub async fn post_for_events(
    address: &str,
    key: Option<&str>,
    path: &str,
    body: &Value,
) -> Result<EventStream> {
    let request = with_key(Request::post(path), key)
        .header(header::HOST, address)
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::from(body.to_string()))?;
    let response = send(address, request).await?;
    if response.status() != StatusCode::OK {
        let status = response.status();
        let text = read_whole(response).await?;
        let error: Option<Value> = serde_json::from_str(&text).ok();
        let message = error
            .as_ref()
            .and_then(|error| error["error"]["message"].as_str());
        bail!("{status}: {}", message.unwrap_or(&text));
    }
    Ok(EventStream {
        body: response.into_body(),
        pending: Vec::new(),
    })
}

fn with_key(request: hyper::http::request::Builder, key: Option<&str>) -> hyper::http::request::Builder {
    match key {
        Some(key) => request.header(header::AUTHORIZATION, format!("Bearer {key}")),
        None => request,
    }
}

async fn send(address: &str, request: Request<Full<Bytes>>) -> Result<Response<Incoming>> {
    let stream = TcpStream::connect(address).await.with_context(|| {
        format!("nobody answers at {address}; start a server with `conclave serve`, or correct the address")
    })?;
    stream.set_nodelay(true)?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Its errors come back through the response.
    tokio::spawn(connection);
    let response = sender.send_request(request).await;
    response.with_context(|| {
        format!("{address} does not answer in HTTP/1.1; the address that is printed as gRPC is given as grpc://{address}")
    })
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

/// Server-sent events of OpenAI's kind: JSON, then `[DONE]`. Dropping it cancels the call.
pub struct EventStream {
    body: Incoming,
    pending: Vec<u8>,
}

impl EventStream {
    /// `None` after `[DONE]`; a stream that ends without it, or with an error event, is an error.
    pub async fn next(&mut self) -> Result<Option<Value>> {
        loop {
            while let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                let Some(event) = line.strip_prefix(b"data: ") else {
                    continue;
                };
                if event.starts_with(b"[DONE]") {
                    return Ok(None);
                }
                let event: Value = serde_json::from_slice(event).context("an event is no JSON")?;
                if let Some(error) = event.get("error") {
                    bail!("the stream ended with an error: {error}");
                }
                return Ok(Some(event));
            }
            let Some(frame) = self.body.frame().await else {
                bail!("the stream ended without [DONE]");
            };
            if let Ok(data) = frame?.into_data() {
                self.pending.extend_from_slice(&data);
            }
            if self.pending.len() > MAX_TEXT_BYTES {
                bail!("an event is longer than {MAX_TEXT_BYTES} bytes");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::address;

    #[test]
    fn addresses_of_urls() {
        let of = |url| address("url", url).map_err(|error| error.to_string());
        assert_eq!(of("http://localhost:8000"), Ok("localhost:8000".into()));
        assert_eq!(of("http://localhost:8000/v1/"), Ok("localhost:8000".into()));
        assert_eq!(of("http://example.org"), Ok("example.org:80".into()));
        for bad in ["localhost:8000", "https://localhost", "http://", "http://a/b"] {
            assert!(
                of(bad).is_err_and(|error| error.contains("give http://host:port")),
                "{bad}"
            );
        }
    }
}

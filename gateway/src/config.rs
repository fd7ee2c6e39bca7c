//! What a gateway is told at start. Plain data: flags, files and environment are the command line's matter.
//!
//! Keeps invariant B1 of ARCHITECTURE.md.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::http::quota::KeyLimits;

/// Everything a gateway needs to know. Built with [`GatewayConfig::new`], then field by field.
#[derive(Clone, Debug)]
pub struct GatewayConfig {
    /// Where to listen; port 0 lets the system choose.
    pub listen: SocketAddr,
    /// Addresses of routers, `http://host:port`.
    pub routers: Vec<String>,
    /// Keys that clients may present. With none here and none in the file, the gateway is open.
    pub api_keys: Vec<String>,
    /// A file with one key a line (`#` starts a comment), read again whenever it changes. A key's own limits may
    /// follow it: `rpm=60 tpm=100000 concurrent=8`.
    pub api_key_file: Option<PathBuf>,
    /// What each key may use, where its line in the file says nothing else. Without keys, all clients together.
    pub key_limits: KeyLimits,
    /// Origins that browsers may call from; `*` allows any. Empty: no CORS headers.
    pub cors_origins: Vec<String>,
    /// Serves HTTPS instead of HTTP.
    pub tls: Option<TlsFiles>,
    /// How long running requests may go on after shutdown was asked for.
    pub drain_timeout: Duration,
    /// Bounds on what clients may cost.
    pub limits: Limits,
}

impl GatewayConfig {
    /// A gateway at `listen` in front of `routers`, open to all and with default limits.
    pub fn new(listen: SocketAddr, routers: Vec<String>) -> Self {
        Self {
            listen,
            routers,
            api_keys: Vec::new(),
            api_key_file: None,
            key_limits: KeyLimits::default(),
            cors_origins: Vec::new(),
            tls: None,
            drain_timeout: Duration::from_secs(30),
            limits: Limits::default(),
        }
    }
}

/// A certificate chain and its private key, as PEM files. Both are read again when one of them changes.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The chain, the server's own certificate first.
    pub certificate: PathBuf,
    /// PKCS#8, PKCS#1 or SEC1.
    pub key: PathBuf,
}

/// Bounds on what one client, and all of them, may cost. Every one has a test that reaches it.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Largest request body; beyond it 413.
    pub body_bytes: usize,
    /// Request bodies held in memory at one time, over all connections; beyond it 503.
    pub bodies_in_memory_bytes: usize,
    /// Open connections; one more is answered 503 and closed.
    pub connections: usize,
    /// Request line and headers together; beyond it 431.
    pub header_bytes: usize,
    /// Header lines of one request.
    pub header_count: usize,
    /// Streams that one HTTP/2 connection may have open.
    pub streams_per_connection: u32,
    /// From the first byte waited for (also of a kept connection's next request) to the end of the headers.
    pub header_read_timeout: Duration,
    /// From the end of the headers to the end of the body.
    pub body_read_timeout: Duration,
    /// A client that takes nothing for so long loses its connection or its stream.
    pub write_timeout: Duration,
    /// Events that wait for a slow reader before the router is held back.
    pub events_buffered: usize,
    /// Whole time of a request; none by default, because answers may be long.
    pub request_timeout: Option<Duration>,
    /// Silence on a stream after which a comment is sent, so that proxies keep it open.
    pub keep_alive_interval: Duration,
    /// Prompts of one `/v1/completions` request.
    pub prompts_per_request: usize,
    /// Answers that are collected whole (not streamed) may hold so much text.
    pub response_bytes: usize,
    /// Responses (`/v1/responses`) kept for `previous_response_id`.
    pub responses_stored: usize,
    /// What they may hold together.
    pub responses_stored_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 10 << 20,
            bodies_in_memory_bytes: 1 << 30,
            connections: 16_384,
            header_bytes: 32 << 10,
            header_count: 100,
            streams_per_connection: 256,
            header_read_timeout: Duration::from_secs(30),
            body_read_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            events_buffered: 64,
            request_timeout: None,
            keep_alive_interval: Duration::from_secs(15),
            prompts_per_request: 1024,
            response_bytes: 256 << 20,
            responses_stored: 10_000,
            responses_stored_bytes: 256 << 20,
        }
    }
}

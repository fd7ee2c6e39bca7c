//! What the gateway is told: where it listens, who may call and how much a client may cost.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::values::{bytes, duration};

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "HTTP")]
pub struct HttpSettings {
    /// Address to listen on; 0.0.0.0 for every interface.
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    pub host: String,
    /// Port of the HTTP API; 0 lets the system choose and prints it.
    #[arg(long, value_name = "PORT", default_value_t = 8000)]
    pub port: u16,
    /// Keys that clients must present; none: open to all.
    #[arg(long, value_name = "KEY", num_args = 1..)]
    pub api_key: Vec<String>,
    /// A file with one key a line, read again when it changes.
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Requests a minute of each key, where its line in the file says nothing else; without keys, of all clients together.
    #[arg(long, value_name = "N")]
    pub key_requests_per_minute: Option<u32>,
    /// Tokens a minute of each key, of prompts and answers.
    #[arg(long, value_name = "N")]
    pub key_tokens_per_minute: Option<u32>,
    /// Requests of each key at one time.
    #[arg(long, value_name = "N")]
    pub key_concurrent: Option<u32>,
    /// Certificate chain (PEM): HTTPS instead of HTTP. Read again when it changes.
    #[arg(long, value_name = "FILE", visible_alias = "ssl-certfile")]
    pub tls_cert: Option<PathBuf>,
    /// Private key of --tls-cert (PEM).
    #[arg(long, value_name = "FILE", visible_alias = "ssl-keyfile")]
    pub tls_key: Option<PathBuf>,
    /// Origins that browsers may call from; * for any.
    #[arg(long, value_name = "ORIGIN", num_args = 1..)]
    pub allowed_origins: Vec<String>,
    /// Largest request body.
    #[arg(long, value_name = "BYTES", default_value = "10MiB", value_parser = bytes)]
    pub max_body_bytes: u64,
    /// Open connections; one more is answered 503.
    #[arg(long, value_name = "N", default_value_t = 16_384)]
    pub max_connections: usize,
    /// Whole time a request may take; without it, no bound.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub request_timeout: Option<Duration>,
}

impl HttpSettings {
    /// Clients must present a key.
    pub fn needs_key(&self) -> bool {
        !self.api_key.is_empty() || self.api_key_file.is_some()
    }
}

/// How long a process may go on after SIGTERM.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Shutdown")]
pub struct DrainSettings {
    /// After SIGTERM, running requests may finish for so long.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub drain_timeout: Duration,
}

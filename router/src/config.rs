//! Everything a router can be told. Names follow vLLM's flags where there is one.
//!
//! Must stay true: a configuration that passes [`RouterConfig::check`] starts, or fails for a reason outside of it
//! (a port in use, a missing file).

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use crate::error::{Result, RouterError};

/// Sequences of one router; each costs an entry in a few tables.
pub const MAX_WAITING: usize = 1 << 20;
/// Slots per worker that a step message may name.
pub const MAX_NUM_SEQS: u32 = 4096;
/// A step's tokens on one worker.
pub const MAX_BATCHED_TOKENS: u32 = 1 << 20;
/// Names under which one model is served.
pub const MAX_SERVED_NAMES: usize = 64;
/// Tokens of one KV page.
pub const MAX_BLOCK_SIZE: u32 = 256;
/// A shared secret shorter than this can be guessed.
pub const MIN_CLUSTER_TOKEN_BYTES: usize = 8;

/// What a router is told at start.
#[derive(Clone)]
pub struct RouterConfig {
    /// Directory of the checkpoint; only its text files are read.
    pub model: PathBuf,
    /// Merged into config.json (`--hf-overrides`).
    pub hf_overrides: Option<serde_json::Value>,
    /// Names clients may use; empty: the directory's name.
    pub served_model_name: Vec<String>,
    /// Serve token ids in and out only.
    pub skip_tokenizer_init: bool,
    /// A Jinja file instead of the checkpoint's template.
    pub chat_template: Option<PathBuf>,
    /// Unset: chosen from the checkpoint.
    pub tool_call_parser: Option<String>,
    pub reasoning_parser: Option<String>,
    /// Take sampling defaults from generation_config.json (`--generation-config auto`), or only neutral ones.
    pub use_generation_config: bool,

    /// Where clients and gateways connect.
    pub listen: SocketAddr,
    /// Where workers connect.
    pub cluster_listen: SocketAddr,
    /// Workers present this.
    pub cluster_token: String,
    /// Fingerprint that workers must have; unset: the first worker's.
    pub checkpoint_id: Option<String>,
    /// Transport between workers: `auto`, `local`, `tcp`, `ipc` or `nccl`.
    pub transport: String,

    /// Form the first epoch when so many workers have attached.
    pub expected_workers: u32,
    /// Unset: the checkpoint's.
    pub max_model_len: Option<u32>,
    pub max_num_seqs: u32,
    pub max_num_batched_tokens: u32,
    /// Tokens per KV page.
    pub block_size: u32,
    pub enable_prefix_caching: bool,
    /// Sequences that may wait; one more is refused.
    pub max_waiting: usize,
    pub steps_in_flight: u32,

    pub heartbeat_interval: Duration,
    /// A worker silent for so long is lost.
    pub heartbeat_timeout: Duration,
    /// A collective never fails earlier than this.
    pub collective_deadline: Duration,
    /// Running sequences may finish for so long after a shutdown was asked for.
    pub drain_timeout: Duration,
    /// A stream without tokens gets a keep-alive this often.
    pub keep_alive_interval: Duration,
    /// Connections older than this are asked to reconnect; unset: never.
    pub max_connection_age: Option<Duration>,
    /// Threads for tokenizing, templates and grammars; 0: half the cores.
    pub text_threads: usize,
    /// Write prompts into logs and spans.
    pub log_prompts: bool,
}

impl RouterConfig {
    /// The defaults for a checkpoint, on loopback with free ports.
    pub fn new(model: PathBuf) -> RouterConfig {
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        RouterConfig {
            model,
            hf_overrides: None,
            served_model_name: Vec::new(),
            skip_tokenizer_init: false,
            chat_template: None,
            tool_call_parser: None,
            reasoning_parser: None,
            use_generation_config: true,
            listen: loopback,
            cluster_listen: loopback,
            cluster_token: String::new(),
            checkpoint_id: None,
            transport: "auto".into(),
            expected_workers: 1,
            max_model_len: None,
            max_num_seqs: 256,
            max_num_batched_tokens: 2048,
            block_size: 16,
            enable_prefix_caching: true,
            max_waiting: 1024,
            steps_in_flight: 2,
            heartbeat_interval: Duration::from_millis(100),
            heartbeat_timeout: Duration::from_secs(1),
            collective_deadline: Duration::from_millis(500),
            drain_timeout: Duration::from_secs(30),
            keep_alive_interval: Duration::from_secs(5),
            max_connection_age: None,
            text_threads: 0,
            log_prompts: false,
        }
    }

    /// Refuses what cannot work, naming the field.
    pub fn check(&self) -> Result<()> {
        in_range("max_num_seqs", self.max_num_seqs, 1, MAX_NUM_SEQS)?;
        in_range(
            "max_num_batched_tokens",
            self.max_num_batched_tokens,
            1,
            MAX_BATCHED_TOKENS,
        )?;
        in_range("block_size", self.block_size, 1, MAX_BLOCK_SIZE)?;
        in_range("max_waiting", self.max_waiting, 1, MAX_WAITING)?;
        in_range(
            "expected_workers",
            self.expected_workers,
            1,
            conclave_plan::limits::MAX_RANKS,
        )?;
        in_range("steps_in_flight", self.steps_in_flight, 1, 8)?;
        in_range(
            "served_model_name",
            self.served_model_name.len(),
            0,
            MAX_SERVED_NAMES,
        )?;
        if self.max_num_batched_tokens < self.max_num_seqs {
            return Err(RouterError::config(
                "max_num_batched_tokens",
                self.max_num_batched_tokens,
                format!("less than max_num_seqs ({})", self.max_num_seqs),
                "every running sequence needs at least one token of a step",
            ));
        }
        if self.max_model_len == Some(0) {
            return Err(RouterError::config(
                "max_model_len",
                0,
                "no token fits",
                "leave it unset",
            ));
        }
        if self.cluster_token.len() < MIN_CLUSTER_TOKEN_BYTES {
            return Err(RouterError::config(
                "cluster_token",
                format_args!("({} bytes)", self.cluster_token.len()),
                format!("shorter than {MIN_CLUSTER_TOKEN_BYTES} bytes"),
                "workers are let in by this secret: draw a random one",
            ));
        }
        let unused = [
            ("chat_template", self.chat_template.is_some()),
            ("tool_call_parser", self.tool_call_parser.is_some()),
            ("reasoning_parser", self.reasoning_parser.is_some()),
        ];
        if let Some((field, _)) = unused
            .into_iter()
            .find(|&(_, set)| set && self.skip_tokenizer_init)
        {
            return Err(RouterError::config(
                field,
                "set",
                "there is no text to use it on",
                "leave it out, or leave out --skip-tokenizer-init",
            ));
        }
        if self.heartbeat_timeout < 2 * self.heartbeat_interval {
            return Err(RouterError::config(
                "heartbeat_timeout",
                format_args!("{:?}", self.heartbeat_timeout),
                format!(
                    "less than twice heartbeat_interval ({:?})",
                    self.heartbeat_interval
                ),
                "one late heartbeat must not lose a worker",
            ));
        }
        if !["auto", "local", "tcp", "ipc", "nccl"].contains(&self.transport.as_str()) {
            return Err(RouterError::config(
                "transport",
                &self.transport,
                "unknown",
                "use auto, local, tcp, ipc or nccl",
            ));
        }
        for (field, value) in [
            ("heartbeat_interval", self.heartbeat_interval),
            ("keep_alive_interval", self.keep_alive_interval),
            ("collective_deadline", self.collective_deadline),
        ] {
            if value < Duration::from_millis(1) {
                return Err(RouterError::config(
                    field,
                    format_args!("{value:?}"),
                    "below 1 ms",
                    "give a longer time",
                ));
            }
        }
        Ok(())
    }
}

fn in_range<T: PartialOrd + fmt::Display>(field: &'static str, value: T, low: T, high: T) -> Result<()> {
    if value >= low && value <= high {
        return Ok(());
    }
    Err(RouterError::config(
        field,
        value,
        format!("not between {low} and {high}"),
        "give a value in that range",
    ))
}

impl fmt::Debug for RouterConfig {
    /// Without the cluster token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RouterConfig")
            .field("model", &self.model)
            .field("listen", &self.listen)
            .field("cluster_listen", &self.cluster_listen)
            .field("expected_workers", &self.expected_workers)
            .field("max_num_seqs", &self.max_num_seqs)
            .field("max_num_batched_tokens", &self.max_num_batched_tokens)
            .field("block_size", &self.block_size)
            .field("max_waiting", &self.max_waiting)
            .finish_non_exhaustive()
    }
}

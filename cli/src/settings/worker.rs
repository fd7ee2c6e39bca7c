//! `conclave worker`.

use clap::Args;

use super::{DeviceSettings, DrainSettings, LogSettings, ModelSettings};

#[derive(Args, Clone, Debug)]
pub struct WorkerSettings {
    #[command(flatten)]
    pub model: ModelSettings,
    /// host:port of the router's port for workers.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:50052")]
    pub router: String,
    /// Secret of the cluster; better given as CONCLAVE_CLUSTER_TOKEN than as a flag.
    #[arg(long, value_name = "TOKEN")]
    pub cluster_token: Option<String>,
    /// Address to listen on for the exchange with other workers.
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    pub peer_host: String,
    /// Port for the exchange with other workers; 0 lets the system choose.
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    pub peer_port: u16,
    /// Name or address under which other workers reach this one; without it, --peer-host.
    #[arg(long, value_name = "HOST")]
    pub peer_advertise: Option<String>,
    /// Position in the group, to keep placement stable over restarts; without it, any.
    #[arg(long, value_name = "N")]
    pub rank: Option<u32>,
    /// Tokens of one KV page; must be the router's.
    #[arg(
        long,
        value_name = "TOKENS",
        visible_alias = "page-size",
        default_value_t = 16
    )]
    pub block_size: u32,
    /// Sequences this worker has room for.
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_num_seqs: u32,
    /// Tokens of one step this worker has room for.
    #[arg(long, value_name = "TOKENS", value_parser = super::values::tokens, default_value = "2048")]
    pub max_num_batched_tokens: u32,
    /// Longest sequence this worker has room for; without it, the model's.
    #[arg(long, value_name = "TOKENS", value_parser = super::values::tokens)]
    pub max_model_len: Option<u32>,
    /// Workers that share the experts: on a GPU, what their shares leave is for the KV cache.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub expected_workers: u32,
    /// Started by `serve`: report loading on standard output, end when standard input closes.
    #[arg(long, hide = true)]
    pub child: bool,
    #[command(flatten)]
    pub device: DeviceSettings,
    #[command(flatten)]
    pub drain: DrainSettings,
    #[command(flatten)]
    pub log: LogSettings,
}

//! `conclave chat`.

use std::path::PathBuf;

use clap::Args;

use super::{LogSettings, ModelSettings};

#[derive(Args, Clone, Debug)]
pub struct ChatSettings {
    #[command(flatten)]
    pub model: ModelSettings,
    /// http://host:port of an OpenAI-compatible server, or grpc://host:port of a router. Without it, and without a MODEL,
    /// the server that runs at 127.0.0.1:8000; where none does, a local cluster is started.
    #[arg(long, value_name = "URL", conflicts_with_all = ["model", "model_position"])]
    pub url: Option<String>,
    /// Key for the server.
    #[arg(long, value_name = "KEY")]
    pub chat_api_key: Option<String>,
    /// Served name of the model; without it, the first one that is served.
    #[arg(long, value_name = "NAME")]
    pub served_model: Option<String>,
    /// System message.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// JSON file with the list of tools that the model may call; you type their results.
    #[arg(long, value_name = "FILE")]
    pub tools: Option<PathBuf>,
    /// Tokens of one answer at most.
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<u32>,
    /// 0 is greedy; without it, the server's default.
    #[arg(long, value_name = "T")]
    pub temperature: Option<f32>,
    /// Same seed, same answers.
    #[arg(long, value_name = "SEED")]
    pub seed: Option<u64>,
    #[command(flatten)]
    pub log: LogSettings,
}

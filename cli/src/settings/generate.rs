//! `conclave generate`.

use clap::Args;
use clap::builder::BoolishValueParser;

use super::LogSettings;

#[derive(Args, Clone, Debug)]
pub struct GenerateSettings {
    /// What to say to the model; `-` reads it from standard input.
    #[arg(value_name = "PROMPT")]
    pub prompt: String,
    /// host:port of the router's gRPC API.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:50051")]
    pub router: String,
    /// Served name of the model; without it, the one that is served.
    #[arg(long, value_name = "NAME", default_value = "")]
    pub served_model: String,
    /// System message.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Continue the prompt as plain text instead of answering it as a chat.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub raw: bool,
    /// Tokens to generate at most; without it, up to the model's length.
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<u64>,
    /// 0 is greedy; without it, the checkpoint's default.
    #[arg(long, value_name = "T")]
    pub temperature: Option<f32>,
    /// Only the likeliest tokens that together have this probability; without it, the checkpoint's default.
    #[arg(long, value_name = "P")]
    pub top_p: Option<f32>,
    /// Only so many of the likeliest tokens, 0 for all; without it, the checkpoint's default.
    #[arg(long, value_name = "K")]
    pub top_k: Option<i32>,
    /// Same seed, same answer.
    #[arg(long, value_name = "SEED")]
    pub seed: Option<u64>,
    /// Texts that end the answer.
    #[arg(long, value_name = "TEXT", num_args = 1..)]
    pub stop: Vec<String>,
    #[command(flatten)]
    pub log: LogSettings,
}

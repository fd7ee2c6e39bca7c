//! What the router is told: names, lengths, batching, cache and the cluster's clocks.

use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{Args, ValueEnum};

use super::FormatSettings;
use super::values::{duration, tokens};

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Serving")]
pub struct EngineSettings {
    /// Names clients may use; the first is the one shown. Without it, the model's directory.
    #[arg(long, value_name = "NAME", num_args = 1..)]
    pub served_model_name: Vec<String>,
    /// Longest sequence in tokens; 32k and 32K are understood. Without it, the model's.
    #[arg(long, value_name = "TOKENS", visible_alias = "context-length", value_parser = tokens)]
    pub max_model_len: Option<u32>,
    /// Running sequences per worker.
    #[arg(
        long,
        value_name = "N",
        visible_alias = "max-running-requests",
        default_value_t = 256
    )]
    pub max_num_seqs: u32,
    /// Tokens per worker and step; longer prompts are cut into chunks of it.
    #[arg(long, value_name = "TOKENS", visible_alias = "chunked-prefill-size", value_parser = tokens, default_value = "2048")]
    pub max_num_batched_tokens: u32,
    /// Tokens of one KV page.
    #[arg(
        long,
        value_name = "TOKENS",
        visible_alias = "page-size",
        default_value_t = 16
    )]
    pub block_size: u32,
    /// Share the KV pages of equal prefixes (--no-enable-prefix-caching switches it off).
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub enable_prefix_caching: bool,
    /// Accepted for vLLM's sake: prefill is always chunked.
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true", value_parser = only_true)]
    pub enable_chunked_prefill: bool,
    /// Requests that may wait; one more is answered 429.
    #[arg(
        long,
        value_name = "N",
        visible_alias = "max-queued-requests",
        default_value_t = 1024
    )]
    pub max_waiting: usize,
    /// Steps sent ahead of the last result.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub steps_in_flight: u32,
    /// Where defaults of sampling come from.
    #[arg(long, value_enum, default_value_t = GenerationConfig::Auto)]
    pub generation_config: GenerationConfig,
    /// Serve token ids in and out only; for checkpoints with no tokenizer.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub skip_tokenizer_init: bool,
    #[command(flatten)]
    pub format: FormatSettings,
    /// Accepted for vLLM's sake: tools are always served where the checkpoint's template takes them.
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true", value_parser = tools_always)]
    pub enable_auto_tool_choice: bool,
    /// Threads for tokenizing, templates and grammars; 0 takes half the cores.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub text_threads: usize,
    /// Write prompts into logs and spans.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub log_prompts: bool,
}

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Cluster")]
pub struct ClusterSettings {
    /// How workers exchange tokens.
    #[arg(long, value_enum, default_value_t = Transport::Auto)]
    pub transport: Transport,
    /// A worker that is silent for so long is lost.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = duration)]
    pub heartbeat_timeout: Duration,
    /// A collective operation never fails earlier than this.
    #[arg(long, value_name = "TIME", default_value = "500ms", value_parser = duration)]
    pub collective_deadline: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum GenerationConfig {
    /// The checkpoint's generation_config.json.
    Auto,
    /// Neutral values, whatever the checkpoint says.
    Vllm,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// local for one worker, else the fastest that all workers have.
    Auto,
    Local,
    Tcp,
    Ipc,
    Nccl,
}

impl Transport {
    pub fn name(self) -> &'static str {
        match self {
            Transport::Auto => "auto",
            Transport::Local => "local",
            Transport::Tcp => "tcp",
            Transport::Ipc => "ipc",
            Transport::Nccl => "nccl",
        }
    }
}

fn only_true(text: &str) -> Result<bool, String> {
    match text {
        "true" | "1" => Ok(true),
        _ => Err("prefill is always chunked, by --max-num-batched-tokens".into()),
    }
}

fn tools_always(text: &str) -> Result<bool, String> {
    match text {
        "true" | "1" => Ok(true),
        _ => Err("a request that wants no tools says tool_choice none".into()),
    }
}

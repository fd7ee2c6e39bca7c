//! `conclave bench`.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{Args, ValueEnum};

use super::values::{duration, rate, tokens};
use super::{DeviceSettings, LogSettings, ModelSettings, Transport};

#[derive(Args, Clone, Debug)]
pub struct BenchSettings {
    #[command(flatten)]
    pub model: ModelSettings,
    /// Every op of a model's step on this CPU, beside the floor measured on the spot.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub ops: bool,
    /// The router's core alone: time per scheduling step, and of a long prompt's lookup and insertion.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub core: bool,
    /// A whole model: its steps in this process (decode, prefill), a cluster under load (serve, agent, soak, divergence),
    /// or reading its files (load).
    #[arg(long, value_enum)]
    pub scenario: Option<Scenario>,
    /// Ranks of the group.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub workers: u32,
    /// What the ranks of decode and prefill exchange tokens over; auto: tcp between CPUs, ipc between GPUs.
    #[arg(long, value_enum, default_value_t = Transport::Auto)]
    pub transport: Transport,
    /// Formats for --ops: f32, f16, bf16, fp8, int4, int4-g32.
    #[arg(
        long,
        value_name = "FORMAT",
        value_delimiter = ',',
        default_value = "bf16,fp8,int4"
    )]
    pub formats: Vec<String>,
    /// Tokens in a step for --ops; sequences (decode) or prompt tokens (prefill, text).
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,8,512")]
    pub batch: Vec<usize>,
    /// Tokens that each sequence has before decode is measured.
    #[arg(long, value_name = "TOKENS", default_value = "128", value_parser = tokens)]
    pub context: u32,
    /// After each measurement, a table of the kernels of one step (GPUs only); with serve decode is measured alone, too.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub profile: bool,
    /// Write the figures as JSON, too.
    #[arg(long, value_name = "FILE")]
    pub result_filename: Option<PathBuf>,
    #[command(flatten)]
    pub device: DeviceSettings,
    #[command(flatten)]
    pub load: LoadSettings,
    #[command(flatten)]
    pub agent: AgentSettings,
    #[command(flatten)]
    pub log: LogSettings,
}

/// `--scenario serve`, in the words of `vllm bench serve`.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Load (--scenario serve)")]
pub struct LoadSettings {
    /// http://host:port of a running gateway, or with --backend grpc of a router; without it, a cluster is started.
    #[arg(long, value_name = "URL")]
    pub base_url: Option<String>,
    /// Which API carries the load.
    #[arg(long, value_enum, default_value_t = Backend::Openai)]
    pub backend: Backend,
    /// Requests in all.
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub num_prompts: usize,
    /// Clients; each sends its next request when its last has ended.
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub max_concurrency: usize,
    /// Prompt tokens, drawn at random.
    #[arg(long, value_name = "N", default_value = "128", value_parser = tokens, visible_alias = "input-len")]
    pub random_input_len: u32,
    /// Prompt tokens that all requests begin with.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub random_prefix_len: u32,
    /// Tokens to generate, whatever the model would end with.
    #[arg(long, value_name = "N", default_value = "128", value_parser = tokens, visible_alias = "output-len")]
    pub random_output_len: u32,
    /// How long a soak takes.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = duration)]
    pub duration: Duration,
    /// Requests per second of a soak.
    #[arg(long, value_name = "RATE", default_value_t = 8.0, value_parser = rate)]
    pub request_rate: f64,
    /// A soak fails if KV pages never ran out, so that no sequence gave way to others.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub expect_preemption: bool,
    /// Seed of the prompts.
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    pub seed: u64,
    /// Further flags for the cluster that is started, as `conclave serve` takes them, in one string.
    #[arg(long, value_name = "FLAGS", allow_hyphen_values = true)]
    pub serve_args: Option<String>,
    /// Key for the gateway.
    #[arg(long, value_name = "KEY")]
    pub bench_api_key: Option<String>,
}

/// `--scenario agent`: one conversation that grows turn by turn.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Conversation (--scenario agent)")]
pub struct AgentSettings {
    /// Turns of the conversation.
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub turns: u32,
    /// Tokens that the conversation begins with: system prompt and tool schemas.
    #[arg(long, value_name = "N", default_value = "8192", value_parser = tokens)]
    pub shared_prefix_len: u32,
    /// Tokens that each turn adds: a tool's result.
    #[arg(long, value_name = "N", default_value = "128", value_parser = tokens)]
    pub turn_input_len: u32,
    /// Send every so many turns without the cache, too; 1 is all of them.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub cold_every: u32,
    /// Tokens that each turn generates.
    #[arg(long, value_name = "N", default_value = "32", value_parser = tokens)]
    pub turn_output_len: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Scenario {
    /// One token for each sequence of a batch per step.
    Decode,
    /// One prompt in one step.
    Prefill,
    /// Clients in a closed loop, through HTTP or gRPC.
    Serve,
    /// An agent's conversation over a long shared prefix, with and without the prefix cache.
    Agent,
    /// Random arrivals, lengths and hang-ups for --duration; nothing may fail or leak.
    Soak,
    /// The same prompts alone and beside others, cold and from the prefix cache: whether ids and log-probabilities are
    /// the same, with --deterministic and without, and what the mode costs.
    Divergence,
    /// The same load straight over gRPC and through the gateway, in turns: what the gateway costs.
    Gateway,
    /// Chats of the lengths in --batch: template and tokenizer, and time to first token beside prefill.
    Text,
    /// From files to ranks that could run, beside `cat` of the same files, cold and warm.
    Load,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// HTTP, /v1/completions.
    #[value(aliases = ["vllm", "http"])]
    Openai,
    /// conclave.v1.
    Grpc,
}

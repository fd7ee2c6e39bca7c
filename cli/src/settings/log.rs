//! Logs and traces; every subcommand has them.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Logs and traces")]
pub struct LogSettings {
    /// TOML file of settings; keys are flag names with underscores, a table named after a subcommand is for it alone.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// How log lines look.
    #[arg(long, value_enum, default_value_t = LogFormat::Pretty)]
    pub log_format: LogFormat,
    /// What is logged: a level, or targets with levels such as `info,conclave_router=debug`.
    #[arg(long, value_name = "FILTER", default_value = "info")]
    pub log: String,
    /// Send spans to this OpenTelemetry collector (gRPC), e.g. http://localhost:4317.
    #[arg(long, value_name = "URL", visible_alias = "otlp-traces-endpoint")]
    pub otlp_endpoint: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Pretty,
    /// One JSON object per line.
    Json,
}

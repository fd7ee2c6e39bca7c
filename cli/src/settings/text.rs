//! `conclave render` and `conclave parse`: a checkpoint's text side alone, without a server.

use std::path::PathBuf;

use clap::builder::BoolishValueParser;
use clap::{Args, ValueEnum};

use super::{CheckpointSettings, FormatSettings, LogSettings};

/// Which checkpoint, and what of it is replaced.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Model")]
pub struct TextSettings {
    #[command(flatten)]
    pub checkpoint: CheckpointSettings,
    #[command(flatten)]
    pub format: FormatSettings,
}

#[derive(Args, Clone, Debug)]
pub struct RenderSettings {
    #[command(flatten)]
    pub text: TextSettings,
    /// Print token ids instead of the prompt's text.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub tokens: bool,
    #[command(flatten)]
    pub log: LogSettings,
}

#[derive(Args, Clone, Debug)]
pub struct ParseSettings {
    #[command(flatten)]
    pub text: TextSettings,
    /// JSON file: the list of tools, as in a request's `tools`. Without it nothing is read as a call.
    #[arg(long, value_name = "FILE")]
    pub tools: Option<PathBuf>,
    /// Give the parser one byte after another, without token ids, instead of the tokens.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub cut_every_byte: bool,
    /// How the output ended.
    #[arg(long, value_enum, default_value_t = EndedBy::Stop)]
    pub finish_reason: EndedBy,
    #[command(flatten)]
    pub log: LogSettings,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EndedBy {
    /// By itself: calls that are open are closed.
    Stop,
    /// At max_tokens: a call that is open stays so, and its arguments are printed as a string.
    Length,
}

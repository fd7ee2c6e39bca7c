//! How a model's prompts are written and its output is read.

use std::path::PathBuf;

use clap::Args;

#[derive(Args, Clone, Debug)]
pub struct FormatSettings {
    /// A Jinja file instead of the checkpoint's chat template.
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
    /// How tool calls are read; without it, chosen by the checkpoint.
    #[arg(long, value_name = "NAME")]
    pub tool_call_parser: Option<String>,
    /// How reasoning is read; without it, chosen by the checkpoint.
    #[arg(long, value_name = "NAME")]
    pub reasoning_parser: Option<String>,
}

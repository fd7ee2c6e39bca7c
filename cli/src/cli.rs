//! The command line: subcommands and their settings.

use clap::{Parser, Subcommand};

use crate::settings::PlanSettings;

/// Expert-parallel inference for Mixture-of-Experts models.
///
/// Settings come from flags, then CONCLAVE_… environment variables, then --config FILE, then defaults.
#[derive(Debug, Parser)]
#[command(name = "conclave", version, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// What a model is, what it weighs and what fits where
    Plan(PlanSettings),
}

impl Command {
    pub fn log(&self) -> &crate::settings::LogSettings {
        match self {
            Command::Plan(settings) => &settings.log,
        }
    }
}

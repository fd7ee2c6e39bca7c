//! The command line: subcommands and their settings.

use clap::{Parser, Subcommand};

use crate::settings::{GenerateSettings, LogSettings, PlanSettings};

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
    /// Send a prompt to a running cluster and print the answer as it comes
    Generate(GenerateSettings),
    /// What a model is, what it weighs and what fits where
    Plan(PlanSettings),
}

impl Command {
    pub fn log(&self) -> &LogSettings {
        match self {
            Command::Generate(settings) => &settings.log,
            Command::Plan(settings) => &settings.log,
        }
    }

    /// The process's name in traces.
    pub fn process(&self) -> &'static str {
        match self {
            Command::Generate(_) => "conclave-generate",
            Command::Plan(_) => "conclave-plan",
        }
    }
}

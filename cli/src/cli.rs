//! The command line: subcommands and their settings.

use clap::{Parser, Subcommand};

use crate::settings::{
    BenchSettings, ChatSettings, GatewaySettings, GenerateSettings, LogSettings, ParseSettings, PlanSettings,
    RenderSettings, RouterSettings, ServeSettings, VerifySettings, WorkerSettings,
};

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
#[allow(clippy::large_enum_variant, reason = "one value, made once")]
pub enum Command {
    /// Router, gateway and local workers: a whole cluster from one command
    Serve(ServeSettings),
    /// A router for workers and gateways on other machines
    Router(RouterSettings),
    /// A worker that attaches to a router
    Worker(WorkerSettings),
    /// The HTTP APIs in front of one or more routers
    Gateway(GatewaySettings),
    /// Talk to a model in the terminal; starts a local cluster where none runs
    Chat(ChatSettings),
    /// Send a prompt to a running cluster and print the answer as it comes
    Generate(GenerateSettings),
    /// Print the prompt that a chat request on standard input becomes
    Render(RenderSettings),
    /// Print reasoning, content and tool calls of the raw model output on standard input
    Parse(ParseSettings),
    /// Compare what the workers' code computes with a reference file
    Verify(VerifySettings),
    /// Measure ops, the router's core, a model's steps, or a cluster under load
    Bench(BenchSettings),
    /// What a model is, what it weighs and what fits where
    Plan(PlanSettings),
}

impl Command {
    pub fn log(&self) -> &LogSettings {
        match self {
            Command::Serve(settings) => &settings.log,
            Command::Router(settings) => &settings.log,
            Command::Worker(settings) => &settings.log,
            Command::Gateway(settings) => &settings.log,
            Command::Chat(settings) => &settings.log,
            Command::Generate(settings) => &settings.log,
            Command::Render(settings) => &settings.log,
            Command::Parse(settings) => &settings.log,
            Command::Verify(settings) => &settings.log,
            Command::Bench(settings) => &settings.log,
            Command::Plan(settings) => &settings.log,
        }
    }

    /// The process's name in traces.
    pub fn process(&self) -> &'static str {
        match self {
            Command::Serve(_) => "conclave-serve",
            Command::Router(_) => "conclave-router",
            Command::Worker(_) => "conclave-worker",
            Command::Gateway(_) => "conclave-gateway",
            Command::Chat(_) => "conclave-chat",
            Command::Generate(_) => "conclave-generate",
            Command::Render(_) => "conclave-render",
            Command::Parse(_) => "conclave-parse",
            Command::Verify(_) => "conclave-verify",
            Command::Bench(_) => "conclave-bench",
            Command::Plan(_) => "conclave-plan",
        }
    }
}

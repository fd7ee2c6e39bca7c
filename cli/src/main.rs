//! The one binary: `serve`, `router`, `worker`, `gateway`, `chat`, `generate`, `render`, `parse`, `verify`, `plan`, `bench`.
//!
//! This crate reads settings, starts the parts and prints for people. It knows every part's public face and no part's
//! inside; what the parts do is not decided here.

mod cli;
mod commands;
mod demo;
mod grpc_client;
mod http_client;
mod layers;
mod load_bar;
mod local_cluster;
mod model_path;
mod parent;
mod parts;
mod settings;
mod signals;
mod spelling;
mod telemetry;
mod units;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{CommandFactory, FromArgMatches};

use crate::cli::{Cli, Command};
use crate::layers::LayerError;

/// At the end, blocking tasks are waited for so long.
const BLOCKING_TIMEOUT: Duration = Duration::from_millis(100);

fn main() -> ExitCode {
    // SAFETY: no other thread has been started yet.
    unsafe { conclave_worker::transport::nccl::set_environment() };
    let arguments: Vec<String> = std::env::args_os()
        .map(|argument| argument.to_string_lossy().into_owned())
        .collect();
    let environment = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| name.starts_with(layers::PREFIX))
        .collect();
    let cli = layers::resolve(&Cli::command(), arguments, &environment)
        .and_then(|(matches, notes)| Ok((Cli::from_arg_matches(&matches)?, notes)));
    match cli {
        Ok((cli, notes)) => run(&cli, &notes),
        Err(LayerError::Flags(error)) => error.exit(),
        Err(error) => fail(&error.into(), 2),
    }
}

fn run(cli: &Cli, notes: &[String]) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let result = runtime.map_err(Into::into).and_then(|runtime| {
        let result = runtime.block_on(run_command(&cli.command, notes));
        // A blocked read of standard input must not hold the process.
        runtime.shutdown_timeout(BLOCKING_TIMEOUT);
        result
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error, 1),
    }
}

async fn run_command(command: &Command, notes: &[String]) -> Result<()> {
    let _telemetry = telemetry::start(command.log(), command.process())?;
    for note in notes {
        tracing::info!("{note}");
    }
    match command {
        Command::Serve(settings) => commands::serve::run(settings).await,
        Command::Router(settings) => commands::router::run(settings).await,
        Command::Worker(settings) => commands::worker::run(settings).await,
        Command::Gateway(settings) => commands::gateway::run(settings).await,
        Command::Chat(settings) => commands::chat::run(settings).await,
        Command::Generate(settings) => commands::generate::run(settings).await,
        Command::Render(settings) => commands::text::render(settings),
        Command::Parse(settings) => commands::text::parse(settings),
        Command::Verify(settings) => commands::verify::run(settings),
        Command::Bench(settings) => commands::bench::run(settings).await,
        Command::Plan(settings) => commands::plan::run(settings),
    }
}

fn fail(error: &anyhow::Error, code: u8) -> ExitCode {
    eprintln!("conclave: {}", causes(error));
    ExitCode::from(code)
}

/// An error with its causes, each once: some errors say already what caused them.
fn causes(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !text.contains(&cause) {
            text += if text.is_empty() { "" } else { ": " };
            text += &cause;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    #[test]
    fn a_cause_is_told_once() {
        let error = anyhow!("no space")
            .context("disk: no space")
            .context("cannot save");
        assert_eq!(super::causes(&error), "cannot save: disk: no space");
        let error = anyhow!("a").context("b");
        assert_eq!(super::causes(&error), "b: a");
    }
}

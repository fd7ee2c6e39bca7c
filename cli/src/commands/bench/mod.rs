//! `conclave bench`: measured figures, each beside what bounds it.

mod agent;
mod core;
mod load;
mod ops;
mod profile;
mod results;
mod serve;
mod steps;

use anyhow::{Result, bail};

use crate::settings::{BenchSettings, Scenario};

pub async fn run(settings: &BenchSettings) -> Result<()> {
    if !settings.ops && !settings.core && settings.scenario.is_none() {
        bail!(
            "nothing to measure: give --ops, --core or --scenario decode|prefill|serve|agent|soak|divergence|gateway|text|load"
        );
    }
    if settings.ops {
        ops::run(settings)?;
    }
    if settings.core {
        core::run();
    }
    match settings.scenario {
        None => Ok(()),
        Some(Scenario::Decode) => steps::run(settings, steps::Phase::Decode),
        Some(Scenario::Prefill) => steps::run(settings, steps::Phase::Prefill),
        Some(Scenario::Load) => load::run(settings),
        Some(Scenario::Serve) => serve::run(settings).await,
        Some(Scenario::Agent) => agent::run(settings).await,
        Some(Scenario::Soak) => serve::soak::run(settings).await,
        Some(Scenario::Divergence) => serve::divergence::run(settings).await,
        Some(Scenario::Gateway) => serve::overhead::run(settings).await,
        Some(Scenario::Text) => serve::text::run(settings).await,
    }
}

/// Threads of each rank, if asked for 0: the machine's cores, shared.
fn threads(settings: &BenchSettings) -> usize {
    match settings.device.threads {
        0 => std::thread::available_parallelism()
            .map_or(1, |cores| (cores.get() / settings.workers as usize).max(1)),
        threads => threads,
    }
}

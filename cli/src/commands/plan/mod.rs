//! `conclave plan`: what a model is, what it weighs, what fits where. Reads config.json and nothing else.

mod report;
mod table;

use std::io::{self, Write};

use anyhow::Result;

use crate::model_path;
use crate::settings::PlanSettings;

pub use report::Report;

pub fn run(settings: &PlanSettings) -> Result<()> {
    let model = model_path::find(&settings.model)?;
    let config = conclave_plan::config::read(&model.path, settings.model.hf_overrides.as_ref())?;
    let report = Report::of(&model.name, &config, settings)?;
    let mut text = if settings.json {
        serde_json::to_string_pretty(&report)?
    } else {
        table::render(&report)
    };
    text.push('\n');
    // A reader that closes the pipe early has seen enough.
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

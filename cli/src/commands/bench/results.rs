//! Figures as JSON, for records and comparisons.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Writes `figures` with what they were measured with, if a file is asked for.
pub fn write(file: Option<&Path>, scenario: &str, figures: &Value) -> Result<()> {
    let Some(file) = file else {
        return Ok(());
    };
    let command: Vec<String> = std::env::args().skip(1).collect();
    let record = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "command": command.join(" "),
        "scenario": scenario,
        "figures": figures,
    });
    let text = serde_json::to_string_pretty(&record)? + "\n";
    std::fs::write(file, text)
        .with_context(|| format!("result_filename {}: cannot be written", file.display()))
}

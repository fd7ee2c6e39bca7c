//! Reads a checkpoint's `config.json` and turns it into a [`ModelSpec`] through the file of its family.
//!
//! The only I/O of this crate. Must stay true: the file is read only if it is at most
//! [`limits::MAX_CONFIG_BYTES`](crate::limits::MAX_CONFIG_BYTES) long, and a spec that leaves here was checked against
//! all limits, so that products of its numbers fit 64 bits.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{PlanError, Result};
use crate::families;
use crate::fields::Fields;
use crate::limits::{MAX_CONFIG_BYTES, MAX_LAYERS};
use crate::model::ModelSpec;
use crate::quant::{self, QuantSpec};

/// A checked `config.json`.
#[derive(Clone, Debug)]
pub struct Config {
    pub spec: ModelSpec,
    /// What the config says of quantisation. Informational: the loader decides per module by the tensors present.
    pub quant: Option<QuantSpec>,
    /// The JSON with overrides merged in.
    pub raw: Value,
}

/// Reads `dir/config.json` (or `dir` itself, if it names a file) and merges `overrides` into it.
pub fn read(dir: &Path, overrides: Option<&Value>) -> Result<Config> {
    let path = if dir.is_file() {
        dir.to_owned()
    } else {
        dir.join("config.json")
    };
    let text = read_bounded(&path)?;
    parse(&path, &text, overrides)
}

/// The same from memory; `path` is for error messages.
pub fn parse(path: &Path, text: &[u8], overrides: Option<&Value>) -> Result<Config> {
    let mut raw: Value = serde_json::from_slice(text).map_err(|error| not_json(path, text, &error))?;
    let Value::Object(object) = &mut raw else {
        return Err(PlanError::File {
            path: path.to_owned(),
            problem: "it is not a JSON object".into(),
            advice: "point at the directory of a Hugging Face checkpoint",
        });
    };
    if let Some(overrides) = overrides {
        override_fields(object, overrides)?;
    }
    let fields = Fields::new(object);
    let spec = families::read(&fields)?;
    let quant = quant::read(&fields, &spec)?;
    Ok(Config { spec, quant, raw })
}

fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    let failed = |error: std::io::Error| PlanError::File {
        path: path.to_owned(),
        problem: error.to_string(),
        advice: "point at the directory of a Hugging Face checkpoint, which holds a config.json",
    };
    let file = File::open(path).map_err(failed)?;
    let mut text = Vec::new();
    // One byte more than allowed tells a file that is too long from one that just fits.
    file.take(MAX_CONFIG_BYTES + 1)
        .read_to_end(&mut text)
        .map_err(failed)?;
    if text.len() as u64 > MAX_CONFIG_BYTES {
        return Err(PlanError::File {
            path: path.to_owned(),
            problem: format!("longer than {MAX_CONFIG_BYTES} bytes"),
            advice: "a config.json has a few KB: point at the right file",
        });
    }
    Ok(text)
}

/// Repeats the offending line: it names the field, also for `NaN`, which Python writes and JSON forbids.
fn not_json(path: &Path, text: &[u8], error: &serde_json::Error) -> PlanError {
    let line = String::from_utf8_lossy(text)
        .lines()
        .nth(error.line().saturating_sub(1))
        .map(|line| line.trim().chars().take(120).collect::<String>())
        .unwrap_or_default();
    PlanError::File {
        path: PathBuf::from(path),
        problem: format!("not valid JSON: {error}, at `{line}`"),
        advice: "correct it, or download it again",
    }
}

/// Merges `overrides` (objects are merged key by key, everything else replaces). A new number of layers cuts or
/// repeats the lists that have one entry per layer.
fn override_fields(object: &mut Map<String, Value>, overrides: &Value) -> Result<()> {
    let Value::Object(changes) = overrides else {
        return Err(PlanError::Overrides {
            problem: format!("{overrides} is not a JSON object"),
        });
    };
    let layers = |object: &Map<String, Value>| object.get("num_hidden_layers").and_then(Value::as_u64);
    let before = layers(object);
    merge(object, changes);
    let (Some(before), Some(after)) = (before, layers(object)) else {
        return Ok(());
    };
    if before == after || after > MAX_LAYERS as u64 {
        return Ok(());
    }
    for (name, value) in object.iter_mut() {
        let Value::Array(list) = value else { continue };
        let Some(last) = list.last().cloned() else {
            continue;
        };
        if list.len() as u64 == before && !changes.contains_key(name) {
            list.resize(after as usize, last);
        }
    }
    Ok(())
}

fn merge(object: &mut Map<String, Value>, changes: &Map<String, Value>) {
    for (name, change) in changes {
        match (object.get_mut(name), change) {
            (Some(Value::Object(inner)), Value::Object(change)) => merge(inner, change),
            _ => {
                object.insert(name.clone(), change.clone());
            }
        }
    }
}

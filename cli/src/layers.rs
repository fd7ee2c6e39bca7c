//! Settings from four layers: flags > environment (`CONCLAVE_…`) > `--config file.toml` > defaults.
//!
//! figment merges the file and the environment and remembers where each value came from; the result is put before the
//! flags and parsed by clap once more, so that a value means the same wherever it is written. Must stay true: a key
//! that no subcommand knows, or a value that does not parse, is an error that names it and its source.

mod blame;
mod environment;
mod keys;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{ArgMatches, Command};
use figment::providers::{Format, Serialized, Toml};
use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};

use self::keys::Keys;
use crate::spelling::{Normalised, Refused};

/// Prefix of environment variables.
pub const PREFIX: &str = "CONCLAVE_";

#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The command line itself; clap prints it and chooses the exit code.
    #[error(transparent)]
    Flags(#[from] clap::Error),
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error("{origin}: {key} is not a setting{}", did_you_mean(.suggestion))]
    UnknownKey {
        origin: String,
        key: String,
        suggestion: Option<String>,
    },
    #[error("{origin}: {key} is {value}: {problem}")]
    BadValue {
        origin: String,
        key: String,
        value: String,
        problem: String,
    },
    #[error("--config {}: {problem}", path.display())]
    File { path: PathBuf, problem: String },
}

fn did_you_mean(suggestion: &Option<String>) -> String {
    suggestion
        .as_ref()
        .map(|name| format!("; did you mean {name}?"))
        .unwrap_or_default()
}

/// Parses `arguments` (program name first) under the given environment; gives notes on them, too.
pub fn resolve(
    command: &Command,
    arguments: Vec<String>,
    environment: &BTreeMap<String, String>,
) -> Result<(ArgMatches, Vec<String>), LayerError> {
    let own = flags_of(command, &arguments);
    let Normalised {
        arguments,
        notes,
        mut refused,
    } = crate::spelling::normalise(arguments, &own);
    refused.extend(unknown_flags(command, &arguments));
    if !refused.is_empty() {
        return Err(Refused(refused).into());
    }
    let flags = command
        .clone()
        .try_get_matches_from(&arguments)
        .map_err(|error| blame::in_words(error, command))?;
    let Some((name, given)) = flags.subcommand() else {
        return Ok((flags, notes));
    };
    let subcommand = command
        .find_subcommand(name)
        .expect("clap matched a subcommand it has");
    let keys = Keys::of(command);
    let file = given
        .get_one::<PathBuf>("config")
        .cloned()
        .or_else(|| environment.get("CONCLAVE_CONFIG").map(PathBuf::from));
    let mut figment = Figment::new();
    if let Some(path) = file {
        figment = file_layers(figment, &path, name, &keys)?;
    }
    figment = figment.merge(environment::layer(environment, &keys)?);
    let values: Dict = figment.extract().map_err(|error| LayerError::BadValue {
        origin: "settings".into(),
        key: error.path.join("."),
        value: String::new(),
        problem: error.to_string(),
    })?;

    let by_flag = |id: &str| {
        given.try_contains_id(id).is_ok() && given.value_source(id) == Some(ValueSource::CommandLine)
    };
    let mut layered = Vec::new();
    for (key, value) in &values {
        let known = subcommand
            .get_arguments()
            .find(|argument| argument.get_id() == key.as_str());
        let Some(argument) = known else { continue };
        // A flag wins over a layered value, also over that of a setting it excludes.
        let rivals = subcommand.get_arg_conflicts_with(argument);
        if !by_flag(key) && !rivals.iter().any(|rival| by_flag(rival.get_id().as_str())) {
            layered.extend(as_flags(key, value));
        }
    }
    let place = arguments
        .iter()
        .position(|argument| argument == name)
        .map_or(1, |at| at + 1);
    let (before, after) = arguments.split_at(place.min(arguments.len()));
    let all: Vec<&String> = before.iter().chain(&layered).chain(after).collect();
    let matches = command.clone().try_get_matches_from(all);
    let matches = matches.map_err(|error| blame::blame(error, &figment))?;
    Ok((matches, notes))
}

/// The names of the flags that the subcommand has; none where there is no such subcommand.
fn flags_of<'a>(command: &'a Command, arguments: &[String]) -> Vec<&'a str> {
    let subcommand = arguments.get(1).and_then(|name| command.find_subcommand(name));
    let arguments = subcommand.into_iter().flat_map(Command::get_arguments);
    arguments
        .flat_map(|argument| {
            let aliases = argument.get_all_aliases().unwrap_or_default();
            argument.get_long().into_iter().chain(aliases)
        })
        .collect()
}

/// Every flag that the subcommand does not have; clap would name the first.
fn unknown_flags(command: &Command, arguments: &[String]) -> Vec<String> {
    let subcommand = arguments.get(1).and_then(|name| command.find_subcommand(name));
    let Some(subcommand) = subcommand else {
        return Vec::new();
    };
    let mut known = flags_of(command, arguments);
    known.push("help");
    let given = arguments.iter().take_while(|argument| *argument != "--");
    let names = given.filter_map(|argument| argument.strip_prefix("--")?.split('=').next());
    let unknown = names.filter(|name| !known.contains(name));
    unknown
        .map(|name| {
            let suggestion = keys::closest(name, known.iter().copied()).map(|known| format!("--{known}"));
            let there = subcommand.get_name();
            format!("--{name} is not a flag of {there}{}", did_you_mean(&suggestion))
        })
        .collect()
}

/// The file's top level, then its table named after the subcommand.
fn file_layers(figment: Figment, path: &Path, name: &str, keys: &Keys) -> Result<Figment, LayerError> {
    let failed = |problem: String| LayerError::File {
        path: path.to_owned(),
        problem,
    };
    if !path.is_file() {
        return Err(failed("there is no such file".into()));
    }
    let parsed: Dict = Figment::from(Toml::file_exact(path))
        .extract()
        .map_err(|error| failed(error.to_string()))?;
    let origin = path.display().to_string();
    let mut top = Dict::new();
    let mut section = Dict::new();
    for (key, value) in parsed {
        match value {
            Value::Dict(_, table) if keys.is_subcommand(&key) => {
                keys.check(table.keys(), &format!("{origin} [{key}]"))?;
                if key == name {
                    section = table;
                }
            }
            value => {
                keys.check([&key], &origin)?;
                top.insert(key, value);
            }
        }
    }
    let layer = |origin: String, dict| Layer { origin, dict };
    Ok(figment
        .merge(layer(origin.clone(), top))
        .merge(layer(format!("{origin} [{name}]"), section)))
}

/// Some values and where they are from.
struct Layer {
    origin: String,
    dict: Dict,
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.origin.clone())
    }

    fn data(&self) -> figment::error::Result<Map<Profile, Dict>> {
        Serialized::defaults(&self.dict).data()
    }
}

/// A value as the flags that would give it.
fn as_flags(key: &str, value: &Value) -> Vec<String> {
    let flag = format!("--{}", key.replace('_', "-"));
    match value {
        Value::Array(_, list) => list
            .iter()
            .map(|entry| format!("{flag}={}", plain(entry)))
            .collect(),
        value => vec![format!("{flag}={}", plain(value))],
    }
}

/// A value as one would write it on a command line; tables become JSON.
fn plain(value: &Value) -> String {
    match value {
        Value::String(_, text) => text.clone(),
        Value::Bool(_, flag) => flag.to_string(),
        Value::Num(..) | Value::Char(..) | Value::Array(..) | Value::Dict(..) | Value::Empty(..) => {
            let json = serde_json::to_string(value).unwrap_or_default();
            json.trim_matches('"').to_owned()
        }
    }
}

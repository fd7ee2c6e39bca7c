//! Settings from four layers: flags > environment (`CONCLAVE_…`) > `--config file.toml` > defaults.
//!
//! figment merges the file and the environment and remembers where each value came from; the result is put before the
//! flags and parsed by clap once more, so that a value means the same wherever it is written. Must stay true: a key
//! that no subcommand knows, or a value that does not parse, is an error that names it and its source.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::error::{ContextKind, ContextValue};
use clap::parser::ValueSource;
use clap::{ArgMatches, Command};
use figment::providers::{Format, Serialized, Toml};
use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};

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
    let Normalised {
        arguments,
        notes,
        mut refused,
    } = crate::spelling::normalise(arguments);
    refused.extend(unknown_flags(command, &arguments));
    if !refused.is_empty() {
        return Err(Refused(refused).into());
    }
    let flags = command.clone().try_get_matches_from(&arguments)?;
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
    figment = figment.merge(Environment(environment_layer(environment, &keys)?));
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
    let matches = matches.map_err(|error| blame(error, &figment))?;
    Ok((matches, notes))
}

/// Every flag that the subcommand does not have; clap would name the first.
fn unknown_flags(command: &Command, arguments: &[String]) -> Vec<String> {
    let subcommand = arguments.get(1).and_then(|name| command.find_subcommand(name));
    let Some(subcommand) = subcommand else {
        return Vec::new();
    };
    let mut known = vec!["help"];
    for argument in subcommand.get_arguments() {
        known.extend(argument.get_long());
        known.extend(argument.get_all_aliases().unwrap_or_default());
    }
    let given = arguments.iter().take_while(|argument| *argument != "--");
    let names = given.filter_map(|argument| argument.strip_prefix("--")?.split('=').next());
    let unknown = names.filter(|name| !known.contains(name));
    unknown
        .map(|name| {
            let suggestion = closest(name, known.iter().copied()).map(|known| format!("--{known}"));
            let there = subcommand.get_name();
            format!("--{name} is not a flag of {there}{}", did_you_mean(&suggestion))
        })
        .collect()
}

/// The most similar of these names, if any is.
fn closest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
    let scored = known.map(|known| (strsim::jaro_winkler(known, name), known));
    let best = scored.max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 > 0.8).then(|| best.1.to_owned())
}

/// The names of all settings, per subcommand.
struct Keys(BTreeMap<String, Vec<String>>);

impl Keys {
    fn of(command: &Command) -> Keys {
        let names = |subcommand: &Command| {
            let settings = subcommand
                .get_arguments()
                .filter(|argument| argument.get_long().is_some());
            settings.map(|argument| argument.get_id().to_string()).collect()
        };
        Keys(
            command
                .get_subcommands()
                .map(|s| (s.get_name().to_owned(), names(s)))
                .collect(),
        )
    }

    fn known(&self, key: &str) -> bool {
        self.0.values().any(|keys| keys.iter().any(|known| known == key))
    }

    fn closest(&self, key: &str) -> Option<String> {
        closest(key, self.0.values().flatten().map(String::as_str))
    }
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
            Value::Dict(_, table) if keys.0.contains_key(&key) => {
                check_keys(table.keys(), keys, &format!("{origin} [{key}]"))?;
                if key == name {
                    section = table;
                }
            }
            value => {
                check_keys([&key], keys, &origin)?;
                top.insert(key, value);
            }
        }
    }
    let layer = |origin: String, dict| Layer { origin, dict };
    Ok(figment
        .merge(layer(origin.clone(), top))
        .merge(layer(format!("{origin} [{name}]"), section)))
}

fn check_keys<'a>(
    names: impl IntoIterator<Item = &'a String>,
    keys: &Keys,
    origin: &str,
) -> Result<(), LayerError> {
    for key in names {
        if !keys.known(key) {
            return Err(LayerError::UnknownKey {
                origin: origin.to_owned(),
                key: key.clone(),
                suggestion: keys.closest(key),
            });
        }
    }
    Ok(())
}

fn environment_layer(environment: &BTreeMap<String, String>, keys: &Keys) -> Result<Dict, LayerError> {
    let mut dict = Dict::new();
    for (variable, value) in environment {
        let Some(key) = variable.strip_prefix(PREFIX) else {
            continue;
        };
        if is_service_link(variable, value, environment) {
            continue;
        }
        let key = key.to_ascii_lowercase();
        if !keys.known(&key) {
            return Err(LayerError::UnknownKey {
                origin: "environment".into(),
                key: variable.clone(),
                suggestion: keys
                    .closest(&key)
                    .map(|key| format!("{PREFIX}{}", key.to_ascii_uppercase())),
            });
        }
        if key != "config" {
            dict.insert(key, Value::from(value.as_str()));
        }
    }
    Ok(dict)
}

/// Kubernetes describes every service of a namespace to every container, in variables that begin with the service's
/// name: of one called `conclave-gateway`, CONCLAVE_GATEWAY_SERVICE_HOST, CONCLAVE_GATEWAY_PORT=tcp://…, and more.
fn is_service_link(variable: &str, value: &str, environment: &BTreeMap<String, String>) -> bool {
    let services = environment
        .keys()
        .filter_map(|key| key.strip_suffix("_SERVICE_HOST"));
    services
        .filter_map(|service| variable.strip_prefix(service))
        .any(|rest| {
            rest.starts_with("_SERVICE_")
                || rest == "_PORT" && value.contains("://")
                || rest
                    .strip_prefix("_PORT_")
                    .is_some_and(|port| port.starts_with(|c: char| c.is_ascii_digit()))
        })
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

struct Environment(Dict);

impl Provider for Environment {
    fn metadata(&self) -> Metadata {
        Metadata::named("environment")
    }

    fn data(&self) -> figment::error::Result<Map<Profile, Dict>> {
        Serialized::defaults(&self.0).data()
    }
}

/// Where a key's value came from.
fn origin(figment: &Figment, key: &str) -> String {
    match figment
        .find_metadata(key)
        .map(|metadata| metadata.name.to_string())
    {
        Some(name) if name == "environment" => {
            format!("environment variable {PREFIX}{}", key.to_ascii_uppercase())
        }
        Some(name) => name,
        None => "settings".into(),
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

/// Turns clap's complaint about a layered value into one that names its source.
fn blame(error: clap::Error, figment: &Figment) -> LayerError {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        _ => None,
    };
    let Some(argument) = text(ContextKind::InvalidArg) else {
        return LayerError::Flags(error);
    };
    let flag = argument.split([' ', '=', '[']).next().unwrap_or_default();
    let key = flag.trim_start_matches('-').replace('-', "_");
    if figment.find_value(&key).is_err() {
        return LayerError::Flags(error);
    }
    let problem = match std::error::Error::source(&error) {
        Some(source) => source.to_string(),
        None => error.kind().to_string(),
    };
    let accepted = match error.get(ContextKind::ValidValue) {
        Some(ContextValue::Strings(values)) if !values.is_empty() => {
            format!("; possible values: {}", values.join(", "))
        }
        _ => String::new(),
    };
    LayerError::BadValue {
        origin: origin(figment, &key),
        value: text(ContextKind::InvalidValue).map_or("empty".into(), |value| format!("{value:?}")),
        key,
        problem: problem + &accepted,
    }
}

//! clap's complaints, with the source of the value and in plain words.

use std::num::{IntErrorKind, ParseIntError};

use clap::Command;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use figment::Figment;

use super::{LayerError, PREFIX, environment};

/// Where a key's value came from.
fn origin(figment: &Figment, key: &str) -> String {
    match figment
        .find_metadata(key)
        .map(|metadata| metadata.name.to_string())
    {
        Some(name) if name == environment::NAME => {
            format!("environment variable {PREFIX}{}", key.to_ascii_uppercase())
        }
        Some(name) => name,
        None => "settings".into(),
    }
}

fn text(error: &clap::Error, kind: ContextKind) -> Option<String> {
    match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        _ => None,
    }
}

/// What is wrong with a value. Rust's word for what is no number ("invalid digit found in string") says too little.
fn problem(error: &clap::Error) -> String {
    let source = std::error::Error::source(error);
    match source.and_then(|source| source.downcast_ref::<ParseIntError>()) {
        Some(number) if *number.kind() == IntErrorKind::PosOverflow => "it is too large".to_owned(),
        Some(_) => "it must be a whole number".to_owned(),
        None => source.map_or_else(|| error.kind().to_string(), ToString::to_string),
    }
}

/// clap's complaint about a flag, with `problem`'s words.
pub(super) fn in_words(error: clap::Error, command: &Command) -> clap::Error {
    let is_number = std::error::Error::source(&error).is_some_and(|source| source.is::<ParseIntError>());
    let argument = text(&error, ContextKind::InvalidArg);
    let value = text(&error, ContextKind::InvalidValue);
    let (Some(argument), Some(value), true) = (argument, value, is_number) else {
        return error;
    };
    let message = format!("invalid value '{value}' for '{argument}': {}\n", problem(&error));
    clap::Error::raw(ErrorKind::ValueValidation, message).with_cmd(command)
}

/// Turns clap's complaint about a layered value into one that names its source.
pub(super) fn blame(error: clap::Error, figment: &Figment) -> LayerError {
    let Some(argument) = text(&error, ContextKind::InvalidArg) else {
        return LayerError::Flags(error);
    };
    let flag = argument.split([' ', '=', '[']).next().unwrap_or_default();
    let key = flag.trim_start_matches('-').replace('-', "_");
    if figment.find_value(&key).is_err() {
        return LayerError::Flags(error);
    }
    let problem = problem(&error);
    let accepted = match error.get(ContextKind::ValidValue) {
        Some(ContextValue::Strings(values)) if !values.is_empty() => {
            format!("; possible values: {}", values.join(", "))
        }
        _ => String::new(),
    };
    LayerError::BadValue {
        origin: origin(figment, &key),
        value: text(&error, ContextKind::InvalidValue).map_or("empty".into(), |value| format!("{value:?}")),
        key,
        problem: problem + &accepted,
    }
}

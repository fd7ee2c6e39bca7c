//! Reads numbers, flags and strings out of a parsed `config.json`, each with its bounds.
//!
//! Must stay true: a number leaves this file only after it was found within the range the caller gave, and an error
//! names the field with its whole path (`quantization_config.group_size`).

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::error::{PlanError, Result};
use crate::limits::MAX_SHOWN_VALUE;

/// An object of the config and the path that leads to it.
#[derive(Clone, Debug)]
pub struct Fields<'a> {
    object: &'a Map<String, Value>,
    prefix: String,
}

impl<'a> Fields<'a> {
    /// The top level.
    pub fn new(object: &'a Map<String, Value>) -> Fields<'a> {
        Fields {
            object,
            prefix: String::new(),
        }
    }

    /// The value, or `None` if it is absent or null.
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    /// An error about one field.
    pub fn error(&self, name: &str, problem: impl Into<String>, advice: impl Into<String>) -> PlanError {
        let value = self.object.get(name).map_or("missing".to_owned(), shown);
        PlanError::Field {
            field: format!("{}{name}", self.prefix),
            value,
            problem: problem.into(),
            advice: advice.into(),
        }
    }

    /// A nested object, if present.
    pub fn object(&self, name: &str) -> Result<Option<Fields<'a>>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(Fields {
                object,
                prefix: format!("{}{name}.", self.prefix),
            })),
            Some(_) => Err(self.error(name, "it must be an object", "correct or remove it")),
        }
    }

    /// The nested objects by name, in the file's order.
    pub fn objects(&self) -> Result<Vec<Fields<'a>>> {
        self.object
            .keys()
            .filter_map(|name| self.object(name).transpose())
            .collect()
    }

    /// The names of all fields.
    pub fn names(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.object.keys().map(String::as_str)
    }

    /// A whole number within `range`, if present.
    pub fn integer(&self, name: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let number = value.as_u64().and_then(|n| usize::try_from(n).ok());
        match number {
            Some(n) if range.contains(&n) => Ok(Some(n)),
            _ => Err(self.error(
                name,
                format!(
                    "it must be a whole number from {} to {}",
                    range.start(),
                    range.end()
                ),
                "take the value from the published config.json",
            )),
        }
    }

    pub fn required_integer(&self, name: &str, range: RangeInclusive<usize>) -> Result<usize> {
        self.integer(name, range.clone())?.ok_or_else(|| {
            self.missing(
                name,
                &format!("a whole number from {} to {}", range.start(), range.end()),
            )
        })
    }

    /// A finite number above `above` and at most `most`, if present.
    pub fn number(&self, name: &str, above: f64, most: f64) -> Result<Option<f64>> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(x) if x.is_finite() && x > above && x <= most => Ok(Some(x)),
            _ => Err(self.error(
                name,
                format!("it must be a number above {above} and at most {most}"),
                "take the value from the published config.json",
            )),
        }
    }

    pub fn flag(&self, name: &str, default: bool) -> Result<bool> {
        match self.get(name) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.error(name, "it must be true or false", "correct or remove it")),
        }
    }

    pub fn text(&self, name: &str) -> Result<Option<&'a str>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.error(name, "it must be a string", "correct or remove it")),
        }
    }

    /// A list of strings of at most `most` entries; empty if absent.
    pub fn texts(&self, name: &str, most: usize) -> Result<Vec<String>> {
        let wrong = || {
            self.error(
                name,
                format!("it must be a list of at most {most} strings"),
                "correct or remove it",
            )
        };
        match self.get(name) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) if list.len() <= most => list
                .iter()
                .map(|entry| entry.as_str().map(str::to_owned).ok_or_else(wrong))
                .collect(),
            Some(_) => Err(wrong()),
        }
    }

    /// Refuses a field that switches on something this program does not compute: it must be absent or `neutral`.
    pub fn only(&self, name: &str, neutral: &Value) -> Result<()> {
        match self.get(name) {
            None => Ok(()),
            Some(value) if value == neutral => Ok(()),
            Some(_) => Err(self.error(
                name,
                "not supported",
                format!("only {neutral} is, or the field left out"),
            )),
        }
    }

    fn missing(&self, name: &str, wanted: &str) -> PlanError {
        self.error(
            name,
            format!("{wanted} is needed"),
            "take it from the published config.json",
        )
    }
}

/// A value as an error repeats it: JSON, cut at [`MAX_SHOWN_VALUE`] characters.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= MAX_SHOWN_VALUE {
        return text;
    }
    let head: String = text.chars().take(MAX_SHOWN_VALUE).collect();
    format!("{head}…")
}

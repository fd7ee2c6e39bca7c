//! JSON as chat needs it: numbers keep the digits they were written with, objects keep their key order, and
//! output has Python's separators, because that is what the models were trained on.
//!
//! `serde_json` is not used here: it turns 1e5 into 100000.0 and 2^64 into a float unless a feature is switched on
//! for the whole workspace. Nesting and size are bounded, so no input can exhaust the stack.

mod parse;
mod write;

use indexmap::IndexMap;

pub use parse::{JsonError, MAX_DEPTH, parse};
pub(crate) use write::write_escaped;
pub use write::{Style, write_string};

/// A JSON value. `Number` holds the text of a valid JSON number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Json {
    Null,
    Bool(bool),
    Number(Box<str>),
    String(String),
    Array(Vec<Json>),
    Object(Object),
}

/// Keys in the order they were written; of a repeated key the first place and the last value count, as in Python.
pub type Object = IndexMap<String, Json>;

impl Json {
    pub fn get(&self, key: &str) -> Option<&Json> {
        match self {
            Json::Object(object) => object.get(key),
            _ => None,
        }
    }

    pub fn as_str(&self) -> Option<&str> {
        match self {
            Json::String(text) => Some(text),
            _ => None,
        }
    }

    pub fn as_array(&self) -> Option<&[Json]> {
        match self {
            Json::Array(items) => Some(items),
            _ => None,
        }
    }

    pub fn as_object(&self) -> Option<&Object> {
        match self {
            Json::Object(object) => Some(object),
            _ => None,
        }
    }

    /// What Python's `json.dumps(value, ensure_ascii=False)` prints.
    pub fn to_python(&self) -> String {
        let mut out = String::new();
        Style::default().write(self, &mut out);
        out
    }

    /// "null", "boolean", … as JSON schema names it; a number without fraction and exponent is an "integer".
    pub fn type_name(&self) -> &'static str {
        match self {
            Json::Null => "null",
            Json::Bool(_) => "boolean",
            Json::Number(digits) if digits.bytes().all(|b| b == b'-' || b.is_ascii_digit()) => "integer",
            Json::Number(_) => "number",
            Json::String(_) => "string",
            Json::Array(_) => "array",
            Json::Object(_) => "object",
        }
    }
}

impl From<&str> for Json {
    fn from(text: &str) -> Self {
        Json::String(text.to_owned())
    }
}

/// An object of the given pairs, in this order.
pub fn object<const N: usize>(pairs: [(&str, Json); N]) -> Json {
    Json::Object(
        pairs
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value))
            .collect(),
    )
}

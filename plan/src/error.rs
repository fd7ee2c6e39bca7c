//! Errors of this crate: each names the file or field, the value found and what to do.

use std::path::PathBuf;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A file could not be read or is not JSON.
    #[error("{}: {problem}; {advice}", path.display())]
    File {
        path: PathBuf,
        problem: String,
        advice: &'static str,
    },
    /// A field of `config.json` is missing, malformed, out of bounds or not supported.
    #[error("config.json: {field} is {value}: {problem}; {advice}")]
    Field {
        field: String,
        value: String,
        problem: String,
        advice: String,
    },
    /// `--hf-overrides` is not what it must be.
    #[error("hf-overrides: {problem}; give a JSON object such as {{\"num_hidden_layers\":4}}")]
    Overrides { problem: String },
    /// The experts do not fit the ranks, or a placement breaks its own rules.
    #[error("placement: {problem}; {advice}")]
    Placement { problem: String, advice: &'static str },
}

pub type Result<T> = std::result::Result<T, PlanError>;

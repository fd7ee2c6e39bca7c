//! What can go wrong with text, as values: whose fault it is, which field or file, and what to do.
//!
//! `TextError::Request` is the client's (HTTP 400, gRPC INVALID_ARGUMENT); `Checkpoint` is the operator's and only
//! comes from loading. Nothing a client sends may produce anything but `Request`.

use std::path::{Path, PathBuf};

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, TextError>;

/// Why a piece of text work was not done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// A file of the checkpoint is missing or wrong.
    #[error("{}: {reason}", file.display())]
    Checkpoint { file: PathBuf, reason: String },
    /// The request cannot be served as it is.
    #[error("{field}: {reason}")]
    Request { field: String, reason: String },
}

impl TextError {
    pub(crate) fn request(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Request {
            field: field.into(),
            reason: reason.into(),
        }
    }

    pub(crate) fn checkpoint(file: &Path, reason: impl ToString) -> Self {
        Self::Checkpoint {
            file: file.to_owned(),
            reason: reason.to_string(),
        }
    }

    /// The field of the request that is wrong, if the request is to blame.
    pub fn field(&self) -> Option<&str> {
        match self {
            Self::Request { field, .. } => Some(field),
            Self::Checkpoint { .. } => None,
        }
    }
}

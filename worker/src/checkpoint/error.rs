//! What can be wrong with a checkpoint. Every error names the file, the tensor where there is one, and what to do.

use std::path::{Path, PathBuf};

use conclave_plan::PlanError;

/// A checkpoint that was refused.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error(transparent)]
    Config(#[from] PlanError),
    /// The file as a whole is unusable.
    #[error("{}: {problem}; {advice}", file.display())]
    File {
        file: PathBuf,
        problem: String,
        advice: &'static str,
    },
    /// One tensor of a file is unusable.
    #[error("{}: tensor {tensor}: {problem}; {advice}", file.display())]
    Tensor {
        file: PathBuf,
        tensor: String,
        problem: String,
        advice: &'static str,
    },
    /// The model needs a tensor that no file holds, or holds it in a form that is not supported.
    #[error("{}: module {module}: {problem}; {advice}", directory.display())]
    Module {
        directory: PathBuf,
        module: String,
        problem: String,
        advice: &'static str,
    },
}

pub type Result<T> = std::result::Result<T, CheckpointError>;

/// What to do about a file that does not hold what it should.
pub(crate) const DOWNLOAD_AGAIN: &str = "download the file again and compare its checksum";

impl CheckpointError {
    pub(crate) fn file(file: &Path, problem: impl Into<String>, advice: &'static str) -> CheckpointError {
        CheckpointError::File {
            file: file.to_owned(),
            problem: problem.into(),
            advice,
        }
    }

    pub(crate) fn tensor(file: &Path, tensor: &str, problem: impl Into<String>) -> CheckpointError {
        CheckpointError::Tensor {
            file: file.to_owned(),
            tensor: shortened(tensor),
            problem: problem.into(),
            advice: DOWNLOAD_AGAIN,
        }
    }
}

/// A name out of a file, cut so that a hostile one does not fill the log.
pub(crate) fn shortened(name: &str) -> String {
    const MAX_SHOWN_NAME: usize = 200;
    match name.char_indices().nth(MAX_SHOWN_NAME) {
        None => name.to_owned(),
        Some((end, _)) => format!("{}…", &name[..end]),
    }
}

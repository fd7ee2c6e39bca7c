//! Why a worker ended.

use crate::checkpoint::CheckpointError;
use crate::model::ModelError;

/// Ends the process with a message that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("{field} is {value}: {problem}")]
    Config {
        field: &'static str,
        value: String,
        problem: String,
    },
    #[error("cannot listen for peers on {address}: {error}; choose another address, or port 0")]
    Listen {
        address: std::net::SocketAddr,
        error: std::io::Error,
    },
    #[error("the router at {router} refused this worker: {reason}")]
    Refused { router: String, reason: String },
    #[error("no router at {router} for {seconds} s, last: {reason}; start the router, or correct --router")]
    NoRouter {
        router: String,
        seconds: u64,
        reason: String,
    },
    #[error("the device thread ended: {0}")]
    Device(String),
}

pub type Result<T> = std::result::Result<T, WorkerError>;

impl WorkerError {
    pub(crate) fn config(
        field: &'static str,
        value: impl ToString,
        problem: impl Into<String>,
    ) -> WorkerError {
        WorkerError::Config {
            field,
            value: value.to_string(),
            problem: problem.into(),
        }
    }
}

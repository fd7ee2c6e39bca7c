//! What can go wrong while a router starts or runs. Errors of single requests are gRPC statuses, see `api::errors`.

use std::net::SocketAddr;

/// Why a router did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum RouterError {
    #[error("{field} = {value}: {problem}; {advice}")]
    Config {
        field: &'static str,
        value: String,
        problem: String,
        advice: &'static str,
    },
    #[error(transparent)]
    Plan(#[from] conclave_plan::PlanError),
    #[error("{0}; give another directory, or serve token ids only with --skip-tokenizer-init")]
    Text(#[from] conclave_text::TextError),
    #[error(
        "cannot listen on {address} for {purpose}; choose another address or port, or port 0 for any free one"
    )]
    Bind {
        purpose: &'static str,
        address: SocketAddr,
        source: std::io::Error,
    },
    #[error("the {purpose} server stopped")]
    Server {
        purpose: &'static str,
        source: tonic::transport::Error,
    },
    #[error("cannot start {what}")]
    Start {
        what: &'static str,
        source: std::io::Error,
    },
    #[error("the sequencer stopped unexpectedly; its log says why")]
    SequencerGone,
}

pub type Result<T> = std::result::Result<T, RouterError>;

impl RouterError {
    pub(crate) fn config(
        field: &'static str,
        value: impl ToString,
        problem: impl Into<String>,
        advice: &'static str,
    ) -> RouterError {
        RouterError::Config {
            field,
            value: value.to_string(),
            problem: problem.into(),
            advice,
        }
    }
}

//! Why an exchange ended early.

use conclave_kernels::backend::KernelError;

/// An exchange that did not come to its end. The epoch is over for this rank; nothing was left hanging.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    #[error("the epoch was aborted")]
    Aborted,
    #[error("rank {suspect} did not answer in {phase} of layer {layer} within {milliseconds} ms")]
    Deadline {
        suspect: u32,
        phase: &'static str,
        layer: usize,
        milliseconds: u64,
    },
    #[error("connection to rank {rank}: {problem}")]
    Peer { rank: u32, problem: String },
    /// A peer left the epoch, and says because of whom.
    #[error("rank {rank} left the epoch{}", because(*.suspect))]
    HungUp { rank: u32, suspect: Option<u32> },
    /// What a peer sent breaks the contract. It is not trusted any further.
    #[error("rank {rank} sent {problem}")]
    Protocol { rank: u32, problem: String },
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

impl TransportError {
    /// The rank at fault, if it is known.
    pub fn suspect(&self) -> Option<u32> {
        match self {
            TransportError::Deadline { suspect, .. } => Some(*suspect),
            TransportError::Peer { rank, .. } | TransportError::Protocol { rank, .. } => Some(*rank),
            TransportError::HungUp { suspect, .. } => *suspect,
            TransportError::Kernel(error) => suspect_of(error),
            TransportError::Aborted => None,
        }
    }
}

/// The rank that a device waited for in vain, if it knows.
pub fn suspect_of(error: &KernelError) -> Option<u32> {
    match error {
        KernelError::Exchange { peer, .. } if *peer != u32::MAX => Some(*peer),
        _ => None,
    }
}

fn because(suspect: Option<u32>) -> String {
    suspect.map_or(String::new(), |suspect| format!(" because of rank {suspect}"))
}

pub type Result<T> = std::result::Result<T, TransportError>;

//! What an op can say instead of doing its work.

#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("{op}: {what} is {found}, expected {expected}")]
    Shape {
        op: &'static str,
        what: &'static str,
        found: String,
        expected: String,
    },
    #[error("{device}: {what} needs {needed} bytes, {free} are free")]
    OutOfMemory {
        device: String,
        what: String,
        needed: u64,
        free: u64,
    },
    #[error("{0}")]
    Unsupported(String),
    /// Bytes of a weight could not be read.
    #[error("a weight cannot be read: {0}")]
    Read(String),
    /// [`Reading`](super::Reading) said so.
    #[error("an upload was stopped")]
    Stopped,
    /// Whoever has the weights can say which.
    #[error("a weight holds NaN or infinity")]
    NotFinite,
    #[error("{device}: {what}")]
    Device { device: String, what: String },
    /// The epoch is over; the device is well. `peer`: the rank that was waited for.
    #[error("exchange of experts: {what}")]
    Exchange { peer: u32, what: String },
}

pub type Result<T> = std::result::Result<T, KernelError>;

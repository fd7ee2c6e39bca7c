//! NCCL: the exchange for any number of GPUs on any number of hosts, one rank a GPU.

mod communicator;
mod library;
pub mod measure;

pub use communicator::{ABORT_WAIT, Communicator, Until};
pub use library::{ID_BYTES, Nccl, UniqueId, Version};

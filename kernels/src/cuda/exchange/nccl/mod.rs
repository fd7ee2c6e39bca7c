//! NCCL: the exchange for any number of GPUs on any number of hosts, one rank a GPU.

mod communicator;
mod epoch;
mod exchange;
mod few;
mod launch;
mod library;
mod many;
pub mod measure;
mod messages;
mod reach;
pub(crate) mod topology;
mod watch;

pub use communicator::{ABORT_WAIT, Communicator, Until};
pub(crate) use exchange::NcclExchange;
pub use library::{ID_BYTES, Nccl, UniqueId, Version, set_environment};

//! A rank: weights, experts, KV pages; executes the steps it is told to.
//!
//! One thread owns the device, the model and the transport; async code around it only moves messages. What this
//! crate is not: it knows no text and decides nothing (which sequences run, where experts go, when an epoch ends
//! is the router's). May touch: the checkpoint's files read-only, the device, the router's stream, its peers'
//! connections. Must stay true: a bad message is answered with a reason and never ends the process; nothing waits
//! without a deadline.

pub mod checkpoint;
mod config;
pub mod device;
mod error;
pub mod layout;
pub mod model;
mod shell;
pub mod slots;
mod trace;
pub mod transport;
pub mod verify;
pub mod weights;

pub use config::{Fault, FaultKind, LoadFormat, WorkerConfig};
pub use error::WorkerError;
pub use shell::run;

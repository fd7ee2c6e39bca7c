//! The device thread: the only one that touches the device, the model and the transport.

mod rank;

pub use rank::{Rank, RankError};

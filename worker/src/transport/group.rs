//! What an epoch's exchange between devices is made from.

use std::net::TcpStream;
use std::time::Duration;

use conclave_plan::placement::Placement;

use super::nccl::CommunicatorId;
use super::{Abort, Capacity, TransportKind};

/// One rank's view of it.
pub struct Group<'a> {
    pub kind: TransportKind,
    pub epoch: u64,
    pub rank: u32,
    pub ranks: u32,
    pub placement: &'a Placement,
    pub layers: usize,
    pub capacity: Capacity,
    pub deterministic: bool,
    pub deadline: Duration,
    pub abort: Abort,
    /// By rank, proven.
    pub streams: Vec<Option<TcpStream>>,
    pub communicator: Option<CommunicatorId>,
}

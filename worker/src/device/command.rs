//! What the shell asks of the device thread.

use std::net::TcpStream;
use std::time::Duration;

use conclave_plan::placement::Placement;
use conclave_proto::cluster::v1 as wire;
use tokio::sync::mpsc;

use crate::transport::nccl::CommunicatorId;
use crate::transport::{Abort, TransportKind};

/// Commands that may wait for the device thread: the steps in flight, and a few around an epoch's change. A router
/// that sends more has lost count, and is hung up on.
pub const MAX_QUEUED_COMMANDS: usize = 64;

/// In the order given; each step belongs to the epoch that was joined last.
pub enum Command {
    /// Load the experts of an epoch's placement, and leave the epoch before.
    Load(Box<EpochPlan>),
    /// All ranks are connected: answer `EpochReady`.
    Join {
        epoch: u64,
        links: Links,
    },
    Step(Box<wire::Step>),
    /// Hang up on the peers of this epoch.
    Leave {
        epoch: u64,
    },
}

/// What connects the ranks of an epoch.
#[derive(Debug)]
pub struct Links {
    /// By rank, each proved to be the peer; none at this rank's own place.
    pub streams: Vec<Option<TcpStream>>,
    /// For an epoch over NCCL.
    pub communicator: Option<CommunicatorId>,
}

/// A checked `EpochStart`.
#[derive(Clone, Debug)]
pub struct EpochPlan {
    pub epoch: u64,
    pub rank: u32,
    pub ranks: u32,
    pub transport: TransportKind,
    pub placement: Placement,
    pub collective_deadline: Duration,
    pub abort: Abort,
    /// Where answers of this epoch go. A router that has gone takes it along.
    pub outbox: Outbox,
}

/// To the router. Never waits: a router that does not read is hung up on.
#[derive(Clone, Debug)]
pub struct Outbox {
    sender: mpsc::Sender<wire::FromWorker>,
}

/// Messages that may wait for the network: seconds of steps.
pub const MAX_QUEUED_MESSAGES: usize = 1024;

impl Outbox {
    pub fn new() -> (Outbox, mpsc::Receiver<wire::FromWorker>) {
        let (sender, receiver) = mpsc::channel(MAX_QUEUED_MESSAGES);
        (Outbox { sender }, receiver)
    }

    /// False if the message was dropped: the router is gone, or does not read.
    pub fn send(&self, message: wire::from_worker::Message) -> bool {
        let message = wire::FromWorker {
            message: Some(message),
        };
        self.sender.try_send(message).is_ok()
    }

    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }
}

//! One attached worker as the sequencer sees it: its stream, and which sequence holds which of its slots.

use std::collections::HashMap;
use std::sync::Arc;

use conclave_proto::cluster::v1 as wire;
use conclave_router_core::api::{SequenceId, Slot, StepPlan};
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

/// A worker's stream; an error is its last item.
pub type Outbox = mpsc::Sender<Result<wire::ToWorker, Status>>;

/// Who a worker is to its peers.
#[derive(Clone, Debug)]
pub struct PeerIdentity {
    pub worker_id: Arc<str>,
    /// host:port of its transport.
    pub peer_address: Arc<str>,
    /// local, tcp, ipc, nccl.
    pub transports: Arc<[String]>,
    /// Equal for workers whose devices can map each other's memory; empty: none.
    pub host_id: Arc<str>,
    /// Equal for workers that share a GPU; empty: not a GPU.
    pub device_uuid: Arc<str>,
}

/// An attached worker.
pub struct Peer {
    pub identity: PeerIdentity,
    outbox: Outbox,
    slots: HashMap<Slot, SequenceId>,
    /// Dropped with the peer: ends the session that reads from the worker.
    _open: oneshot::Sender<()>,
}

impl Peer {
    pub fn new(identity: PeerIdentity, outbox: Outbox, open: oneshot::Sender<()>) -> Peer {
        Peer {
            identity,
            outbox,
            slots: HashMap::new(),
            _open: open,
        }
    }

    /// False: the worker does not keep up, or its stream is gone.
    #[must_use]
    pub fn send(&self, message: wire::ToWorker) -> bool {
        self.outbox.try_send(Ok(message)).is_ok()
    }

    /// The last word to a worker, if it still reads.
    pub fn close(self, status: Status) {
        if self.outbox.try_send(Err(status)).is_err() {
            tracing::debug!(worker = %self.identity.worker_id, "the stream was closed before its last message");
        }
    }

    /// Keeps the slots up to date; calls `started` with every sequence that gets a slot.
    pub fn apply(&mut self, plan: &StepPlan, mut started: impl FnMut(SequenceId)) {
        for slot in &plan.end {
            self.slots.remove(slot);
        }
        for start in &plan.start {
            self.slots.insert(start.slot, start.id);
            started(start.id);
        }
    }

    /// Every epoch begins with empty slots.
    pub fn reset_slots(&mut self) {
        self.slots.clear();
    }

    pub fn sequence(&self, slot: Slot) -> Option<SequenceId> {
        self.slots.get(&slot).copied()
    }
}

//! An epoch's start as its workers are told it: who is in it, over which transport, and with which secret.

use bytes::Bytes;
use conclave_proto::cluster::v1 as pb;
use conclave_proto::cluster::v1::to_worker::Message;
use conclave_router_core::api::{Epoch, EpochPlan, WorkerId};
use tonic::Status;

use super::super::wire;
use super::Machine;
use crate::cluster::transport;

/// An epoch over NCCL whose id has not been drawn yet.
pub(super) struct Communicator {
    epoch: Epoch,
    /// In order of rank.
    workers: Vec<WorkerId>,
}

impl Machine {
    pub(super) fn start_epoch(&mut self, worker: WorkerId, plan: &EpochPlan) {
        let members: Vec<_> = plan.workers.iter().filter_map(|w| self.peers.get(w)).collect();
        if members.len() != plan.workers.len() {
            return; // one of them was lost a moment ago: the core hears of it next
        }
        let transport = match transport::choose(&self.transport, members.iter().map(|peer| &peer.identity)) {
            Ok(transport) => transport,
            Err(problem) => {
                tracing::error!(worker = worker.0, problem, "no transport for the epoch");
                return self.lose(worker, Some(Status::failed_precondition(problem)));
            }
        };
        let peers = (0..).zip(&members).map(|(rank, peer)| pb::Peer {
            rank,
            worker_id: peer.identity.worker_id.to_string(),
            peer_address: peer.identity.peer_address.to_string(),
        });
        let peers = peers.collect();
        if self.secret.0 != plan.epoch || self.secret.1.is_empty() {
            self.secret = (plan.epoch, Bytes::from(crate::random::bytes::<32>().to_vec()));
        }
        self.communicator = (transport == "nccl").then(|| Communicator {
            epoch: plan.epoch,
            workers: plan.workers.clone(),
        });
        let message = wire::epoch_start(
            plan,
            wire::EpochWire {
                peers,
                transport,
                peer_secret: self.secret.1.clone(),
            },
        );
        if let Some(peer) = self.peers.get_mut(&worker) {
            peer.reset_slots();
        }
        self.send(worker, message);
    }

    /// Rank 0 says it once for its epoch; from anybody else, or late, it is not passed on.
    pub(super) fn communicator_id(&mut self, worker: WorkerId, epoch: Epoch, id: &Bytes) {
        let from_rank_0 =
            |wanted: &mut Communicator| wanted.epoch == epoch && wanted.workers.first() == Some(&worker);
        let Some(wanted) = self.communicator.take_if(from_rank_0) else {
            return tracing::debug!(worker = worker.0, epoch = epoch.0, "an id that nobody waits for");
        };
        for worker in &wanted.workers[1..] {
            let message = Message::CommunicatorId(pb::CommunicatorId {
                epoch: epoch.0,
                id: id.clone(),
            });
            self.send(*worker, wire::to_worker(message));
        }
        self.settle();
    }
}

//! The workers' side: the `Attach` service, who may attach, and one session per worker.
//!
//! Must stay true: nothing a worker sends is used before it was checked against the bounds it declared; a worker
//! that breaks them, floods, or falls silent is lost, and no other worker notices more than that.

mod registry;
mod session;
pub mod translate;
pub mod transport;

use std::sync::Arc;
use std::time::Duration;

use conclave_proto::cluster::v1 as pb;
use conclave_proto::cluster::v1::cluster_server::Cluster;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

pub use registry::{Registry, Terms};
pub use session::Limits;

use crate::clock::Clock;
use crate::net::Caller;
use crate::sequencer::{Input, OUTBOX};

/// Workers connected at once; those that are not in the group wait for a place in it.
const MAX_SESSIONS: usize = conclave_plan::limits::MAX_RANKS as usize;

/// The `conclave.cluster.v1.Cluster` service.
#[derive(Clone)]
pub struct ClusterService {
    shared: Arc<Shared>,
}

/// What all sessions share.
struct Shared {
    registry: Arc<Registry>,
    inputs: mpsc::Sender<Input>,
    clock: Clock,
    limits: Limits,
    heartbeat_interval: Duration,
    expected_workers: u32,
    sessions: Arc<Semaphore>,
}

impl ClusterService {
    pub fn new(
        registry: Arc<Registry>,
        inputs: mpsc::Sender<Input>,
        clock: Clock,
        limits: Limits,
        heartbeat_interval: Duration,
        expected_workers: u32,
    ) -> ClusterService {
        ClusterService {
            shared: Arc::new(Shared {
                registry,
                inputs,
                clock,
                limits,
                heartbeat_interval,
                expected_workers,
                sessions: Arc::new(Semaphore::new(MAX_SESSIONS)),
            }),
        }
    }
}

#[tonic::async_trait]
impl Cluster for ClusterService {
    type AttachStream = ReceiverStream<Result<pb::ToWorker, Status>>;

    /// Answers at once, so that a worker may wait for the response before it says Hello; what is wrong with the
    /// Hello is the stream's status.
    async fn attach(
        &self,
        request: Request<Streaming<pb::FromWorker>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let unknown = Caller {
            address: None,
            badge: None,
        };
        let caller = request.extensions().get::<Caller>().cloned().unwrap_or(unknown);
        let (outbox, stream) = mpsc::channel(OUTBOX);
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move {
            session::run(&shared, request.into_inner(), outbox, caller).await;
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

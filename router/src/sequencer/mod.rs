//! The one task that owns the core. Everything that happens to the cluster passes through here, in one order.
//!
//! Must stay true: no text work, no blocking, no waiting for anyone. Channels in are bounded; what goes out to a
//! worker is bounded (a worker that does not keep up is lost), and what goes out to a stream is pushed into a sink
//! that bounds itself.

mod machine;
mod peer;
mod wire;

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use conclave_router_core::Snapshot;
use conclave_router_core::api::{
    ClusterState, Delivered, EndReason, Epoch, Event, FinishReason, Logprobs, Rejection, SequenceId, Submit,
    Usage, WorkerId, WorkerInfo,
};
use tokio::sync::{mpsc, oneshot, watch};
use tonic::Status;

pub use machine::Machine;
pub use peer::{Outbox, PeerIdentity};

/// Messages of workers that may wait for the sequencer; then the worker's stream waits.
pub const INPUT_QUEUE: usize = 1024;
/// Requests that may wait for the sequencer (not for a slot: that queue is the core's).
pub const SUBMISSION_QUEUE: usize = 256;
/// Messages that may wait for a worker's stream. The core sends at most `steps_in_flight` steps ahead, so a full
/// outbox means that the worker reads nothing.
pub const OUTBOX: usize = 64;

/// What the cluster side tells the sequencer.
pub enum Input {
    Attached {
        worker: WorkerId,
        info: WorkerInfo,
        identity: PeerIdentity,
        outbox: Outbox,
        /// Dropped when the sequencer has given the worker up.
        open: oneshot::Sender<()>,
    },
    Event(Event),
    /// Rank 0 of an epoch has drawn the id of its communicator.
    CommunicatorId {
        worker: WorkerId,
        epoch: Epoch,
        id: Bytes,
    },
    /// The session of a worker ended. With a status, the worker is told why.
    Lost {
        worker: WorkerId,
        status: Option<Status>,
    },
    /// The core at this moment, for metrics.
    Inspect(oneshot::Sender<Inspection>),
    /// No new sequences; answered when the last one has ended.
    Drain(oneshot::Sender<()>),
    /// Say goodbye to everyone and end.
    Stop {
        reason: String,
    },
}

/// The core's figures, and the names of the workers in them.
pub struct Inspection {
    pub core: Snapshot,
    pub worker_ids: HashMap<WorkerId, Arc<str>>,
}

/// All choices of one request; admitted together or not at all.
pub struct Submission {
    pub sequences: Vec<Submit>,
    pub sink: Arc<dyn Sink>,
    /// W3C traceparent of a sampled request.
    pub trace_parent: Option<Arc<str>>,
    pub reply: oneshot::Sender<Result<(), Rejection>>,
}

/// The end of one sequence that the outside asks for.
#[derive(Debug)]
pub struct End {
    pub id: SequenceId,
    pub reason: EndReason,
}

/// The tokens that may come next in one sequence.
#[derive(Debug)]
pub struct NextMask {
    pub id: SequenceId,
    pub position: u32,
    pub mask: Arc<[u8]>,
}

/// Where the output of a request's sequences goes. Called by the sequencer: must return at once.
pub trait Sink: Send + Sync {
    fn push(self: Arc<Self>, choice: u32, output: Output);
}

/// Output of one sequence, in order; `Finish` is the last.
#[derive(Debug)]
pub enum Output {
    /// The sequence got a slot for the first time.
    Running,
    Tokens(Vec<Delivered>),
    /// Of the prompt's tokens from the second on, in order.
    PromptLogprobs(Vec<Logprobs>),
    Finish {
        reason: FinishReason,
        usage: Usage,
    },
}

/// What everyone may know of the cluster.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    pub state: ClusterState,
    pub epoch: Epoch,
    pub workers: u32,
    pub running: u32,
    pub waiting: u32,
    /// Tokens of the longest sequence that a worker's KV pages hold; unset without workers.
    pub longest_sequence: Option<u64>,
    pub draining: bool,
    /// An epoch has been serving at some time.
    pub has_served: bool,
}

impl Default for View {
    fn default() -> View {
        View {
            state: ClusterState::Starting,
            epoch: Epoch(0),
            workers: 0,
            running: 0,
            waiting: 0,
            longest_sequence: None,
            draining: false,
            has_served: false,
        }
    }
}

/// The senders of all channels into the sequencer, and its view of the cluster.
#[derive(Clone)]
pub struct Handle {
    pub inputs: mpsc::Sender<Input>,
    pub submissions: mpsc::Sender<Submission>,
    /// A sequence reserves its place here before it is submitted, so that its end can always be told at once,
    /// from code that cannot wait.
    pub ends: mpsc::Sender<End>,
    /// Masks of the sequences that wait for one.
    pub masks: mpsc::Sender<NextMask>,
    pub view: watch::Receiver<View>,
}

/// The receiving ends, for [`Machine`].
pub struct Channels {
    inputs: mpsc::Receiver<Input>,
    submissions: mpsc::Receiver<Submission>,
    ends: mpsc::Receiver<End>,
    masks: mpsc::Receiver<NextMask>,
    view: watch::Sender<View>,
}

/// `max_live`: sequences that may be alive at once, waiting and running.
pub fn channels(max_live: usize) -> (Handle, Channels) {
    let (inputs, inputs_in) = mpsc::channel(INPUT_QUEUE);
    let (submissions, submissions_in) = mpsc::channel(SUBMISSION_QUEUE);
    let (ends, ends_in) = mpsc::channel(max_live);
    let (masks, masks_in) = mpsc::channel(max_live);
    let (view_out, view) = watch::channel(View::default());
    let handle = Handle {
        inputs,
        submissions,
        ends,
        masks,
        view,
    };
    let channels = Channels {
        inputs: inputs_in,
        submissions: submissions_in,
        ends: ends_in,
        masks: masks_in,
        view: view_out,
    };
    (handle, channels)
}

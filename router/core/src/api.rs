//! The vocabulary of the core: what goes in (`Event`), what comes out (`Command`), and the plain types in both.
//!
//! The shell translates wire messages into events and commands into wire messages; it decides nothing. Times are
//! microseconds since some fixed start that the caller chooses.

mod request;

use std::sync::Arc;

use conclave_plan::placement::Placement;

pub use request::{Sampling, Submit};

/// Microseconds since a start that the caller chose; never goes back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Micros(pub u64);

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);
    };
}

id!(/// One sequence (one choice of a client's request); the shell never uses a number twice.
    SequenceId(u64));
id!(/// One attached worker; a worker that comes back gets a new number.
    WorkerId(u64));
id!(/// Position of a worker within an epoch's group.
    Rank(u32));
id!(/// A sequence's place on a worker.
    Slot(u32));
id!(/// A KV page on a worker.
    PageId(u32));
id!(/// A fixed set of ranks, a placement and a communicator.
    Epoch(u64));
id!(/// Number of a step within its epoch, from 0.
    StepId(u64));

/// What a worker said of itself.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerInfo {
    pub kv_pages: u32,
    pub max_slots: u32,
    pub max_batched_tokens: u32,
    /// Experts of one layer that fit; `None`: all.
    pub expert_capacity: Option<u32>,
    pub wanted_rank: Option<u32>,
}

/// Everything that can happen to the cluster.
#[derive(Clone, Debug)]
pub enum Event {
    Submit(Submit),
    /// The client went away, or a stop string was found: end now, deliver nothing more. `Finish` still follows,
    /// with the given reason.
    End {
        id: SequenceId,
        reason: EndReason,
    },
    /// The mask for the next token of a masked sequence, one bit per token. `position` is the token's place in
    /// the sequence: prompt tokens + tokens generated before it. Any other position is ignored.
    Mask {
        id: SequenceId,
        position: u32,
        mask: Arc<[u8]>,
    },
    WorkerAttached {
        worker: WorkerId,
        info: WorkerInfo,
    },
    /// It has loaded its experts, is connected to all peers of the epoch and has stopped all work of older ones.
    WorkerReady {
        worker: WorkerId,
        epoch: Epoch,
    },
    StepDone {
        worker: WorkerId,
        epoch: Epoch,
        step: StepId,
        result: StepResult,
    },
    /// The worker could not run the step (a collective passed its deadline, a peer is gone), or makes no sense of
    /// what it says about `slot`.
    StepFailed {
        worker: WorkerId,
        epoch: Epoch,
        step: StepId,
        suspect: Option<Rank>,
        slot: Option<Slot>,
    },
    /// Stream closed or heartbeats stopped (the shell watches the clock of heartbeats).
    WorkerLost {
        worker: WorkerId,
    },
    /// The worker asked to leave within `deadline`.
    Notice {
        worker: WorkerId,
        deadline: Micros,
    },
    /// No new sequences; `Command::Drained` when the last has ended.
    Drain,
    /// Time passed: sent at least every 50 ms.
    Tick,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// A stop string was found in the text.
    Stop,
    Cancelled,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepResult {
    pub samples: Vec<Sample>,
    pub prompt_logprobs: Vec<PromptLogprobs>,
    pub busy_us: u64,
    pub idle_us: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub slot: Slot,
    pub token: u32,
    pub logprobs: Option<Logprobs>,
    /// This slot alone failed, and why.
    pub error: Option<SampleError>,
}

/// Why a slot has no token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SampleError {
    Failed(String),
    /// The sequence's own sampling and mask forbid every token.
    Unsatisfiable(String),
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Logprobs {
    pub sampled: f32,
    pub rank: u32,
    pub top: Vec<(u32, f32)>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct PromptLogprobs {
    pub slot: Slot,
    /// Position of the token that `entries[0]` tells of.
    pub position: u32,
    pub entries: Vec<Logprobs>,
}

/// Everything the core may ask for.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// The next step of an epoch, to each of its workers, in order.
    Step {
        worker: WorkerId,
        plan: StepPlan,
    },
    /// Load, connect, answer `WorkerReady`.
    StartEpoch {
        worker: WorkerId,
        plan: EpochPlan,
    },
    AbortEpoch {
        worker: WorkerId,
        epoch: Epoch,
        reason: String,
    },
    /// Close this worker's stream.
    Dismiss {
        worker: WorkerId,
        reason: String,
    },
    /// New tokens of a sequence, in order, each exactly once.
    Deliver {
        id: SequenceId,
        tokens: Vec<Delivered>,
    },
    PromptLogprobs {
        id: SequenceId,
        position: u32,
        entries: Vec<Logprobs>,
    },
    Finish {
        id: SequenceId,
        reason: FinishReason,
        usage: Usage,
    },
    /// Not admitted; nothing was done.
    Reject {
        id: SequenceId,
        error: Rejection,
    },
    /// Cluster state changed (for health, keep-alives and logs).
    State(ClusterState),
    Drained,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Delivered {
    pub token: u32,
    pub logprobs: Option<Logprobs>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token (which one) or a stop string (`None`).
    Stop(Option<u32>),
    Length,
    Cancelled,
    Error(String),
    /// What the request asks for cannot go on, and why.
    Unsatisfiable(String),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt_tokens: u32,
    pub cached_tokens: u32,
    pub generated_tokens: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rejection {
    QueueFull {
        limit: usize,
        retry_after_ms: u64,
    },
    /// The sequence can never fit into one worker's pages.
    TooLong {
        tokens: u64,
        limit: u64,
    },
    Draining,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClusterState {
    /// Too few workers have attached yet.
    Starting,
    /// Epoch is loading or connecting.
    Forming {
        epoch: Epoch,
    },
    Serving {
        epoch: Epoch,
        ranks: u32,
    },
    /// The survivors cannot hold the model; sequences wait.
    Parked,
}

#[derive(Clone, Debug, PartialEq)]
pub struct EpochPlan {
    pub epoch: Epoch,
    pub rank: Rank,
    /// In order of rank.
    pub workers: Vec<WorkerId>,
    pub placement: Arc<Placement>,
    /// Slots are always reset at an epoch's start; KV pages keep their content if true.
    pub keep_kv: bool,
    pub collective_deadline: Micros,
}

/// One worker's share of one step. Applied in the order of the fields.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepPlan {
    pub epoch: Epoch,
    pub step: StepId,
    /// The most tokens that any worker has in this step.
    pub group_tokens: u32,
    /// Of this step, where it is longer than the epoch's; else 0.
    pub collective_deadline: Micros,
    pub end: Vec<Slot>,
    pub start: Vec<SlotStart>,
    pub pages: Vec<(Slot, Vec<PageId>)>,
    pub runs: Vec<Run>,
}

impl StepPlan {
    /// Tokens of all runs.
    pub fn tokens(&self) -> u32 {
        let of_run = |run: &Run| match &run.input {
            RunInput::Tokens(tokens) => tokens.len() as u32,
            RunInput::LastSampled => 1,
        };
        self.runs.iter().map(of_run).sum()
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct SlotStart {
    pub slot: Slot,
    /// For spans only.
    pub id: SequenceId,
    pub sampling: Arc<Sampling>,
    pub stop_tokens: Arc<[u32]>,
    /// `stop_tokens` may not be sampled before this position.
    pub suppress_until: u32,
    pub cached_tokens: u32,
    pub pages: Vec<PageId>,
    pub prompt_tokens: u32,
    /// The first `cached_tokens` tokens; empty unless sampling needs them (penalties, bad words).
    pub history: Vec<u32>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    pub slot: Slot,
    pub position: u32,
    pub input: RunInput,
    pub sample: bool,
    pub prompt_logprobs: Option<u32>,
    /// The prompt token after this run, if its log-probability is wanted.
    pub next_prompt_token: Option<u32>,
    pub mask: Option<Arc<[u8]>>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum RunInput {
    Tokens(Vec<u32>),
    /// One token: what this slot sampled last.
    LastSampled,
}

/// Limits of the core; each is a flag of the router.
#[derive(Clone, Debug, PartialEq)]
pub struct CoreConfig {
    pub page_tokens: u32,
    pub experts: u32,
    /// Form the first epoch when so many workers have attached.
    pub expected_workers: u32,
    /// Sequences that may wait; one more is rejected.
    pub max_waiting: usize,
    /// Running sequences per worker.
    pub max_num_seqs: u32,
    /// Tokens per worker and step.
    pub max_num_batched_tokens: u32,
    pub max_model_len: u32,
    pub enable_prefix_cache: bool,
    /// Steps sent before the first of them has come back; 2 keeps the device busy.
    pub steps_in_flight: u32,
    pub collective_deadline_floor: Micros,
}

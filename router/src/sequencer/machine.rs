//! The loop around the core: inputs become events, commands become messages. See the module above for what must
//! stay true.

mod epochs;
mod streams;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use conclave_proto::cluster::v1 as pb;
use conclave_proto::cluster::v1::to_worker::Message;
use conclave_router_core::Core;
use conclave_router_core::api::{
    ClusterState, Command, CoreConfig, Epoch, Event, FinishReason, Rejection, SequenceId, StepPlan, Usage,
    WorkerId,
};
use tokio::sync::oneshot;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tonic::Status;

use super::peer::Peer;
use super::{Channels, End, Input, Inspection, NextMask, Output, View, wire};
use crate::clock::Clock;
use crate::metrics::Metrics;
use epochs::Communicator;
use streams::{Stream, trace_parents};

/// The core wants to hear of time at least this often while it has something to time.
const TICK: Duration = Duration::from_millis(50);
/// Ticks go on for so long after the last event: steps may still be on their way.
const TICKS_AFTER: Duration = Duration::from_secs(2);

/// What the shell adds to the core.
pub struct Machine {
    core: Core,
    clock: Clock,
    layers: u32,
    page_tokens: u64,
    transport: String,
    metrics: Arc<Metrics>,
    channels: Channels,
    peers: HashMap<WorkerId, Peer>,
    streams: HashMap<SequenceId, Stream>,
    view: View,
    secret: (Epoch, Bytes),
    /// Who may say the id of its communicator, and who waits for it.
    communicator: Option<Communicator>,
    drained: Vec<oneshot::Sender<()>>,
    /// Sequences are alive, or steps on their way.
    busy: bool,
    /// Events that follow from carrying out a command (a worker that does not read is lost).
    pending: VecDeque<Event>,
    /// Sequences refused while their submission is being handled.
    refused: Option<Rejection>,
}

impl Machine {
    pub fn new(
        config: CoreConfig,
        layers: u32,
        transport: String,
        clock: Clock,
        metrics: Arc<Metrics>,
        channels: Channels,
    ) -> Machine {
        Machine {
            page_tokens: config.page_tokens.into(),
            core: Core::new(config),
            clock,
            layers,
            transport,
            metrics,
            channels,
            peers: HashMap::new(),
            streams: HashMap::new(),
            view: View::default(),
            secret: (Epoch(0), Bytes::new()),
            communicator: None,
            drained: Vec::new(),
            busy: false,
            pending: VecDeque::new(),
            refused: None,
        }
    }

    /// Runs until told to stop, or until all senders are gone.
    pub async fn run(mut self) {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last_event = Instant::now();
        loop {
            let timed = self.has_something_to_time(last_event);
            let mut tick = false;
            tokio::select! {
                Some(input) = self.channels.inputs.recv() => {
                    if let Input::Stop { reason } = input {
                        return self.stop(&reason);
                    }
                    self.input(input);
                }
                Some(End { id, reason }) = self.channels.ends.recv() => self.handle(Event::End { id, reason }),
                Some(NextMask { id, position, mask }) = self.channels.masks.recv() => {
                    self.handle(Event::Mask { id, position, mask });
                }
                Some(submission) = self.channels.submissions.recv() => self.submit(submission),
                _ = ticks.tick(), if timed => {
                    tick = true;
                    self.handle(Event::Tick);
                }
                else => return self.stop("the router ended"),
            }
            if !tick {
                last_event = Instant::now();
            }
            self.publish();
        }
    }

    fn has_something_to_time(&self, last_event: Instant) -> bool {
        self.busy
            || !self.drained.is_empty()
            || matches!(self.view.state, ClusterState::Forming { .. })
            || (!self.peers.is_empty() && last_event.elapsed() < TICKS_AFTER)
    }

    fn input(&mut self, input: Input) {
        match input {
            Input::Attached {
                worker,
                info,
                identity,
                outbox,
                open,
            } => {
                self.peers.insert(worker, Peer::new(identity, outbox, open));
                self.handle(Event::WorkerAttached { worker, info });
            }
            Input::Event(event) => self.handle(event),
            Input::CommunicatorId { worker, epoch, id } => self.communicator_id(worker, epoch, &id),
            Input::Inspect(reply) => {
                let name = |(&worker, peer): (&WorkerId, &Peer)| (worker, peer.identity.worker_id.clone());
                let inspection = Inspection {
                    core: self.core.snapshot(),
                    worker_ids: self.peers.iter().map(name).collect(),
                };
                // Whoever asked may have stopped waiting.
                let _ = reply.send(inspection);
            }
            Input::Lost { worker, status } => {
                self.lose(worker, status);
                self.settle();
            }
            Input::Drain(reply) => {
                self.view.draining = true;
                self.drained.push(reply);
                self.handle(Event::Drain);
            }
            Input::Stop { .. } => {}
        }
    }

    /// Feeds one event to the core, carries out what it asks for, and goes on with what follows from that.
    fn handle(&mut self, event: Event) {
        self.pending.push_back(event);
        self.settle();
    }

    fn settle(&mut self) {
        while let Some(event) = self.pending.pop_front() {
            // A worker that was given up has nothing more to say.
            let from = match &event {
                Event::WorkerReady { worker, .. }
                | Event::StepDone { worker, .. }
                | Event::StepFailed { worker, .. }
                | Event::Notice { worker, .. } => Some(worker),
                _ => None,
            };
            if from.is_some_and(|worker| !self.peers.contains_key(worker)) {
                continue;
            }
            for command in self.core.handle(self.clock.now(), event) {
                self.execute(command);
            }
        }
    }

    fn execute(&mut self, command: Command) {
        match command {
            Command::Step { worker, plan } => self.step(worker, plan),
            Command::StartEpoch { worker, plan } => self.start_epoch(worker, &plan),
            Command::AbortEpoch {
                worker,
                epoch,
                reason,
            } => {
                tracing::info!(worker = worker.0, epoch = epoch.0, reason, "epoch aborted");
                let abort = Message::EpochAbort(pb::EpochAbort {
                    epoch: epoch.0,
                    reason,
                });
                self.send(worker, wire::to_worker(abort));
            }
            Command::Dismiss { worker, reason } => {
                if let Some(peer) = self.peers.remove(&worker) {
                    tracing::warn!(worker = %peer.identity.worker_id, reason, "worker dismissed");
                    peer.close(Status::aborted(reason));
                }
            }
            Command::Deliver { id, tokens } => self.output(id, Output::Tokens(tokens)),
            Command::PromptLogprobs { id, entries, .. } => self.output(id, Output::PromptLogprobs(entries)),
            Command::Finish { id, reason, usage } => self.finish(id, reason, usage),
            Command::Reject { id, error } => {
                self.streams.remove(&id);
                self.refused.get_or_insert(error);
            }
            Command::State(state) => self.state(state),
            Command::Drained => {
                for reply in self.drained.drain(..) {
                    // Whoever asked may have stopped waiting.
                    let _ = reply.send(());
                }
            }
        }
    }

    fn step(&mut self, worker: WorkerId, plan: StepPlan) {
        let Some(peer) = self.peers.get_mut(&worker) else {
            return;
        };
        let streams = &mut self.streams;
        peer.apply(&plan, |id| {
            if let Some(stream) = streams.get_mut(&id)
                && !std::mem::replace(&mut stream.started, true)
            {
                Arc::clone(&stream.sink).push(stream.choice, Output::Running);
            }
        });
        let trace_parents = trace_parents(peer, streams, &plan);
        let message = wire::step(plan, self.layers, trace_parents);
        self.send(worker, message);
    }

    fn send(&mut self, worker: WorkerId, message: pb::ToWorker) {
        if self.peers.get(&worker).is_some_and(|peer| !peer.send(message)) {
            let problem = format!("the worker read none of the last {} messages", super::OUTBOX);
            self.lose(worker, Some(Status::resource_exhausted(problem)));
        }
    }

    /// The core hears of it when the command at hand has been carried out.
    fn lose(&mut self, worker: WorkerId, status: Option<Status>) {
        let Some(peer) = self.peers.remove(&worker) else {
            return;
        };
        let why = status
            .as_ref()
            .map_or("its stream closed", |status| status.message());
        tracing::warn!(worker = %peer.identity.worker_id, why, "worker lost");
        if let Some(status) = status {
            peer.close(status);
        }
        self.metrics.workers_lost.inc();
        self.pending.push_back(Event::WorkerLost { worker });
    }

    fn state(&mut self, state: ClusterState) {
        tracing::info!(?state, workers = self.peers.len(), "cluster");
        if let ClusterState::Forming { epoch } | ClusterState::Serving { epoch, .. } = state {
            self.view.epoch = epoch;
        }
        self.view.has_served |= matches!(state, ClusterState::Serving { .. });
        self.view.state = state;
    }

    /// Shows the state of things to whoever watches.
    fn publish(&mut self) {
        let core = self.core.snapshot();
        self.view.workers = count(self.peers.len());
        let pages = core.workers.iter().map(|worker| worker.pages_total).max();
        // The last token needs no page.
        self.view.longest_sequence = pages.map(|pages| u64::from(pages) * self.page_tokens + 1);
        self.view.running = count(core.running);
        self.view.waiting = count(core.waiting);
        self.busy = core.running + core.waiting + core.steps_in_flight > 0;
        let view = &self.view;
        self.channels.view.send_if_modified(|old| {
            let changed = old != view;
            if changed {
                old.clone_from(view);
            }
            changed
        });
    }

    /// Ends every sequence that is left, and says goodbye to the workers.
    fn stop(mut self, reason: &str) {
        let left: Vec<SequenceId> = self.streams.keys().copied().collect();
        for id in left {
            let error = FinishReason::Error(format!("the router shut down: {reason}"));
            self.finish(id, error, Usage::default());
        }
        for (_, peer) in self.peers.drain() {
            let shutdown = Message::Shutdown(pb::Shutdown {
                reason: reason.into(),
            });
            if !peer.send(wire::to_worker(shutdown)) {
                tracing::debug!(worker = %peer.identity.worker_id, "gone before it was told to shut down");
            }
        }
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

//! The loop of the device thread: runs steps and answers; `epoch` loads and joins.
//!
//! A step that has come is queued on the device before the one in front of it is waited for. Must stay true: answers
//! leave in the order of steps, each as soon as it is there; no step of an epoch is answered after a later epoch was
//! begun or the epoch was aborted; after a failed step the epoch is over here, and its later steps are not answered;
//! an error that only this process can have (weights that cannot be read, a broken device) ends it with the reason.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use conclave_kernels::backend::KernelError;
use conclave_proto::cluster::v1 as wire;
use conclave_proto::cluster::v1::from_worker::Message;
use crossbeam_channel::{Receiver, RecvTimeoutError, TryRecvError};

use super::command::{Command, EpochPlan};
use super::epoch::Loaded;
use super::status::Status;
use super::{Rank, RankError};
use crate::config::{Fault, FaultKind};
use crate::error::Result;
use crate::model::{ModelError, NoTap};
use crate::transport::TransportError;
use crate::weights::{Progress, WeightSource};

/// What the thread owns.
pub struct Device {
    pub rank: Rank,
    pub source: Arc<WeightSource>,
    pub threads: usize,
    pub progress: Arc<Progress>,
    pub status: Arc<Status>,
    /// Loaded, and waiting for its peers.
    pub(super) loaded: Option<Loaded>,
    pub(super) live: Option<Live>,
    /// Fires once.
    pub(super) fault: Option<Fault>,
}

/// How long the thread sleeps between two looks at a step that runs: what a token may be late.
const LOOK_EVERY: Duration = Duration::from_micros(20);

pub(super) struct Live {
    pub(super) plan: EpochPlan,
    next_step: u64,
    /// In flight, oldest first.
    running: VecDeque<Running>,
    /// When the last step ended, or the epoch began.
    last_end: Instant,
}

struct Running {
    step: u64,
    submitted: Instant,
    span: tracing::Span,
}

impl Live {
    pub(super) fn new(plan: EpochPlan) -> Live {
        Live {
            plan,
            next_step: 0,
            running: VecDeque::new(),
            last_end: Instant::now(),
        }
    }

    /// Microseconds that the device stood still before the oldest step, and that it took for it.
    fn times(&self, step: &Running, end: Instant) -> (u64, u64) {
        let begin = step.submitted.max(self.last_end);
        let micros = |time: Duration| time.as_micros() as u64;
        (micros(begin - self.last_end), micros(end - begin))
    }
}

impl Device {
    /// Runs until the shell is gone.
    pub(super) fn run(mut self, commands: Receiver<Command>) -> Result<()> {
        self.load_replicated()?;
        // A step that cannot be queued yet.
        let mut held: Option<Command> = None;
        loop {
            if self.rank.in_flight() == 0 {
                let next = match held.take() {
                    None => self.next_when_idle(&commands)?,
                    command => command,
                };
                let Some(command) = next else {
                    return Ok(());
                };
                self.handle(command)?;
                continue;
            }
            if self.is_ready() {
                self.fetch()?;
                continue;
            }
            if held.is_none() {
                held = commands.try_recv().ok();
            }
            if let Some(command) = held.take_if(|command| self.may_handle(command)) {
                self.handle(command)?;
                continue;
            }
            if held.is_some() {
                self.fetch()?;
                continue;
            }
            match commands.recv_timeout(LOOK_EVERY) {
                Ok(command) => held = Some(command),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
    }

    /// The next command, `None` at the end. Until it comes, decode steps of the epoch are made ready, each in milliseconds.
    fn next_when_idle(&mut self, commands: &Receiver<Command>) -> Result<Option<Command>> {
        while self.live.is_some() {
            match commands.try_recv() {
                Ok(command) => return Ok(Some(command)),
                Err(TryRecvError::Disconnected) => return Ok(None),
                Err(TryRecvError::Empty) => {
                    if !self.rank.executor.record_one()? {
                        break;
                    }
                }
            }
        }
        Ok(commands.recv().ok())
    }

    fn handle(&mut self, command: Command) -> Result<()> {
        match command {
            Command::Load(plan) => self.load(*plan),
            Command::Join { epoch, links } => self.join(epoch, links),
            Command::Step(step) => self.submit(*step),
            Command::Leave { epoch } => {
                self.leave(epoch);
                Ok(())
            }
        }
    }

    /// A step may have to wait for the one in flight; everything else ends the epoch anyway.
    fn may_handle(&self, command: &Command) -> bool {
        match command {
            Command::Step(step) => self.rank.may_submit(step),
            _ => true,
        }
    }

    /// An error is met again by `fetch`.
    fn is_ready(&mut self) -> bool {
        self.rank.is_ready().unwrap_or(true)
    }

    fn submit(&mut self, step: wire::Step) -> Result<()> {
        let Some(live) = self.live.as_mut().filter(|live| live.plan.epoch == step.epoch) else {
            tracing::debug!(
                epoch = step.epoch,
                step = step.step,
                "a step of an epoch that is not live is dropped"
            );
            return Ok(());
        };
        let (epoch, number) = (step.epoch, step.step);
        if number != live.next_step {
            let expected = live.next_step;
            self.rank.end_epoch();
            return self.fail(
                epoch,
                number,
                RankError::OutOfOrder {
                    step: number,
                    expected,
                },
            );
        }
        live.next_step += 1;
        let fault = self.fault.take_if(|fault| fault.step == number);
        if fault.is_some_and(|fault| fault.kind == FaultKind::Nan) {
            self.rank.executor.poison();
        }
        let span = step_span(&step);
        let submitted = Instant::now();
        let mut result = span.in_scope(|| self.rank.submit(step, &mut NoTap));
        if fault.is_some_and(|fault| fault.kind == FaultKind::Kernel) && result.is_ok() {
            let fault = self.rank.executor.backend().provoke_fault();
            result = fault.map_err(|error| RankError::Model(error.into()));
        }
        match result {
            Ok(()) => {
                live.running.push_back(Running {
                    step: number,
                    submitted,
                    span,
                });
                Ok(())
            }
            Err(error) => self.fail(epoch, number, error),
        }
    }

    /// Answers the oldest step in flight.
    fn fetch(&mut self) -> Result<()> {
        let Some(live) = self.live.as_mut() else {
            self.rank.end_epoch();
            return Ok(());
        };
        let Some(running) = live.running.pop_front() else {
            self.rank.end_epoch();
            return Ok(());
        };
        let epoch = live.plan.epoch;
        match running.span.in_scope(|| self.rank.fetch(&mut NoTap)) {
            Ok(mut result) => {
                let end = Instant::now();
                (result.idle_us, result.busy_us) = live.times(&running, end);
                live.last_end = end;
                self.status.set(epoch, running.step);
                if !live.plan.abort.is_aborted() {
                    live.plan.outbox.send(Message::StepResult(result));
                }
                Ok(())
            }
            Err(error) => self.fail(epoch, running.step, error),
        }
    }

    /// Tells the router, unless it was the one that ended the epoch. A broken device ends the process.
    fn fail(&mut self, epoch: u64, step: u64, error: RankError) -> Result<()> {
        self.tell(epoch, step, &error);
        match error {
            RankError::Model(ModelError::Kernel(error @ KernelError::Device { .. })) => {
                Err(ModelError::from(error).into())
            }
            _ => Ok(()),
        }
    }

    fn tell(&mut self, epoch: u64, step: u64, error: &RankError) {
        let Some(live) = self.live.take() else {
            return;
        };
        let is_aborted = matches!(
            error,
            RankError::Model(ModelError::Transport(TransportError::Aborted))
        );
        if live.plan.abort.is_aborted() || is_aborted {
            return;
        }
        tracing::warn!(epoch, step, %error, suspect = error.suspect(), "step failed");
        live.plan.outbox.send(Message::StepFailed(wire::StepFailed {
            epoch,
            step,
            reason: error.to_string(),
            suspect_rank: error.suspect(),
            slot: error.slot(),
        }));
    }
}

/// Joins the traces of the requests in this step; without any it is there for debugging only.
fn step_span(step: &wire::Step) -> tracing::Span {
    let tokens: usize = step.runs.iter().map(|run| run.tokens.len().max(1)).sum();
    if step.trace_parents.is_empty() {
        return tracing::debug_span!(
            "step",
            epoch = step.epoch,
            step = step.step,
            runs = step.runs.len(),
            tokens
        );
    }
    let span = tracing::info_span!(
        "step",
        epoch = step.epoch,
        step = step.step,
        runs = step.runs.len(),
        tokens
    );
    crate::trace::join(&span, &step.trace_parents);
    span
}

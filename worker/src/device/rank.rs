//! One rank: executor, slots and transport put together. Takes step messages, gives result messages.
//!
//! A step is submitted, and fetched later: up to [`MAX_IN_FLIGHT`] are on the device, so that it never waits for this
//! host. The second takes the tokens of the first from the device's memory.

use std::collections::VecDeque;
use std::time::Duration;

use conclave_proto::cluster::v1 as wire;

use crate::model::{Executor, Launched, ModelError, StepInput, Tap};
use crate::slots::{Prepared, SlotLimits, Slots, StepError};
use crate::transport::{Transport, device, suspect_of};

/// Steps that are submitted and not fetched: one that runs, and one behind it.
pub const MAX_IN_FLIGHT: usize = 2;

/// Why a step has no result. The epoch is over for this rank.
#[derive(Debug, thiserror::Error)]
pub enum RankError {
    #[error("step {step} is malformed: {error}")]
    Step { step: u64, error: StepError },
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("step {step} came, {expected} is the next")]
    OutOfOrder { step: u64, expected: u64 },
    #[error("no epoch is live")]
    NoEpoch,
    #[error("no step is in flight")]
    NoStep,
}

impl RankError {
    /// The rank at fault, if it is known.
    pub fn suspect(&self) -> Option<u32> {
        match self {
            RankError::Model(ModelError::Transport(error)) => error.suspect(),
            RankError::Model(ModelError::Kernel(error)) => suspect_of(error),
            _ => None,
        }
    }

    /// The slot whose part of the step made no sense.
    pub fn slot(&self) -> Option<u32> {
        match self {
            RankError::Step { error, .. } => error.slot,
            _ => None,
        }
    }
}

/// Owned by the device thread.
pub struct Rank {
    pub executor: Executor,
    slots: Slots,
    transport: Option<Box<dyn Transport>>,
    in_flight: VecDeque<InFlight>,
}

struct InFlight {
    epoch: u64,
    step: u64,
    prepared: Prepared,
    launched: Launched,
}

impl Drop for Rank {
    /// Leaves the group before the device and its libraries go: what they still do for an epoch must not outlive them.
    fn drop(&mut self) {
        self.end_epoch();
        if let Err(error) = device::leave(self.executor.backend()) {
            tracing::debug!(%error, "the device did not leave its group");
        }
    }
}

impl Rank {
    pub fn new(executor: Executor, limits: SlotLimits) -> Rank {
        Rank {
            executor,
            slots: Slots::new(limits),
            transport: None,
            in_flight: VecDeque::with_capacity(MAX_IN_FLIGHT),
        }
    }

    pub fn slots(&self) -> &Slots {
        &self.slots
    }

    /// An epoch begins: all slots are free, steps go over `transport`. What lies in KV pages stays.
    pub fn begin_epoch(&mut self, transport: Box<dyn Transport>) {
        self.end_epoch();
        self.slots.reset();
        self.transport = Some(transport);
    }

    /// Hangs up on the peers, so that none of them waits for this rank, and lets go of the steps in flight.
    pub fn end_epoch(&mut self) {
        self.transport = None;
        while let Some(step) = self.in_flight.pop_front() {
            if step.launched == Launched::Whole
                && let Err(error) = self.executor.fetch()
            {
                // The next call to the device says so again.
                tracing::warn!(step = step.step, %error, "a step of an epoch that is over failed");
            }
        }
    }

    pub fn describe_transport(&self) -> String {
        self.transport
            .as_ref()
            .map_or("none".into(), |transport| transport.describe())
    }

    /// Steps that are submitted and not fetched.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Whether `step` may be submitted before those in flight are fetched.
    pub fn may_submit(&self, step: &wire::Step) -> bool {
        match self.in_flight.back() {
            None => true,
            Some(last) => {
                self.in_flight.len() < MAX_IN_FLIGHT
                    && last.launched == Launched::Whole
                    && !self.slots.must_wait(step)
            }
        }
    }

    /// Queues one step; `fetch` gives its result. After an error the epoch is over here and the peers know it.
    pub fn submit(&mut self, step: wire::Step, tap: &mut dyn Tap) -> Result<(), RankError> {
        let result = self.try_submit(step, tap);
        if result.is_err() {
            self.end_epoch();
        }
        result
    }

    /// Whether `fetch` would not wait for the device.
    pub fn is_ready(&mut self) -> Result<bool, RankError> {
        match self.in_flight.front() {
            Some(oldest) if oldest.launched == Launched::Whole => Ok(self.executor.is_ready()?),
            _ => Ok(true),
        }
    }

    /// The result of the oldest step in flight; waits for it. The times in it are left to the caller.
    pub fn fetch(&mut self, tap: &mut dyn Tap) -> Result<wire::StepResult, RankError> {
        let result = self.try_fetch(tap);
        if result.is_err() {
            self.end_epoch();
        }
        result
    }

    /// Runs one step while no other is in flight.
    pub fn step(&mut self, step: wire::Step, tap: &mut dyn Tap) -> Result<wire::StepResult, RankError> {
        self.submit(step, tap)?;
        self.fetch(tap)
    }

    fn try_submit(&mut self, step: wire::Step, tap: &mut dyn Tap) -> Result<(), RankError> {
        let Some(transport) = self.transport.as_deref_mut() else {
            return Err(RankError::NoEpoch);
        };
        let (epoch, number) = (step.epoch, step.step);
        let patience = Duration::from_millis(step.collective_deadline_ms);
        self.executor.set_group_tokens(step.group_tokens as usize)?;
        let mut prepared = self
            .slots
            .apply(step)
            .map_err(|error| RankError::Step { step: number, error })?;
        transport.set_patience(patience);
        let every_row = prepared.samples_every_row();
        let (batch, sampling) = prepared.sampling(&self.slots);
        let input = StepInput {
            step: number,
            batch,
            sampling: &sampling,
        };
        let launched = self.executor.launch(transport, input, every_row, tap)?;
        if launched == Launched::Whole {
            prepared.leave_on_device(&mut self.slots, number);
        }
        self.in_flight.push_back(InFlight {
            epoch,
            step: number,
            prepared,
            launched,
        });
        Ok(())
    }

    fn try_fetch(&mut self, tap: &mut dyn Tap) -> Result<wire::StepResult, RankError> {
        let Some(oldest) = self.in_flight.pop_front() else {
            return Err(RankError::NoStep);
        };
        let InFlight {
            epoch,
            step,
            mut prepared,
            launched,
        } = oldest;
        let (samples, prompt_logprobs) = match launched {
            Launched::Whole => {
                let sampled = self.executor.fetch()?;
                prepared.fetched(&mut self.slots, step, sampled)
            }
            Launched::Layers { has_logits } => {
                let (batch, sampling) = prepared.sampling(&self.slots);
                let input = StepInput {
                    step,
                    batch,
                    sampling: &sampling,
                };
                let output = self.executor.sample(input, has_logits, tap)?;
                prepared.finish(&mut self.slots, output)
            }
        };
        Ok(wire::StepResult {
            epoch,
            step,
            samples,
            prompt_logprobs,
            busy_us: 0,
            idle_us: 0,
        })
    }
}

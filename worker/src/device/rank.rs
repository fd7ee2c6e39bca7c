//! One rank: executor, slots and transport put together. Takes a step message, gives a result message.

use conclave_proto::cluster::v1 as wire;

use crate::model::{Executor, ModelError, StepInput, Tap};
use crate::slots::{SlotLimits, Slots, StepError};
use crate::transport::Transport;

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
}

impl RankError {
    /// The rank at fault, if it is known.
    pub fn suspect(&self) -> Option<u32> {
        match self {
            RankError::Model(ModelError::Transport(error)) => error.suspect(),
            _ => None,
        }
    }
}

/// Owned by the device thread.
pub struct Rank {
    pub executor: Executor,
    slots: Slots,
    transport: Option<Box<dyn Transport>>,
}

impl Rank {
    pub fn new(executor: Executor, limits: SlotLimits) -> Rank {
        Rank {
            executor,
            slots: Slots::new(limits),
            transport: None,
        }
    }

    pub fn slots(&self) -> &Slots {
        &self.slots
    }

    /// An epoch begins: all slots are free, steps go over `transport`. What lies in KV pages stays.
    pub fn begin_epoch(&mut self, transport: Box<dyn Transport>) {
        self.slots.reset();
        self.transport = Some(transport);
    }

    /// Hangs up on the peers, so that none of them waits for this rank.
    pub fn end_epoch(&mut self) {
        self.transport = None;
    }

    pub fn describe_transport(&self) -> String {
        self.transport
            .as_ref()
            .map_or("none".into(), |transport| transport.describe())
    }

    /// Runs one step. After an error the epoch is over here and the peers know it. The times in the result are left
    /// to the caller.
    pub fn step(&mut self, step: wire::Step, tap: &mut dyn Tap) -> Result<wire::StepResult, RankError> {
        let result = self.try_step(step, tap);
        if result.is_err() {
            self.end_epoch();
        }
        result
    }

    fn try_step(&mut self, step: wire::Step, tap: &mut dyn Tap) -> Result<wire::StepResult, RankError> {
        let Some(transport) = self.transport.as_deref_mut() else {
            return Err(RankError::NoEpoch);
        };
        let (epoch, number) = (step.epoch, step.step);
        let mut prepared = self
            .slots
            .apply(step)
            .map_err(|error| RankError::Step { step: number, error })?;
        let (batch, sampling) = prepared.sampling(&self.slots);
        let input = StepInput {
            step: number,
            batch,
            sampling: &sampling,
        };
        let output = self.executor.step(transport, input, tap)?;
        let (samples, prompt_logprobs) = prepared.finish(&mut self.slots, output);
        Ok(wire::StepResult {
            epoch,
            step: number,
            samples,
            prompt_logprobs,
            busy_us: 0,
            idle_us: 0,
        })
    }
}

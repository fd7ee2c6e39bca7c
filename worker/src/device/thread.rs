//! The loop of the device thread: loads, joins epochs, runs steps, answers.
//!
//! Must stay true: no step of an epoch is answered after a later one was begun or the epoch was aborted; after a
//! failed step the epoch is over here, and its later steps are not answered; an error that only this process can
//! have (weights that cannot be read, a broken device) ends it with the reason.

use std::sync::Arc;
use std::time::Instant;

use conclave_proto::cluster::v1 as wire;
use conclave_proto::cluster::v1::from_worker::Message;
use crossbeam_channel::Receiver;

use super::command::{Command, EpochPlan, Links};
use super::status::Status;
use super::{Rank, RankError};
use crate::error::{Result, WorkerError};
use crate::layout::Size;
use crate::model::{ModelError, NoTap};
use crate::transport::routing::Routes;
use crate::transport::tcp::TcpTransport;
use crate::transport::{LocalTransport, Transport, TransportError};
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
}

pub(super) struct Loaded {
    plan: EpochPlan,
    weight_bytes: u64,
    seconds: f64,
}

pub(super) struct Live {
    plan: EpochPlan,
    next_step: u64,
    /// Since when the device has nothing to do.
    idle_since: Instant,
}

impl Device {
    /// Runs until the shell is gone.
    pub(super) fn run(mut self, commands: Receiver<Command>) -> Result<()> {
        self.load_replicated()?;
        for command in commands {
            match command {
                Command::Load(plan) => self.load(*plan)?,
                Command::Join { epoch, links } => self.join(epoch, links)?,
                Command::Step(step) => self.step(*step)?,
                Command::Leave { epoch } => self.leave(epoch),
            }
        }
        Ok(())
    }

    fn load_replicated(&mut self) -> Result<()> {
        let begin = Instant::now();
        self.rank
            .executor
            .load_replicated(&self.source, self.threads, &self.progress)?;
        let seconds = begin.elapsed().as_secs_f64();
        tracing::info!(seconds, "loaded what every rank holds");
        Ok(())
    }

    fn load(&mut self, plan: EpochPlan) -> Result<()> {
        self.rank.end_epoch();
        (self.live, self.loaded) = (None, None);
        let begin = Instant::now();
        let cancelled = || plan.abort.is_aborted();
        let loaded = self.rank.executor.load_experts(
            &self.source,
            &plan.placement,
            plan.rank,
            self.threads,
            &self.progress,
            &cancelled,
        );
        match loaded {
            Err(_) if plan.abort.is_aborted() => Ok(()),
            Err(error) => Err(error.into()),
            Ok(weight_bytes) => {
                let seconds = begin.elapsed().as_secs_f64();
                tracing::info!(epoch = plan.epoch, rank = plan.rank, experts = %Size(weight_bytes), seconds, "experts loaded");
                self.loaded = Some(Loaded {
                    plan,
                    weight_bytes,
                    seconds,
                });
                Ok(())
            }
        }
    }

    fn join(&mut self, epoch: u64, links: Links) -> Result<()> {
        let Some(loaded) = self.loaded.take_if(|loaded| loaded.plan.epoch == epoch) else {
            return Ok(());
        };
        let plan = loaded.plan;
        if plan.abort.is_aborted() {
            return Ok(());
        }
        let routes = Routes::new(&plan.placement, plan.rank, self.source.spec().layers.len());
        let transport: Box<dyn Transport> = if plan.ranks == 1 {
            Box::new(LocalTransport::new(routes))
        } else {
            let capacity = self.rank.executor.capacity();
            let transport = TcpTransport::new(
                routes,
                capacity,
                links.streams,
                plan.collective_deadline,
                plan.abort.clone(),
            );
            Box::new(
                transport.map_err(|error| WorkerError::Device(format!("connections to peers: {error}")))?,
            )
        };
        tracing::info!(epoch, rank = plan.rank, ranks = plan.ranks, transport = %transport.describe(), "epoch ready");
        self.rank.begin_epoch(transport);
        self.status.set(epoch, 0);
        plan.outbox.send(Message::EpochReady(wire::EpochReady {
            epoch,
            weight_bytes: loaded.weight_bytes,
            load_seconds: loaded.seconds,
        }));
        self.live = Some(Live {
            plan,
            next_step: 0,
            idle_since: Instant::now(),
        });
        Ok(())
    }

    fn leave(&mut self, epoch: u64) {
        self.loaded.take_if(|loaded| loaded.plan.epoch == epoch);
        if self.live.take_if(|live| live.plan.epoch == epoch).is_some() {
            self.rank.end_epoch();
        }
    }

    fn step(&mut self, step: wire::Step) -> Result<()> {
        let Some(live) = self.live.as_mut().filter(|live| live.plan.epoch == step.epoch) else {
            tracing::debug!(
                epoch = step.epoch,
                step = step.step,
                "a step of an epoch that is not live is dropped"
            );
            return Ok(());
        };
        let (epoch, number) = (step.epoch, step.step);
        let begin = Instant::now();
        let idle = begin - live.idle_since;
        let result = if number == live.next_step {
            let span = step_span(&step);
            let _entered = span.enter();
            self.rank.step(step, &mut NoTap)
        } else {
            self.rank.end_epoch();
            Err(RankError::OutOfOrder {
                step: number,
                expected: live.next_step,
            })
        };
        match result {
            Ok(mut result) => {
                result.idle_us = idle.as_micros() as u64;
                result.busy_us = begin.elapsed().as_micros() as u64;
                live.next_step += 1;
                self.status.set(epoch, number);
                if !live.plan.abort.is_aborted() {
                    live.plan.outbox.send(Message::StepResult(result));
                }
                live.idle_since = Instant::now();
                Ok(())
            }
            Err(error) => self.fail(epoch, number, error),
        }
    }

    /// Tells the router, unless it was the one that ended the epoch.
    fn fail(&mut self, epoch: u64, step: u64, error: RankError) -> Result<()> {
        let Some(live) = self.live.take() else {
            return Ok(());
        };
        if live.plan.abort.is_aborted()
            || matches!(
                error,
                RankError::Model(ModelError::Transport(TransportError::Aborted))
            )
        {
            return Ok(());
        }
        tracing::warn!(epoch, step, %error, suspect = error.suspect(), "step failed");
        live.plan.outbox.send(Message::StepFailed(wire::StepFailed {
            epoch,
            step,
            reason: error.to_string(),
            suspect_rank: error.suspect(),
        }));
        Ok(())
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

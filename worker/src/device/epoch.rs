//! Between epochs: what the device thread loads, and how it joins and leaves the other ranks.
//!
//! Must stay true: what is loaded of an epoch that was aborted meanwhile is not joined; an epoch that cannot be joined is
//! told to the router, and only a broken device ends the process.

use std::time::Instant;

use conclave_kernels::backend::KernelError;
use conclave_proto::cluster::v1 as wire;
use conclave_proto::cluster::v1::from_worker::Message;

use super::command::{EpochPlan, Links};
use super::thread::{Device, Live};
use crate::error::Result;
use crate::layout::Size;
use crate::model::ModelError;
use crate::transport::device;
use crate::transport::group::Group;
use crate::transport::routing::Routes;
use crate::transport::tcp::TcpTransport;
use crate::transport::{LocalTransport, Transport, TransportError, TransportKind};

pub(super) struct Loaded {
    plan: EpochPlan,
    weight_bytes: u64,
    seconds: f64,
}

impl Device {
    pub(super) fn load_replicated(&mut self) -> Result<()> {
        let begin = Instant::now();
        self.rank
            .executor
            .load_replicated(&self.source, self.threads, &self.progress)?;
        let seconds = begin.elapsed().as_secs_f64();
        tracing::info!(seconds, "loaded what every rank holds");
        Ok(())
    }

    pub(super) fn load(&mut self, plan: EpochPlan) -> Result<()> {
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

    pub(super) fn join(&mut self, epoch: u64, links: Links) -> Result<()> {
        let Some(loaded) = self.loaded.take_if(|loaded| loaded.plan.epoch == epoch) else {
            return Ok(());
        };
        let plan = loaded.plan;
        if plan.abort.is_aborted() {
            return Ok(());
        }
        let transport = match self.connect(&plan, links) {
            Ok(transport) => transport,
            Err(error) => return not_joined(&plan, error),
        };
        let exchanges = matches!(plan.transport, TransportKind::Ipc | TransportKind::Nccl) && plan.ranks > 1;
        let path = self.rank.executor.choose_path(plan.ranks == 1, exchanges)?;
        if let Some(recorded) = self.rank.executor.take_recorded() {
            let (steps, seconds) = (recorded.steps, recorded.seconds);
            tracing::info!(steps, memory = %Size(recorded.bytes), seconds, "recorded decode steps");
        }
        tracing::info!(epoch, rank = plan.rank, ranks = plan.ranks, transport = %transport.describe(), path, "epoch ready");
        self.rank.begin_epoch(transport);
        self.status.set(epoch, 0);
        plan.outbox.send(Message::EpochReady(wire::EpochReady {
            epoch,
            weight_bytes: loaded.weight_bytes,
            load_seconds: loaded.seconds,
        }));
        self.live = Some(Live::new(plan));
        Ok(())
    }

    /// The transport that the plan names, over `links`.
    fn connect(
        &mut self,
        plan: &EpochPlan,
        links: Links,
    ) -> std::result::Result<Box<dyn Transport>, TransportError> {
        let layers = self.source.spec().layers.len();
        let executor = &mut self.rank.executor;
        let capacity = executor.capacity();
        if plan.ranks > 1 && matches!(plan.transport, TransportKind::Ipc | TransportKind::Nccl) {
            let group = Group {
                kind: plan.transport,
                epoch: plan.epoch,
                rank: plan.rank,
                ranks: plan.ranks,
                placement: &plan.placement,
                layers,
                capacity,
                deterministic: executor.is_deterministic(),
                deadline: plan.collective_deadline,
                abort: plan.abort.clone(),
                streams: links.streams,
                communicator: links.communicator,
            };
            return device::connect(executor.backend(), group);
        }
        device::leave(executor.backend())?;
        let routes = Routes::new(&plan.placement, plan.rank, layers);
        if plan.ranks == 1 {
            return Ok(Box::new(LocalTransport::new(routes)));
        }
        let transport = TcpTransport::new(
            routes,
            capacity,
            links.streams,
            plan.collective_deadline,
            plan.abort.clone(),
        );
        transport
            .map(|transport| Box::new(transport) as Box<dyn Transport>)
            .map_err(|error| KernelError::Unsupported(format!("connections to peers: {error}")).into())
    }

    pub(super) fn leave(&mut self, epoch: u64) {
        self.loaded.take_if(|loaded| loaded.plan.epoch == epoch);
        if self.live.take_if(|live| live.plan.epoch == epoch).is_some() {
            self.rank.end_epoch();
        }
    }
}

/// An epoch that did not come about: the router hears why. A broken device ends the process.
fn not_joined(plan: &EpochPlan, error: TransportError) -> Result<()> {
    if plan.abort.is_aborted() {
        return Ok(());
    }
    tracing::warn!(epoch = plan.epoch, %error, suspect = error.suspect(), "the epoch could not be joined");
    plan.outbox.send(Message::StepFailed(wire::StepFailed {
        epoch: plan.epoch,
        step: 0,
        reason: error.to_string(),
        suspect_rank: error.suspect(),
        slot: None,
    }));
    match error {
        TransportError::Kernel(error @ KernelError::Device { .. }) => Err(ModelError::from(error).into()),
        _ => Ok(()),
    }
}

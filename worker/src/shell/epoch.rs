//! The epoch that this worker is in, as the shell sees it: how to end it, and the connecting of its ranks.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use conclave_plan::model::ModelSpec;
use conclave_proto::cluster::v1 as wire;
use conclave_proto::cluster::v1::from_worker::Message;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::{communicator, placement};
use crate::device::{Command, DeviceHandle, EpochPlan, Links, Outbox, QueueFull};
use crate::transport::nccl::CommunicatorId;
use crate::transport::tcp::{self, ConnectError};
use crate::transport::{Abort, TransportKind};

/// Peers are told of an epoch at the same time; their connections stand within milliseconds.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// What an `EpochStart` is checked against.
#[derive(Clone, Copy)]
pub(super) struct ModelFacts<'a> {
    pub(super) spec: &'a ModelSpec,
    pub(super) transports: &'a [String],
}

/// The epoch of an attachment, if one was started.
#[derive(Default)]
pub(super) struct Epochs {
    current: Option<Current>,
}

struct Current {
    epoch: u64,
    abort: Abort,
    /// Until it is done.
    connecting: Option<JoinHandle<Connected>>,
    /// Where the id of the epoch's communicator goes, until it has come.
    communicator: Option<oneshot::Sender<CommunicatorId>>,
}

/// What connects the ranks, or why nothing does.
pub(super) type Connected = Result<Links, ConnectError>;

impl Drop for Current {
    fn drop(&mut self) {
        if let Some(task) = &self.connecting {
            task.abort();
        }
    }
}

impl Epochs {
    /// Leaves the epoch before and begins to load and to connect. A message that makes no sense fails the epoch and
    /// nothing else.
    pub(super) fn start(
        &mut self,
        start: wire::EpochStart,
        model: ModelFacts<'_>,
        listener: &Arc<TcpListener>,
        device: &DeviceHandle,
        outbox: &Outbox,
    ) -> Result<(), QueueFull> {
        self.leave(device)?;
        let (epoch, rank) = (start.epoch, start.rank);
        let request = match placement::check(start, model.spec, model.transports) {
            Ok(request) => request,
            Err(problem) => {
                tracing::error!(epoch, problem, "epoch refused");
                outbox.send(failed(epoch, format!("epoch_start: {problem}"), None));
                return Ok(());
            }
        };
        tracing::info!(epoch, rank, ranks = request.ranks, "epoch begins");
        let abort = Abort::new();
        device.send(Command::Load(Box::new(EpochPlan {
            epoch,
            rank,
            ranks: request.ranks,
            transport: request.transport,
            placement: request.placement,
            collective_deadline: request.collective_deadline,
            abort: abort.clone(),
            outbox: outbox.clone(),
        })))?;
        let (listener, group, outbox) = (Arc::clone(listener), request.group, outbox.clone());
        let (tell, told) = oneshot::channel();
        let needs_communicator = request.transport == TransportKind::Nccl && request.ranks > 1;
        let connecting = tokio::spawn(async move {
            let streams = tcp::connect(&listener, &group, CONNECT_DEADLINE);
            if !needs_communicator {
                return Ok(Links {
                    streams: streams.await?,
                    communicator: None,
                });
            }
            let id = communicator::agree((epoch, rank), told, &outbox, CONNECT_DEADLINE);
            let (streams, id) = tokio::try_join!(streams, id)?;
            Ok(Links {
                streams,
                communicator: Some(id),
            })
        });
        self.current = Some(Current {
            epoch,
            abort,
            connecting: Some(connecting),
            communicator: Some(tell),
        });
        Ok(())
    }

    /// Ends the current epoch at once: whoever waits for peers stops waiting.
    pub(super) fn leave(&mut self, device: &DeviceHandle) -> Result<(), QueueFull> {
        let Some(current) = self.current.take() else {
            return Ok(());
        };
        current.abort.abort();
        device.send(Command::Leave { epoch: current.epoch })
    }

    pub(super) fn abort(&mut self, abort: &wire::EpochAbort, device: &DeviceHandle) -> Result<(), QueueFull> {
        if self
            .current
            .as_ref()
            .is_none_or(|current| current.epoch != abort.epoch)
        {
            return Ok(());
        }
        tracing::info!(epoch = abort.epoch, reason = abort.reason, "epoch aborted");
        self.leave(device)
    }

    /// The router passes on the id that rank 0 has drawn. What is not of this epoch, or no id, concerns nobody: the
    /// wait for it ends at its deadline.
    pub(super) fn communicator_id(&mut self, message: &wire::CommunicatorId) {
        let current = self
            .current
            .as_mut()
            .filter(|current| current.epoch == message.epoch);
        if let (Some(current), Ok(id)) = (current, <[u8; _]>::try_from(&message.id[..]))
            && let Some(tell) = current.communicator.take()
        {
            // Nobody waits for it in an epoch over something else.
            let _ = tell.send(CommunicatorId(id));
        }
    }

    /// Resolves when the ranks are connected or cannot be; never, if there is nothing to wait for.
    pub(super) async fn connecting(&mut self) -> Connected {
        match self
            .current
            .as_mut()
            .and_then(|current| current.connecting.as_mut())
        {
            Some(task) => task
                .await
                .unwrap_or_else(|error| Err(ConnectError::Listener(std::io::Error::other(error)))),
            None => pending().await,
        }
    }

    /// What [`Epochs::connecting`] gave, to the device; or to the router why it failed.
    pub(super) fn connected(
        &mut self,
        result: Connected,
        device: &DeviceHandle,
        outbox: &Outbox,
    ) -> Result<(), QueueFull> {
        let Some(current) = &mut self.current else {
            return Ok(());
        };
        current.connecting = None;
        let epoch = current.epoch;
        match result {
            Ok(links) => device.send(Command::Join { epoch, links }),
            Err(error) => {
                tracing::warn!(epoch, %error, "ranks could not be connected");
                outbox.send(failed(epoch, error.to_string(), error.suspect()));
                self.leave(device)
            }
        }
    }
}

/// An epoch that cannot begin fails at its first step.
fn failed(epoch: u64, reason: String, suspect_rank: Option<u32>) -> Message {
    Message::StepFailed(wire::StepFailed {
        epoch,
        step: 0,
        reason,
        suspect_rank,
        slot: None,
    })
}

//! The device thread: the only one that touches the device, the model and the transport.

mod backend;
mod command;
mod epoch;
mod memory;
mod rank;
mod status;
mod thread;

use std::sync::Arc;

use crossbeam_channel::{Sender, TrySendError};
use tokio::sync::oneshot;

pub use backend::{DeviceKind, Gpu, gpus};
pub use command::{Command, EpochPlan, Links, MAX_QUEUED_COMMANDS, Outbox};
pub use memory::open;
pub use rank::{MAX_IN_FLIGHT, Rank, RankError};
pub use status::Status;

use crate::config::WorkerConfig;
use crate::error::{Result, WorkerError};
use crate::layout::Layout;
use crate::model::Executor;
use crate::weights::WeightSource;
use thread::Device;

/// The shell's end of the device thread. The thread ends when this is dropped.
pub struct DeviceHandle {
    commands: Sender<Command>,
    pub status: Arc<Status>,
    /// Why the thread ended.
    pub ended: oneshot::Receiver<Result<()>>,
}

/// More commands are waiting than a router that keeps to the protocol sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("more than {MAX_QUEUED_COMMANDS} steps and epoch changes are waiting for the device")]
pub struct QueueFull;

impl DeviceHandle {
    /// Begins to load what every rank holds onto the device of `executor`, which has all its buffers.
    pub fn start(
        config: &WorkerConfig,
        source: Arc<WeightSource>,
        layout: &Layout,
        executor: Executor,
    ) -> Result<DeviceHandle> {
        let status = Arc::new(Status::default());
        let device = Device {
            rank: Rank::new(executor, layout.slots),
            source,
            threads: layout.threads,
            progress: Arc::clone(&config.progress),
            status: Arc::clone(&status),
            loaded: None,
            live: None,
            fault: config.fault,
        };
        let (commands, queue) = crossbeam_channel::bounded(MAX_QUEUED_COMMANDS);
        let (end, ended) = oneshot::channel();
        let run = move || {
            // The shell may be gone already.
            let _ = end.send(device.run(queue));
        };
        std::thread::Builder::new()
            .name("device".into())
            .spawn(run)
            .map_err(|error| WorkerError::Device(error.to_string()))?;
        Ok(DeviceHandle {
            commands,
            status,
            ended,
        })
    }

    /// Never waits.
    pub fn send(&self, command: Command) -> std::result::Result<(), QueueFull> {
        match self.commands.try_send(command) {
            Err(TrySendError::Full(_)) => Err(QueueFull),
            // The thread has ended; `ended` says why.
            Err(TrySendError::Disconnected(_)) | Ok(()) => Ok(()),
        }
    }
}

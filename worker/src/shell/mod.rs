//! The async shell: moves messages between the router and the device thread. Decides nothing.
//!
//! May touch: the router's stream, the peers' listener, the clock. Must stay true: it never waits for the device;
//! attempts to reach the router are bounded in pace and in time; heartbeats have a thread of their own that makes no
//! device call.

mod attach;
mod communicator;
mod epoch;
mod heartbeat;
mod hello;
mod placement;
mod reconnect;

use std::future::Future;
use std::sync::Arc;

use tokio::net::TcpListener;

use crate::config::{LoadFormat, WorkerConfig};
use crate::device::{self, DeviceHandle, DeviceKind};
use crate::error::{Result, WorkerError};
use crate::layout::Layout;
use crate::weights::WeightSource;
use attach::Ended;
use reconnect::Reconnect;

/// Runs a worker until the router ends it or `shutdown` resolves (a signal): then the router is given notice, and the
/// worker stays until its sequences have moved away or its drain timeout has passed. Needs a tokio runtime.
pub async fn run(config: WorkerConfig, shutdown: impl Future<Output = ()>) -> Result<()> {
    let kind = DeviceKind::choose(&config.device)?;
    let source = open_source(&config)?;
    let free = (kind == DeviceKind::Cpu).then(hello::free_memory);
    let mut layout = Layout::new(&config, &source, free)?;
    let executor = device::open(kind, &config, &source, &mut layout)?;
    tracing::info!(backend = %executor.describe_backend(), "device opened");
    tracing::info!("resolved layout\n{layout}");
    let listener = TcpListener::bind(config.listen)
        .await
        .map_err(|error| WorkerError::Listen {
            address: config.listen,
            error,
        })?;
    let hello = hello::Identity::new(&config, &layout, kind, &listener)?;
    tracing::info!(
        worker_id = hello.worker_id(),
        peers = hello.peer_address(),
        router = config.router_addr,
        "worker starts"
    );
    let (listener, source, transports) = (Arc::new(listener), Arc::new(source), kind.transports());
    let mut device = DeviceHandle::start(&config, Arc::clone(&source), &layout, executor)?;
    let model = epoch::ModelFacts {
        spec: source.spec(),
        transports: &transports,
    };
    let mut shutdown = std::pin::pin!(shutdown);
    let mut reconnect = Reconnect::new(&config);
    let mut returns = false;
    loop {
        let attached = attach::attach(
            &config,
            &hello,
            returns,
            &listener,
            &mut device,
            model,
            shutdown.as_mut(),
        );
        match attached.await {
            Ended::Finished => return Ok(()),
            Ended::Device(result) => return result,
            Ended::Refused(status) => {
                return Err(WorkerError::Refused {
                    router: config.router_addr,
                    reason: status,
                });
            }
            Ended::Lost { was_attached, reason } => {
                returns |= was_attached;
                let pause = reconnect.after(was_attached, reason)?;
                tokio::select! {
                    () = shutdown.as_mut() => return Ok(()),
                    () = tokio::time::sleep(pause) => {}
                }
            }
        }
    }
}

fn open_source(config: &WorkerConfig) -> Result<WeightSource> {
    let (directory, overrides) = (&config.model_dir, config.hf_overrides.as_ref());
    Ok(match config.load_format {
        LoadFormat::Auto => WeightSource::open(directory, overrides)?,
        LoadFormat::Dummy { seed } => {
            WeightSource::dummy(directory, overrides, seed, config.resolved_threads())?
        }
    })
}

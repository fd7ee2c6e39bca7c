//! One attachment to the router: from Hello until the stream ends.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use conclave_proto::cluster::v1 as wire;
use conclave_proto::cluster::v1::cluster_client::ClusterClient;
use conclave_proto::cluster::v1::from_worker::Message;
use conclave_proto::cluster::v1::to_worker;
use tokio::net::TcpListener;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;
use tonic::{Code, Status, Streaming};

use super::epoch::{Epochs, ModelFacts};
use super::heartbeat;
use super::hello::Identity;
use crate::config::WorkerConfig;
use crate::device::{Command, DeviceHandle, Outbox, QueueFull};
use crate::error::{Result, WorkerError};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const WELCOME_TIMEOUT: Duration = Duration::from_secs(10);
/// HTTP/2 pings find a router whose host is gone.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// A step's message, as large as the router sends one: a prefill of 128K tokens takes 512 KiB, masks for thousands of
/// slots most.
const MAX_MESSAGE_BYTES: usize = 128 << 20;
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);

/// How an attachment ended.
pub(super) enum Ended {
    /// As asked: by the router or by `shutdown`.
    Finished,
    /// The device thread is gone, and with it the worker.
    Device(Result<()>),
    /// The router does not want this worker, and will not want it later.
    Refused(String),
    /// The stream is gone; a later attempt may succeed.
    Lost { was_attached: bool, reason: String },
}

/// Dials the router, says Hello and serves until the end. `returns`: it was attached before.
pub(super) async fn attach(
    config: &WorkerConfig,
    identity: &Identity,
    returns: bool,
    listener: &Arc<TcpListener>,
    device: &mut DeviceHandle,
    model: ModelFacts<'_>,
    mut shutdown: Pin<&mut (impl Future<Output = ()> + ?Sized)>,
) -> Ended {
    let (outbox, queue) = Outbox::new();
    let lost = |reason: String| Ended::Lost {
        was_attached: false,
        reason,
    };
    outbox.send(Message::Hello(identity.hello()));
    let stream = tokio::select! {
        () = shutdown.as_mut() => return Ended::Finished,
        ended = &mut device.ended => return device_ended(ended),
        stream = dial(config, ReceiverStream::new(queue)) => stream,
    };
    let (stream, welcome) = match stream {
        Ok(welcomed) => welcomed,
        Err(status) => {
            return match status.code() {
                // The router has not noticed yet that the session before is over.
                Code::AlreadyExists if returns => lost(status.message().to_owned()),
                Code::Unimplemented => Ended::Refused(
                    "no workers are served there; give --router the port that the router prints for workers"
                        .into(),
                ),
                Code::InvalidArgument
                | Code::Unauthenticated
                | Code::PermissionDenied
                | Code::FailedPrecondition
                | Code::AlreadyExists => Ended::Refused(status.message().to_owned()),
                _ => lost(status.message().to_owned()),
            };
        }
    };
    tracing::info!(
        router = config.router_addr,
        heartbeat_ms = welcome.heartbeat_interval_ms,
        "attached"
    );
    if let Err(error) = heartbeat::start(
        outbox.clone(),
        Arc::clone(&device.status),
        welcome.heartbeat_interval_ms,
    ) {
        return Ended::Device(Err(WorkerError::Device(format!("heartbeat thread: {error}"))));
    }
    let mut session = Session {
        config,
        outbox,
        epochs: Epochs::default(),
        model,
        noticed: false,
    };
    let ended = session.serve(stream, listener, device, shutdown).await;
    // The device must not wait for peers on behalf of a router that is gone.
    match session.epochs.leave(device) {
        Ok(()) => ended,
        Err(error) => Ended::Device(Err(WorkerError::Device(error.to_string()))),
    }
}

async fn dial(
    config: &WorkerConfig,
    messages: ReceiverStream<wire::FromWorker>,
) -> std::result::Result<(Streaming<wire::ToWorker>, wire::Welcome), Status> {
    let url = match config.router_addr.contains("://") {
        true => config.router_addr.clone(),
        false => format!("http://{}", config.router_addr),
    };
    let endpoint = Endpoint::from_shared(url)
        .map_err(|error| Status::invalid_argument(format!("{} is no address: {error}", config.router_addr)))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true);
    let channel = endpoint
        .connect()
        .await
        .map_err(|error| Status::unavailable(root_cause(&error)))?;
    let mut client = ClusterClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let welcomed = timeout(WELCOME_TIMEOUT, async {
        let mut stream = client.attach(messages).await?.into_inner();
        match stream.message().await?.and_then(|first| first.message) {
            Some(to_worker::Message::Welcome(welcome)) => Ok((stream, welcome)),
            Some(_) => Err(Status::unavailable("its first message was no Welcome")),
            None => Err(Status::unavailable("it closed the stream")),
        }
    });
    welcomed
        .await
        .unwrap_or_else(|_| Err(Status::unavailable("it did not answer Hello")))
}

/// tonic says "transport error"; what happened is at the end of the chain.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

fn device_ended(ended: std::result::Result<Result<()>, tokio::sync::oneshot::error::RecvError>) -> Ended {
    Ended::Device(ended.unwrap_or_else(|_| Err(WorkerError::Device("it panicked".into()))))
}

/// An attachment that stands.
struct Session<'a> {
    config: &'a WorkerConfig,
    outbox: Outbox,
    epochs: Epochs,
    model: ModelFacts<'a>,
    /// The router knows that this worker leaves.
    noticed: bool,
}

impl Session<'_> {
    async fn serve(
        &mut self,
        mut stream: Streaming<wire::ToWorker>,
        listener: &Arc<TcpListener>,
        device: &mut DeviceHandle,
        mut shutdown: Pin<&mut (impl Future<Output = ()> + ?Sized)>,
    ) -> Ended {
        let lost = |reason: String| Ended::Lost {
            was_attached: true,
            reason,
        };
        let mut ticks = interval(PROGRESS_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut told = (0, 0);
        // Armed when notice is given.
        let mut drained = std::pin::pin!(sleep(Duration::ZERO));
        loop {
            let handled = tokio::select! {
                ended = &mut device.ended => return device_ended(ended),
                () = shutdown.as_mut(), if !self.noticed => {
                    self.notice();
                    drained.set(sleep(self.config.drain_timeout));
                    Ok(())
                }
                () = drained.as_mut(), if self.noticed => {
                    tracing::warn!("the drain timeout has ended and the router still counted on this worker");
                    return Ended::Finished;
                }
                message = stream.message() => match message {
                    Ok(Some(message)) => match self.handle(message, listener, device) {
                        Ok(true) => Ok(()),
                        Ok(false) => return Ended::Finished,
                        Err(full) => Err(full),
                    },
                    Ok(None) if self.noticed => return Ended::Finished,
                    Err(_) if self.noticed => return Ended::Finished,
                    Ok(None) => return lost("it closed the stream".into()),
                    Err(status) => return lost(status.message().to_owned()),
                },
                connected = self.epochs.connecting() => self.epochs.connected(connected, device, &self.outbox),
                _ = ticks.tick() => {
                    self.tell_progress(&mut told);
                    Ok(())
                }
            };
            if let Err(full) = handled {
                return lost(full.to_string());
            }
        }
    }

    /// False: the router has ended this worker.
    fn handle(
        &mut self,
        message: wire::ToWorker,
        listener: &Arc<TcpListener>,
        device: &DeviceHandle,
    ) -> std::result::Result<bool, QueueFull> {
        match message.message {
            Some(to_worker::Message::Step(step)) => device.send(Command::Step(Box::new(step)))?,
            Some(to_worker::Message::EpochStart(start)) => {
                self.epochs
                    .start(start, self.model, listener, device, &self.outbox)?;
            }
            Some(to_worker::Message::CommunicatorId(id)) => self.epochs.communicator_id(&id),
            Some(to_worker::Message::EpochAbort(abort)) => self.epochs.abort(&abort, device)?,
            Some(to_worker::Message::Shutdown(shutdown)) => {
                tracing::info!(reason = shutdown.reason, "the router ends this worker");
                return Ok(false);
            }
            // A second Welcome, or a message of a later version: nothing follows from it.
            Some(to_worker::Message::Welcome(_)) | None => {}
        }
        Ok(true)
    }

    fn notice(&mut self) {
        self.noticed = true;
        let deadline_ms = self
            .config
            .drain_timeout
            .as_millis()
            .try_into()
            .unwrap_or(u64::MAX);
        tracing::info!(deadline_ms, "asked to end: giving notice");
        self.outbox.send(Message::Notice(wire::Notice {
            deadline_ms,
            reason: "the process was asked to end".into(),
        }));
    }

    fn tell_progress(&self, told: &mut (u64, u64)) {
        let progress = self.config.progress.get();
        if progress != *told {
            *told = progress;
            let (bytes_done, bytes_total) = progress;
            self.outbox.send(Message::LoadProgress(wire::LoadProgress {
                bytes_done,
                bytes_total,
            }));
        }
    }
}

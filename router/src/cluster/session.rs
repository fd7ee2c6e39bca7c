//! One worker's session: Hello, then everything it says until it falls silent, leaves, or breaks a rule.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use conclave_proto::cluster::v1 as pb;
use conclave_proto::cluster::v1::from_worker::Message;
use conclave_proto::cluster::v1::to_worker;
use conclave_router_core::api::{Epoch, Event, Rank, Slot, StepId, WorkerId};
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::{Instant, timeout};
use tonic::{Status, Streaming};

use super::translate::{self, Bounds};
use super::{MAX_SESSIONS, Shared, registry::Membership};
use crate::net::Caller;
use crate::sequencer::{Input, Outbox};

/// A stream that has not said Hello by then is closed.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Messages of one worker in one second: a hundred steps with heartbeats are far below.
pub const MAX_MESSAGES_PER_SECOND: u32 = 20_000;
/// Silence is counted in parts, and a part counts once, however late this process finds it over: after a pause of the
/// router, or of the whole machine, a worker is not to blame for what it could not send.
const SILENCE_PARTS: u32 = 10;
/// A notice further ahead than this is as good as none.
const MAX_NOTICE_MS: u64 = 24 * 60 * 60 * 1000;

/// What sessions must keep to.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub heartbeat_timeout: Duration,
    pub vocab: u32,
    pub max_model_len: u32,
}

/// Serves one worker. Returns when it is gone, and the sequencer knows.
pub(super) async fn run(
    shared: &Shared,
    mut inbound: Streaming<pb::FromWorker>,
    outbox: Outbox,
    caller: Caller,
) {
    let remote = caller.address;
    // Only a worker takes a place: who says nothing, or the wrong thing, keeps none from another.
    let (membership, _place) = match hello(shared, &mut inbound)
        .await
        .and_then(|worker| seat(shared, worker))
    {
        Ok(seated) => seated,
        Err(status) => {
            tracing::warn!(?remote, reason = status.message(), "worker refused");
            // It may have hung up already.
            let _ = outbox.send(Err(status)).await;
            return;
        }
    };
    if let Some(badge) = &caller.badge {
        badge.is_known();
    }
    let welcome = pb::ToWorker {
        message: Some(to_worker::Message::Welcome(pb::Welcome {
            heartbeat_interval_ms: millis(shared.heartbeat_interval),
            expected_workers: shared.expected_workers,
        })),
    };
    if outbox.send(Ok(welcome)).await.is_err() {
        return;
    }
    tracing::info!(worker = %membership.identity.worker_id, ?remote, number = membership.worker.0, "worker attached");
    let (open, mut given_up) = oneshot::channel();
    let attached = Input::Attached {
        worker: membership.worker,
        info: membership.info.clone(),
        identity: membership.identity.clone(),
        outbox,
        open,
    };
    if shared.inputs.send(attached).await.is_err() {
        return; // the router is shutting down
    }
    let status = tokio::select! {
        _ = &mut given_up => None,
        status = listen(shared, &membership, &mut inbound) => status,
    };
    let worker = membership.worker;
    // Told why it was lost, it may come back at once: its id must be free by then. The sequencer still hears of the
    // loss first.
    drop(membership);
    let lost = Input::Lost { worker, status };
    if shared.inputs.send(lost).await.is_err() {
        tracing::debug!("a worker left after the sequencer had ended");
    }
}

async fn hello(shared: &Shared, inbound: &mut Streaming<pb::FromWorker>) -> Result<Membership, Status> {
    let first = timeout(HELLO_TIMEOUT, inbound.message())
        .await
        .map_err(|_| Status::deadline_exceeded(format!("no Hello within {HELLO_TIMEOUT:?}")))??;
    match first.and_then(|first| first.message) {
        Some(Message::Hello(hello)) => shared.registry.admit(hello),
        _ => Err(Status::invalid_argument("the first message must be Hello")),
    }
}

fn seat(shared: &Shared, worker: Membership) -> Result<(Membership, OwnedSemaphorePermit), Status> {
    match Arc::clone(&shared.sessions).try_acquire_owned() {
        Ok(place) => Ok((worker, place)),
        Err(_) => Err(Status::resource_exhausted(format!(
            "{MAX_SESSIONS} workers are connected: no more are let in"
        ))),
    }
}

/// Listens until the worker is lost; says why if it should be told.
async fn listen(
    shared: &Shared,
    membership: &Membership,
    inbound: &mut Streaming<pb::FromWorker>,
) -> Option<Status> {
    let bounds = Bounds {
        vocab: shared.limits.vocab,
        max_slots: membership.info.max_slots,
        max_batched_tokens: membership.info.max_batched_tokens,
        max_model_len: shared.limits.max_model_len,
    };
    let mut second = Instant::now();
    let mut messages = 0;
    loop {
        let message = match next(inbound, shared.limits.heartbeat_timeout).await {
            Ok(Some(message)) => message,
            Ok(None) => return None,
            Err(status) => return Some(status),
        };
        if second.elapsed() >= Duration::from_secs(1) {
            second = Instant::now();
            messages = 0;
        }
        messages += 1;
        if messages > MAX_MESSAGES_PER_SECOND {
            return Some(Status::resource_exhausted(format!(
                "more than {MAX_MESSAGES_PER_SECOND} messages in a second"
            )));
        }
        let input = match input(shared, membership.worker, message, &bounds) {
            Ok(Some(input)) => input,
            Ok(None) => continue,
            Err(violation) => return Some(Status::invalid_argument(violation)),
        };
        if shared.inputs.send(input).await.is_err() {
            return None;
        }
    }
}

/// The next message; silence is an error.
async fn next(
    inbound: &mut Streaming<pb::FromWorker>,
    silence: Duration,
) -> Result<Option<pb::FromWorker>, Status> {
    let mut message = pin!(inbound.message());
    for _ in 0..SILENCE_PARTS {
        match timeout(silence / SILENCE_PARTS, &mut message).await {
            Ok(Ok(message)) => return Ok(message),
            // A broken connection: there is nobody to tell.
            Ok(Err(status)) => {
                tracing::debug!(reason = status.message(), "a worker's stream broke");
                return Ok(None);
            }
            Err(_) => {}
        }
    }
    Err(Status::deadline_exceeded(format!(
        "no heartbeat within {silence:?}; the worker is taken to be lost"
    )))
}

fn input(
    shared: &Shared,
    worker: WorkerId,
    message: pb::FromWorker,
    bounds: &Bounds,
) -> Result<Option<Input>, translate::Violation> {
    let Some(message) = message.message else {
        return Err("a message without content".into());
    };
    Ok(Some(Input::Event(match message {
        Message::Hello(_) => return Err("a second Hello on one stream".into()),
        Message::CommunicatorId(message) => {
            return Ok(Some(Input::CommunicatorId {
                worker,
                epoch: Epoch(message.epoch),
                id: translate::communicator_id(message.id)?,
            }));
        }
        Message::Heartbeat(_) => return Ok(None),
        Message::LoadProgress(progress) => {
            shared
                .registry
                .progress(worker, progress.bytes_done, progress.bytes_total);
            return Ok(None);
        }
        Message::EpochReady(ready) => {
            shared.registry.pin_checkpoint();
            tracing::info!(
                worker = worker.0,
                epoch = ready.epoch,
                weight_bytes = ready.weight_bytes,
                seconds = ready.load_seconds,
                "worker ready"
            );
            Event::WorkerReady {
                worker,
                epoch: Epoch(ready.epoch),
            }
        }
        Message::StepResult(result) => Event::StepDone {
            worker,
            epoch: Epoch(result.epoch),
            step: StepId(result.step),
            result: translate::step_result(result, bounds)?,
        },
        Message::StepFailed(failed) => {
            let reason = translate::clipped(&failed.reason);
            tracing::warn!(worker = worker.0, step = failed.step, reason, "step failed");
            Event::StepFailed {
                worker,
                epoch: Epoch(failed.epoch),
                step: StepId(failed.step),
                suspect: failed.suspect_rank.map(Rank),
                slot: failed.slot.map(Slot),
            }
        }
        Message::Notice(notice) => {
            let reason = translate::clipped(&notice.reason);
            tracing::info!(
                worker = worker.0,
                deadline_ms = notice.deadline_ms,
                reason,
                "worker will leave"
            );
            let after = Duration::from_millis(notice.deadline_ms.min(MAX_NOTICE_MS));
            Event::Notice {
                worker,
                deadline: shared.clock.deadline(after),
            }
        }
    })))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

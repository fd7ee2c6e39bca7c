//! The stream a client reads. Dropping it is how a client that went away is noticed.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use conclave_proto::v1::generate_response::Event;
use conclave_proto::v1::{GenerateResponse, KeepAlive};
use conclave_router_core::api::ClusterState;
use tokio::sync::watch;
use tokio::time::{Instant, Sleep, sleep};
use tokio_stream::Stream;
use tonic::Status;

use super::Request;
use crate::sequencer::View;

/// Ends the request's sequences when dropped, however that comes about.
pub struct CancelOnDrop(Arc<Request>);

impl CancelOnDrop {
    pub fn new(request: Arc<Request>) -> CancelOnDrop {
        CancelOnDrop(request)
    }

    /// The sequences were never admitted: there is nothing to end.
    pub fn withdraw(&self) {
        self.0.withdraw();
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.queue.close();
        self.0.cancel();
    }
}

/// Responses of one request, with keep-alives while nothing happens.
pub struct ResponseStream {
    request: CancelOnDrop,
    view: watch::Receiver<View>,
    interval: Duration,
    silence: Pin<Box<Sleep>>,
}

impl ResponseStream {
    pub fn new(request: CancelOnDrop, view: watch::Receiver<View>, interval: Duration) -> ResponseStream {
        ResponseStream {
            request,
            view,
            interval,
            silence: Box::pin(sleep(interval)),
        }
    }

    fn keep_alive(&self) -> GenerateResponse {
        let reason = match self.view.borrow().state {
            ClusterState::Starting => "the cluster is starting",
            ClusterState::Forming { .. } => "the cluster is changing",
            ClusterState::Parked => "too few workers to hold the model; the request waits",
            ClusterState::Serving { .. } => "waiting for the next token",
        };
        GenerateResponse {
            event: Some(Event::KeepAlive(KeepAlive {
                reason: reason.into(),
            })),
        }
    }
}

impl Stream for ResponseStream {
    type Item = Result<GenerateResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let item = match this.request.0.queue.poll_next(cx) {
            Poll::Ready(item) => item,
            Poll::Pending => {
                std::task::ready!(this.silence.as_mut().poll(cx));
                Some(Ok(this.keep_alive()))
            }
        };
        if let Some(Ok(GenerateResponse {
            event: Some(Event::Delta(delta)),
        })) = &item
        {
            this.request.0.read(delta.token_ids.len());
        }
        this.silence.as_mut().reset(Instant::now() + this.interval);
        Poll::Ready(item)
    }
}

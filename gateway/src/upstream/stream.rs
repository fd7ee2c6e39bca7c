//! One Generate call's events, with the ends that a call may have.

use std::pin::Pin;
use std::sync::Arc;

use conclave_proto::v1;
use http::StatusCode;
use tokio::sync::watch;
use tokio::time::{Instant, Sleep};

pub(crate) use v1::generate_response::Event;

use super::{status, timed_out};
use crate::http::error::{ApiError, ApiResult};
use crate::metrics::Metrics;

/// Dropping it cancels the call.
pub(crate) struct GenerateStream {
    inner: tonic::Streaming<v1::GenerateResponse>,
    deadline: Option<Pin<Box<Sleep>>>,
    cut: watch::Receiver<bool>,
    /// The router's last word came.
    is_whole: bool,
    metrics: Arc<Metrics>,
}

impl GenerateStream {
    pub(super) fn new(
        inner: tonic::Streaming<v1::GenerateResponse>,
        deadline: Option<Instant>,
        cut: watch::Receiver<bool>,
        metrics: Arc<Metrics>,
    ) -> Self {
        metrics.calls.inc();
        let deadline = deadline.map(|deadline| Box::pin(tokio::time::sleep_until(deadline)));
        Self {
            inner,
            deadline,
            cut,
            is_whole: false,
            metrics,
        }
    }

    /// The next event; `None` once the router has said all.
    ///
    /// # Errors
    /// The router's error, a broken connection, an end without Usage, the request's deadline, shutdown.
    pub(crate) async fn next(&mut self) -> Option<ApiResult<Event>> {
        loop {
            let message = tokio::select! {
                biased;
                message = self.inner.message() => message,
                () = expired(&mut self.deadline) => return Some(Err(timed_out())),
                _ = self.cut.wait_for(|cut| *cut) => return Some(Err(shutting_down())),
            };
            return match message {
                Ok(Some(v1::GenerateResponse { event: Some(event) })) => {
                    self.metrics.events.inc();
                    self.is_whole |= matches!(event, Event::Usage(_));
                    Some(Ok(event))
                }
                // A kind of event that this gateway does not know yet.
                Ok(Some(_)) => continue,
                Ok(None) if self.is_whole => None,
                Ok(None) => Some(Err(ApiError::new(
                    StatusCode::BAD_GATEWAY,
                    "the router ended the answer before it was whole",
                )
                .code("incomplete_answer"))),
                Err(error) => Some(Err(status::to_api(&error))),
            };
        }
    }
}

impl Drop for GenerateStream {
    fn drop(&mut self) {
        self.metrics.calls.dec();
    }
}

async fn expired(deadline: &mut Option<Pin<Box<Sleep>>>) {
    match deadline {
        Some(deadline) => deadline.await,
        None => std::future::pending().await,
    }
}

fn shutting_down() -> ApiError {
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the server is shutting down")
        .code("shutting_down")
        .retry_after(std::time::Duration::from_secs(1))
}

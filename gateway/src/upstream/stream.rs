//! One Generate call's events, with the ends that a call may have.

use std::pin::Pin;
use std::sync::Arc;

use conclave_proto::v1;
use http::StatusCode;
use tokio::sync::watch;
use tokio::time::Sleep;
use tonic::Code;

pub(crate) use v1::generate_response::Event;

use super::link::InFlight;
use super::{TRIES_MAX, Upstream, prepare, status, timed_out};
use crate::http::context::RequestContext;
use crate::http::error::{ApiError, ApiResult};

/// Dropping it cancels the call.
pub(crate) struct GenerateStream {
    upstream: Arc<Upstream>,
    context: RequestContext,
    /// Kept while the call may be made again at another router.
    request: Option<v1::GenerateRequest>,
    inner: Option<tonic::Streaming<v1::GenerateResponse>>,
    in_flight: Option<InFlight>,
    /// Routers that were asked.
    asked: Vec<String>,
    deadline: Option<Pin<Box<Sleep>>>,
    cut: watch::Receiver<bool>,
    has_started: bool,
    /// Tokens that the call used so far.
    spent: u64,
    /// The router's last word came.
    is_whole: bool,
}

impl GenerateStream {
    pub(super) fn new(
        upstream: Arc<Upstream>,
        request: v1::GenerateRequest,
        context: RequestContext,
    ) -> Self {
        upstream.metrics.calls.inc();
        let deadline = context
            .deadline
            .map(|deadline| Box::pin(tokio::time::sleep_until(deadline)));
        let cut = upstream.cut.clone();
        Self {
            upstream,
            context,
            request: Some(request),
            inner: None,
            in_flight: None,
            asked: Vec::new(),
            deadline,
            cut,
            has_started: false,
            spent: 0,
            is_whole: false,
        }
    }

    /// Finds a router that takes the request.
    ///
    /// # Errors
    /// What the last router said, once all that may be asked were asked.
    pub(super) async fn connect(&mut self) -> ApiResult<()> {
        let mut refused = None;
        while let Some(request) = self.request.take() {
            let plan = self.upstream.pool.plan(&request);
            let is_last = plan.choices.len() <= self.asked.len() + 1 || self.asked.len() + 1 >= TRIES_MAX;
            let next = plan
                .choices
                .iter()
                .find(|choice| !self.asked.contains(&choice.link.address));
            let Some(next) = next.filter(|_| self.asked.len() < TRIES_MAX) else {
                break;
            };
            let link = next.link.clone();
            let new_bytes = next.new_bytes;
            self.asked.push(link.address.clone());
            let message = if is_last {
                request
            } else {
                self.request = Some(request.clone());
                request
            };
            self.upstream.pool.sent(&plan, &link);
            self.in_flight = Some(link.begin(new_bytes));
            let call = prepare(message, &self.context, None);
            let mut client = link.client();
            let answer = tokio::select! {
                answer = client.generate(call) => answer,
                () = expired(&mut self.deadline) => return Err(timed_out()),
                _ = self.cut.wait_for(|cut| *cut) => return Err(shutting_down()),
            };
            match answer {
                Ok(response) => {
                    self.upstream.count(&link, "taken");
                    self.inner = Some(response.into_inner());
                    return Ok(());
                }
                Err(error) => {
                    self.upstream.count(&link, "refused");
                    if error.code() == Code::Unavailable {
                        link.set_away();
                    }
                    let is_elsewhere_better = may_move(&error);
                    refused = Some(status::to_api(&error));
                    if !is_elsewhere_better {
                        break;
                    }
                }
            }
        }
        self.in_flight = None;
        Err(refused.unwrap_or_else(|| {
            let message = "no router takes requests now: try again";
            ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message).code("service_unavailable")
        }))
    }

    /// The next event; `None` once the router has said all.
    ///
    /// # Errors
    /// The router's error, a broken connection, an end without Usage, the request's deadline, shutdown.
    pub(crate) async fn next(&mut self) -> Option<ApiResult<Event>> {
        loop {
            let inner = self.inner.as_mut()?;
            let message = tokio::select! {
                biased;
                message = inner.message() => message,
                () = expired(&mut self.deadline) => return Some(Err(timed_out())),
                _ = self.cut.wait_for(|cut| *cut) => return Some(Err(shutting_down())),
            };
            match message {
                Ok(Some(v1::GenerateResponse { event: Some(event) })) => {
                    if let Some(event) = self.take(event) {
                        return Some(Ok(event));
                    }
                }
                // A kind of event that this gateway does not know yet.
                Ok(Some(_)) => {}
                Ok(None) if self.is_whole => return None,
                Ok(None) => {
                    let message = "the router ended the answer before it was whole";
                    return Some(Err(
                        ApiError::new(StatusCode::BAD_GATEWAY, message).code("incomplete_answer")
                    ));
                }
                Err(error) => {
                    // Nothing was given out yet: another router may begin anew.
                    if !may_move(&error) || self.request.is_none() || self.connect().await.is_err() {
                        return Some(Err(status::to_api(&error)));
                    }
                }
            }
        }
    }

    /// Notes what an event means for the call; `None` for one that the caller has already.
    fn take(&mut self, event: Event) -> Option<Event> {
        self.upstream.metrics.events.inc();
        match &event {
            Event::Started(_) if std::mem::replace(&mut self.has_started, true) => return None,
            Event::Started(started) => self.spent += started.prompt_token_ids.len() as u64,
            Event::Delta(delta) => {
                self.request = None;
                self.spent += delta.token_ids.len() as u64;
            }
            Event::Finished(_) => self.request = None,
            Event::Usage(usage) => {
                self.is_whole = true;
                self.spent = u64::from(usage.prompt_tokens) + u64::from(usage.completion_tokens);
            }
            Event::KeepAlive(_) => {}
        }
        Some(event)
    }
}

impl Drop for GenerateStream {
    fn drop(&mut self) {
        self.upstream.metrics.calls.dec();
        if let Some(admission) = &self.context.admission {
            admission.charge(self.spent);
        }
    }
}

/// Whether another router may do better: this one is away, leaving or full.
fn may_move(status: &tonic::Status) -> bool {
    let is_broken = std::error::Error::source(status).is_some();
    matches!(status.code(), Code::Unavailable | Code::ResourceExhausted)
        || (is_broken && matches!(status.code(), Code::Unknown | Code::Internal | Code::Cancelled))
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

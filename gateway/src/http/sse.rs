//! Server-sent events to one client, as OpenAI and Anthropic send them.
//!
//! A task of its own produces the events and a bounded channel carries them to the connection, so that the
//! same limits hold for HTTP/1 and HTTP/2: a reader that takes nothing for `write_timeout` loses its stream, and
//! a reader that leaves ends the task, which drops the call to the router.

use std::future::Future;
use std::time::Duration;

use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, header};
use serde::Serialize;
use tokio::sync::mpsc;

use super::pieces;
use crate::config::Limits;

const DONE: &[u8] = b"data: [DONE]\n\n";
const COMMENT: &[u8] = b": keep-alive\n\n";
/// Asks nginx not to hold events back.
const ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// The client is gone or does not read: there is nobody to produce for.
#[derive(Debug)]
pub(crate) struct Gone;

/// The producing end of one event stream.
pub(crate) struct Events {
    sender: mpsc::Sender<Bytes>,
    stall: Duration,
}

impl Events {
    /// One `data:` event with the JSON of `value`.
    pub(crate) async fn data<T: Serialize>(&self, value: &T) -> Result<(), Gone> {
        self.event(None, value).await
    }

    /// One event, with a name where the API uses names.
    pub(crate) async fn event<T: Serialize>(&self, name: Option<&str>, value: &T) -> Result<(), Gone> {
        let mut text = Vec::with_capacity(256);
        if let Some(name) = name {
            text.extend_from_slice(b"event: ");
            text.extend_from_slice(name.as_bytes());
            text.push(b'\n');
        }
        text.extend_from_slice(b"data: ");
        if let Err(error) = serde_json::to_writer(&mut text, value) {
            tracing::error!(%error, "an event could not be written");
            return Err(Gone);
        }
        text.extend_from_slice(b"\n\n");
        self.send(text.into()).await
    }

    /// JSON text that is already written; it holds no line break.
    pub(crate) async fn raw(&self, json: &str) -> Result<(), Gone> {
        self.send(format!("data: {json}\n\n").into()).await
    }

    pub(crate) async fn done(&self) -> Result<(), Gone> {
        self.send(Bytes::from_static(DONE)).await
    }

    /// A comment: clients ignore it, proxies see traffic.
    pub(crate) async fn comment(&self) -> Result<(), Gone> {
        self.send(Bytes::from_static(COMMENT)).await
    }

    async fn send(&self, bytes: Bytes) -> Result<(), Gone> {
        match self.sender.send_timeout(bytes, self.stall).await {
            Ok(()) => Ok(()),
            Err(error) => {
                tracing::debug!(%error, "the stream's reader is gone or stalled");
                Err(Gone)
            }
        }
    }
}

/// Answers with the events that `produce` sends. It is dropped, wherever it waits, when the client leaves.
pub(crate) fn respond<F, P>(limits: &Limits, produce: P) -> Response
where
    P: FnOnce(Events) -> F,
    F: Future<Output = Result<(), Gone>> + Send + 'static,
{
    let (sender, whole, body) = pieces::channel(limits.events_buffered);
    let watched = sender.clone();
    let work = produce(Events {
        sender,
        stall: limits.write_timeout,
    });
    let span = tracing::Span::current();
    tokio::spawn(tracing::Instrument::instrument(
        async move {
            tokio::select! {
                () = watched.closed() => tracing::debug!("the client left its stream"),
                // A stalled stream leaves the flag unset, and its body ends with an error.
                done = work => if done.is_ok() { whole.set() },
            }
        },
        span,
    ));
    let headers = [
        (
            header::CONTENT_TYPE,
            HeaderValue::from_static("text/event-stream; charset=utf-8"),
        ),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (ACCEL_BUFFERING, HeaderValue::from_static("no")),
    ];
    (headers, body).into_response()
}

//! The loop of every streamed answer: events of the router in, events of an API out, and one last word.

use std::future::Future;
use std::time::Duration;

use axum::response::Response;
use futures::StreamExt as _;

use super::calls::CallEvents;
use crate::config::Limits;
use crate::http::error::{ApiError, ApiResult};
use crate::http::sse::{self, Events, Gone};
use crate::upstream::Event;

/// An answer in one API's words. [`Gone`] ends it without a word: nobody listens.
pub(crate) trait Writer: Send {
    /// Writes what an event about one of the request's prompts comes to. The inner error fails the answer.
    fn take(
        &mut self,
        prompt: usize,
        event: Event,
    ) -> impl Future<Output = Result<ApiResult<()>, Gone>> + Send;

    /// Nothing came for a while: shows proxies and clients that the connection lives.
    fn idle(&mut self) -> impl Future<Output = Result<(), Gone>> + Send;

    /// The last word of an answer that failed.
    fn fail(self, error: &ApiError) -> impl Future<Output = Result<(), Gone>> + Send;

    /// The last word of a whole answer.
    fn end(self) -> impl Future<Output = Result<(), Gone>> + Send;
}

/// Answers with what `writer` makes of the events.
pub(crate) fn respond<W: Writer + 'static>(
    limits: &Limits,
    events: CallEvents,
    writer: impl FnOnce(Events) -> W,
) -> Response {
    let silence = limits.keep_alive_interval;
    sse::respond(limits, |out| write(events, silence, writer(out)))
}

async fn write(mut events: CallEvents, silence: Duration, mut writer: impl Writer) -> Result<(), Gone> {
    loop {
        let step = match tokio::time::timeout(silence, events.next()).await {
            Err(_) => writer.idle().await.map(Ok)?,
            Ok(None) => return writer.end().await,
            Ok(Some(Ok((prompt, event)))) => writer.take(prompt, event).await?,
            Ok(Some(Err(error))) => Err(error),
        };
        if let Err(error) = step {
            return writer.fail(&error).await;
        }
    }
}

//! The events of all calls that one HTTP request makes, as one stream.

use std::sync::Arc;
use std::time::Duration;

use conclave_proto::v1;
use futures::stream::{self, BoxStream, StreamExt};

use crate::app::App;
use crate::http::context::RequestContext;
use crate::http::error::ApiResult;
use crate::upstream::{Event, GenerateStream};

/// Calls of one request that run at the same time; the others wait here, not in the router's queue.
const CONCURRENT_CALLS: usize = 64;

/// An event and the prompt it belongs to.
pub(crate) type CallEvent = (usize, Event);
pub(crate) type CallEvents = BoxStream<'static, ApiResult<CallEvent>>;

enum Call {
    Waiting(Box<v1::GenerateRequest>),
    Running(Box<GenerateStream>),
    Over,
}

/// Makes the calls as the stream is read. Dropping it cancels them.
pub(crate) fn events(app: Arc<App>, context: RequestContext, calls: Vec<v1::GenerateRequest>) -> CallEvents {
    let mut streams = calls
        .into_iter()
        .enumerate()
        .map(move |(at, request)| one(app.clone(), context.clone(), at, request))
        .collect::<Vec<_>>();
    match streams.len() {
        1 => streams.remove(0),
        _ => stream::iter(streams).flatten_unordered(CONCURRENT_CALLS).boxed(),
    }
}

fn one(app: Arc<App>, context: RequestContext, at: usize, request: v1::GenerateRequest) -> CallEvents {
    let start = Call::Waiting(Box::new(request));
    stream::unfold(
        (start, app, context),
        move |(mut call, app, context)| async move {
            loop {
                match call {
                    Call::Waiting(request) => match app.upstream.generate(*request, &context).await {
                        Ok(stream) => call = Call::Running(Box::new(stream)),
                        Err(error) => return Some((Err(error), (Call::Over, app, context))),
                    },
                    Call::Running(mut stream) => {
                        return match stream.next().await? {
                            Ok(event) => Some((Ok((at, event)), (Call::Running(stream), app, context))),
                            Err(error) => Some((Err(error), (Call::Over, app, context))),
                        };
                    }
                    Call::Over => return None,
                }
            }
        },
    )
    .boxed()
}

/// Waits for the first event, so that a refusal becomes an HTTP status and not an event. A router that says
/// nothing for `patience` gets the benefit of the doubt.
pub(crate) async fn opened(mut events: CallEvents, patience: Duration) -> ApiResult<CallEvents> {
    match tokio::time::timeout(patience, events.next()).await {
        Ok(Some(first)) => {
            let first = first?;
            Ok(stream::once(std::future::ready(Ok(first))).chain(events).boxed())
        }
        Ok(None) | Err(_) => Ok(events),
    }
}

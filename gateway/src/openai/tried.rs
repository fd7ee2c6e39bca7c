//! For fuzzing: everything between a body and the router, and streams of given events.

use super::request::Request;
use super::sampling::Endpoint;
use super::translate::{Show, translate};
use super::{chat_stream, completions_stream};
use crate::config::Limits;
use crate::generate::CallEvents;
use crate::http::context::RequestContext;
use crate::http::error::ApiResult;
use crate::http::json;

fn try_body(bytes: &[u8], endpoint: Endpoint) -> ApiResult<()> {
    let request: Request = json::decode(bytes)?;
    let context = RequestContext::new(&http::HeaderMap::new(), None);
    translate(request, endpoint, &context, &Limits::default()).map(drop)
}

pub(crate) fn try_chat(bytes: &[u8]) -> ApiResult<()> {
    try_body(bytes, Endpoint::Chat)
}

pub(crate) fn try_completion(bytes: &[u8]) -> ApiResult<()> {
    try_body(bytes, Endpoint::Completions)
}

pub(crate) fn chat_events(events: CallEvents) -> axum::response::Response {
    let (options, show) = (Default::default(), Show::default());
    chat_stream::respond(&Limits::default(), events, String::from("x"), options, show, 1)
}

pub(crate) fn completion_events(events: CallEvents) -> axum::response::Response {
    let (options, show) = (Default::default(), Show::default());
    let shape = completions_stream::Shape {
        prompts: 1,
        choices: 1,
        options,
        show,
    };
    completions_stream::respond(&Limits::default(), events, String::from("x"), shape)
}

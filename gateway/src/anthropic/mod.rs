//! Anthropic's Messages API: `/v1/messages` (whole and streamed) and `/v1/messages/count_tokens`.
//!
//! A conversation of content blocks becomes the messages of a chat ([`conversation`]); the answer's deltas become
//! content blocks again ([`answer`], [`stream`]). Reasoning travels as thinking blocks.

mod answer;
mod content;
mod conversation;
mod errors;
mod messages;
mod request;
mod stream;

pub(crate) use self::errors::{is_anthropic_path, respond as respond_error};
pub(crate) use self::messages::{count_tokens, messages};

/// For fuzzing: everything between a body and the router.
#[cfg(test)]
pub(crate) fn try_body(bytes: &[u8]) -> crate::http::error::ApiResult<()> {
    let mut request: request::Request = crate::http::json::decode(bytes)?;
    let context = crate::http::context::RequestContext::new(&http::HeaderMap::new(), None);
    messages::translate(&mut request, &context).map(drop)
}

/// For fuzzing: a stream of these events.
#[cfg(test)]
pub(crate) fn events(events: crate::generate::CallEvents) -> axum::response::Response {
    let job = answer::Job {
        id: String::from("x"),
        request_id: String::from("x"),
        stop_sequences: Vec::new(),
        hides_thinking: false,
    };
    stream::respond(&crate::config::Limits::default(), events, job)
}

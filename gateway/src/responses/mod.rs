//! OpenAI's Responses API: `/v1/responses`, whole and streamed, with function and custom tools, reasoning
//! items and `previous_response_id`.
//!
//! Items become the messages of a chat ([`conversation`]), the answer's blocks become items again ([`items`]).
//! Earlier responses are kept in a bounded store ([`store`]), the only state of a gateway: it is a convenience of
//! one process, and a client that sends its items itself needs none of it.

mod conversation;
mod create;
mod custom_input;
mod echo;
mod input;
mod items;
mod keep;
mod object;
mod references;
mod request;
mod store;
mod stored;
mod stream;
mod tools;

pub(crate) use self::create::create;
pub(crate) use self::store::Store;
pub(crate) use self::stored::{delete, retrieve};

/// For fuzzing: everything between a body and the router.
#[cfg(test)]
pub(crate) fn try_body(bytes: &[u8]) -> crate::http::error::ApiResult<()> {
    let mut request: request::Request = crate::http::json::decode(bytes)?;
    let context = crate::http::context::RequestContext::new(&http::HeaderMap::new(), None);
    create::prepare(&mut request, &context, None).map(drop)
}

/// For fuzzing: a stream of these events.
#[cfg(test)]
pub(crate) fn events(events: crate::generate::CallEvents) -> axum::response::Response {
    let request: request::Request = serde_json::from_str("{}").unwrap();
    let frame = object::Frame {
        id: String::from("resp_x"),
        bare_id: String::from("x"),
        created_at: 0,
        echo: echo::Echo::of(request),
        seals: true,
        offered: tools::Offered::default(),
    };
    stream::respond(
        &crate::config::Limits::default(),
        events,
        frame,
        keep::Keep::nothing(),
    )
}

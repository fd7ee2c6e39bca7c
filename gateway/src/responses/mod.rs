//! OpenAI's Responses API: `/v1/responses`, whole and streamed, with function tools, reasoning items and
//! `previous_response_id`.
//!
//! Items become the messages of a chat ([`conversation`]), the answer's blocks become items again ([`items`]).
//! Earlier responses are kept in a bounded store ([`store`]), the only state of a gateway: it is a convenience of
//! one process, and a client that sends its items itself needs none of it.

mod conversation;
mod create;
mod echo;
mod input;
mod items;
mod object;
mod request;
mod store;
mod stored;
mod stream;

pub(crate) use self::create::create;
pub(crate) use self::store::Store;
pub(crate) use self::stored::{delete, retrieve};

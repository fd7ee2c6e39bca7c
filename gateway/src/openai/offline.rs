//! A chat request's body without a server: what `conclave render` and `conclave parse` read is what is served.

use conclave_proto::v1;

use super::conversation::{self, Conversation};
use super::request::Request;
use crate::http::json;

/// The conversation and tools of a `/v1/chat/completions` body; the error names the field.
pub fn chat_of_request(body: &[u8]) -> Result<v1::Chat, String> {
    let read = json::decode::<Request>(body)
        .and_then(|mut request| conversation::chat(Conversation::of(&mut request)));
    read.map_err(|error| error.message)
}

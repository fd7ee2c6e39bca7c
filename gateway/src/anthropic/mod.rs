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

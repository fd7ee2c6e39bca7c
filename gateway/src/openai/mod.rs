//! OpenAI's API as OpenAI and vLLM serve it: chat completions, completions, models, tokenize, detokenize.
//!
//! A request becomes one `v1::GenerateRequest` per prompt ([`translate`]); the calls' events are either collected
//! or written out as they come.

mod answer;
mod chat;
mod chat_stream;
mod completions;
mod completions_stream;
mod content;
mod conversation;
mod logprobs;
mod message;
mod models;
mod offline;
mod prompt;
mod request;
mod sampling;
mod structured;
mod tokenize;
mod tools;
mod translate;
#[cfg(test)]
mod tried;
mod unserved;
mod words;

pub(crate) use self::chat::chat;
pub(crate) use self::completions::completions;
pub(crate) use self::models::{model, models};
pub use self::offline::chat_of_request;
pub(crate) use self::tokenize::{detokenize, tokenize};
#[cfg(test)]
pub(crate) use self::tried::{chat_events, completion_events, try_chat, try_completion};

//! The parts of an answer, and a whole one.

use conclave_proto::v1;
use serde::Serialize;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use crate::generate::{Block, Kind, Tokens};

/// What the answer needs to know of the request.
pub(super) struct Job {
    /// The answer's id.
    pub(super) id: String,
    pub(super) request_id: String,
    pub(super) stop_sequences: Vec<String>,
    /// The client said that it wants no thinking blocks.
    pub(super) hides_thinking: bool,
}

#[derive(Serialize)]
pub(super) struct Message<'a> {
    pub(super) id: &'a str,
    #[serde(rename = "type")]
    pub(super) kind: &'static str,
    pub(super) role: &'static str,
    pub(super) model: &'a str,
    pub(super) content: Vec<BlockOut<'a>>,
    pub(super) stop_reason: Option<&'static str>,
    pub(super) stop_sequence: Option<&'a str>,
    pub(super) usage: Usage,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum BlockOut<'a> {
    Thinking {
        thinking: &'a str,
        signature: String,
    },
    Text {
        text: &'a str,
    },
    ToolUse {
        id: &'a str,
        name: &'a str,
        input: Box<RawValue>,
    },
}

impl<'a> BlockOut<'a> {
    /// A finished block.
    pub(super) fn whole(block: &'a Block) -> Self {
        match &block.kind {
            Kind::Reasoning => Self::Thinking {
                thinking: &block.content,
                signature: signature(&block.content),
            },
            Kind::Text => Self::Text { text: &block.content },
            Kind::Call { id, name } => Self::ToolUse {
                id,
                name,
                input: input(&block.content),
            },
        }
    }

    /// A block at its beginning.
    pub(super) fn empty(block: &'a Block) -> Self {
        match &block.kind {
            Kind::Reasoning => Self::Thinking {
                thinking: "",
                signature: String::new(),
            },
            Kind::Text => Self::Text { text: "" },
            Kind::Call { id, name } => Self::ToolUse {
                id,
                name,
                input: input(""),
            },
        }
    }
}

/// Clients send thinking back with its signature and drop what has none. It is a digest and no secret: whoever
/// may write a conversation may write its thinking.
pub(super) fn signature(thinking: &str) -> String {
    let digest: [u8; 32] = Sha256::digest(thinking.as_bytes()).into();
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A call's arguments as a JSON object. What is none is wrapped as Anthropic's documentation advises clients to.
fn input(arguments: &str) -> Box<RawValue> {
    let text = if arguments.is_empty() { "{}" } else { arguments };
    match RawValue::from_string(text.to_owned()) {
        Ok(raw) if raw.get().starts_with('{') => raw,
        _ => {
            let quoted = serde_json::to_string(arguments).unwrap_or_default();
            RawValue::from_string(format!("{{\"INVALID_JSON\":{quoted}}}")).unwrap_or_default()
        }
    }
}

/// Anthropic counts tokens read from the cache apart from the others of the input.
#[derive(Clone, Copy, Serialize)]
pub(super) struct Usage {
    input_tokens: u64,
    cache_creation_input_tokens: u64,
    cache_read_input_tokens: u64,
    output_tokens: u64,
}

impl Usage {
    pub(super) fn of(tokens: &Tokens) -> Self {
        Self {
            input_tokens: tokens.prompt.saturating_sub(tokens.cached),
            cache_creation_input_tokens: 0,
            cache_read_input_tokens: tokens.cached,
            output_tokens: tokens.completion,
        }
    }
}

/// Why the answer ended, with the stop sequence where it was one of the request's.
pub(super) fn stop<'a>(finished: &'a v1::Finished, sequences: &[String]) -> (&'static str, Option<&'a str>) {
    match finished.reason() {
        v1::FinishReason::Length => ("max_tokens", None),
        v1::FinishReason::ToolCalls => ("tool_use", None),
        _ if sequences.contains(&finished.stop_reason) => ("stop_sequence", Some(&finished.stop_reason)),
        _ => ("end_turn", None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_passed_on_only_as_an_object() {
        for (arguments, expected) in [
            ("", "{}"),
            ("{\"b\": 1.0, \"a\": 2}", "{\"b\": 1.0, \"a\": 2}"),
            ("{\"a\"", "{\"INVALID_JSON\":\"{\\\"a\\\"\"}"),
            ("[1]", "{\"INVALID_JSON\":\"[1]\"}"),
        ] {
            assert_eq!(input(arguments).get(), expected);
        }
    }
}

//! Blocks of an answer as output items, and back into the conversation's past.

use std::borrow::Cow;

use serde::Serialize;

use super::conversation::Turns;
use super::object::Frame;
use super::tools;
use crate::generate::{Block, Kind};

/// Marks reasoning that this server sealed. It is text in base64, and no secret: the field is where clients that
/// keep no reasoning of their own carry it from turn to turn.
const SEAL: &str = "conclave.1.";

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum ItemOut<'a> {
    Reasoning {
        id: String,
        summary: [(); 0],
        content: Vec<Part<'a>>,
        #[serde(skip_serializing_if = "Option::is_none")]
        encrypted_content: Option<String>,
        status: &'static str,
    },
    Message {
        id: String,
        status: &'static str,
        role: &'static str,
        content: Vec<Part<'a>>,
    },
    FunctionCall {
        id: String,
        call_id: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        namespace: Option<&'a str>,
        name: &'a str,
        arguments: &'a str,
        status: &'static str,
    },
    CustomToolCall {
        id: String,
        call_id: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        namespace: Option<&'a str>,
        name: &'a str,
        input: Cow<'a, str>,
        status: &'static str,
    },
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum Part<'a> {
    ReasoningText {
        text: &'a str,
    },
    OutputText {
        text: &'a str,
        annotations: [(); 0],
        logprobs: [(); 0],
    },
}

impl<'a> Part<'a> {
    /// A block's content as a part; calls have none.
    pub(super) fn of(kind: &Kind, text: &'a str) -> Option<Self> {
        match kind {
            Kind::Reasoning => Some(Self::ReasoningText { text }),
            Kind::Text => Some(Self::OutputText {
                text,
                annotations: [],
                logprobs: [],
            }),
            Kind::Call { .. } => None,
        }
    }
}

/// An item's id: stable over the events of a stream.
pub(super) fn id(frame: &Frame, at: usize, kind: &Kind) -> String {
    let prefix = match kind {
        Kind::Reasoning => "rs",
        Kind::Text => "msg",
        Kind::Call { name, .. } if frame.offered.is_custom(name) => "ctc",
        Kind::Call { .. } => "fc",
    };
    format!("{prefix}_{}_{at}", frame.bare_id)
}

/// How much of a block an item shows.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Progress {
    Begun,
    Whole,
    /// The answer ended inside it.
    Cut,
}

pub(super) fn item<'a>(frame: &Frame, at: usize, block: &'a Block, progress: Progress) -> ItemOut<'a> {
    let id = id(frame, at, &block.kind);
    let status = match progress {
        Progress::Begun => "in_progress",
        Progress::Whole => "completed",
        Progress::Cut => "incomplete",
    };
    let shown = if progress == Progress::Begun {
        ""
    } else {
        block.content.as_str()
    };
    let content = || {
        if progress == Progress::Begun {
            Vec::new()
        } else {
            Part::of(&block.kind, shown).into_iter().collect()
        }
    };
    match &block.kind {
        Kind::Reasoning => ItemOut::Reasoning {
            id,
            summary: [],
            content: content(),
            encrypted_content: (frame.seals && progress != Progress::Begun).then(|| seal(shown)),
            status,
        },
        Kind::Text => ItemOut::Message {
            id,
            status,
            role: "assistant",
            content: content(),
        },
        Kind::Call {
            id: call_id,
            name: qualified,
        } => {
            let (namespace, name) = frame.offered.apart(qualified);
            if frame.offered.is_custom(qualified) {
                ItemOut::CustomToolCall {
                    id,
                    call_id,
                    namespace,
                    name,
                    input: tools::as_input(shown),
                    status,
                }
            } else {
                ItemOut::FunctionCall {
                    id,
                    call_id,
                    namespace,
                    name,
                    arguments: shown,
                    status,
                }
            }
        }
    }
}

/// An answer as the messages that the next request begins with.
pub(super) fn messages(blocks: &[Block]) -> Vec<conclave_proto::v1::ChatMessage> {
    let mut turns = Turns::default();
    for block in blocks {
        match &block.kind {
            Kind::Reasoning => turns.reasoning(&block.content),
            Kind::Text => turns.text(&block.content),
            Kind::Call { id, name } => turns.call(conclave_proto::v1::ToolCall {
                id: id.clone(),
                name: name.clone(),
                arguments_json: block.content.clone(),
            }),
        }
    }
    turns.done()
}

fn seal(text: &str) -> String {
    use base64::Engine as _;
    format!("{SEAL}{}", base64::engine::general_purpose::STANDARD.encode(text))
}

/// What [`seal`] sealed; `None` for another server's.
pub(super) fn unseal(sealed: &str) -> Option<String> {
    use base64::Engine as _;
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(sealed.strip_prefix(SEAL)?)
        .ok()?;
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sealed_reasoning_comes_back_and_foreign_seals_do_not() {
        assert_eq!(unseal(&seal("hm… é")).as_deref(), Some("hm… é"));
        for foreign in ["", "gAAAAABo", "conclave.1.!!", "conclave.1./w=="] {
            assert_eq!(unseal(foreign), None, "{foreign}");
        }
    }
}

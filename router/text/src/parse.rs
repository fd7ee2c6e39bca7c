//! Model output to typed pieces: reasoning, content and tool calls, one incremental machine per format.
//!
//! A parser sees tokens one by one, as id and text. Markers that the tokenizer knows as one token (`<think>`) are
//! recognised by id alone, so that the same letters written as ordinary text stay text; markers it does not know,
//! and output that comes without ids, are recognised by text. Either way the pieces do not depend on the cut.
//!
//! `Tagged` drives every format in which calls are blocks within text; a new such format is one file that
//! implements `ToolSyntax`. Formats built otherwise implement `OutputParser` (`harmony`).
//!
//! Keeps invariant T1 of ARCHITECTURE.md.

mod call_object;
mod calls;
mod deepseek_v31;
mod format;
mod harmony;
mod hermes;
mod json_stream;
mod minimax_m2;
mod plain_json;
mod qwen3_coder;
mod scan;
mod schema;
mod tagged;
mod xml_calls;

pub use calls::CallRules;
pub use format::{Format, ParserNames};
pub use scan::Marker;

/// How an output ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By itself: a stop token or a stop string. What is open is closed, so that every call's JSON is whole.
    Stop,
    /// Cut off (length, cancelled, failed). What is open stays open: a call's JSON is a prefix.
    Cut,
}

/// What some output came to. Within one choice the texts and each call's arguments concatenate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pieces {
    pub text: String,
    pub reasoning: String,
    pub tool_calls: Vec<ToolCallDelta>,
}

/// A piece of a tool call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ToolCallDelta {
    /// Which call of this choice, from 0.
    pub index: u32,
    /// In a call's first piece only.
    pub id: Option<String>,
    /// In a call's first piece only.
    pub name: Option<String>,
    /// A piece of the arguments' JSON text.
    pub arguments: String,
}

/// An incremental parser of one output format, for one choice.
pub trait OutputParser: Send {
    /// Takes the next token's text. `id` is `None` for text that no token stands behind.
    fn push(&mut self, id: Option<u32>, text: &str, out: &mut Pieces);

    /// The output has ended; gives what was held back.
    fn finish(&mut self, end: End, out: &mut Pieces);

    /// Whether the next token is reasoning, as far as known (for usage figures).
    fn in_reasoning(&self) -> bool;
}

#[cfg(test)]
mod tests;

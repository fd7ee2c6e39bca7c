//! A choice's deltas as blocks, one after the other: reasoning, text, tool calls.
//!
//! Anthropic's content blocks and the items of OpenAI's Responses are both this. A block opens with its first
//! piece and closes when another opens. White space alone is no text block: models write line breaks between
//! their reasoning and a call, and Anthropic's API knows no blank blocks.

use conclave_proto::v1;

use super::collect::stray;
use crate::http::error::ApiResult;

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Kind {
    Reasoning,
    Text,
    Call { id: String, name: String },
}

/// One block with what it holds so far: text, or a call's arguments as JSON text.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Block {
    pub(crate) kind: Kind,
    pub(crate) content: String,
}

/// What a delta did. The index is the block's place among all blocks.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Change {
    Open(usize),
    Piece(usize, String),
    Close(usize),
}

#[derive(Default)]
pub(crate) struct Blocks {
    pub(crate) list: Vec<Block>,
    is_open: bool,
    /// White space that waits for text to follow.
    blank: String,
    calls: u32,
}

impl Blocks {
    /// Takes a delta apart: reasoning, then text, then calls, as the router fills it.
    ///
    /// # Errors
    /// A piece of a call that is not the newest one.
    pub(crate) fn push(&mut self, delta: v1::Delta) -> ApiResult<Vec<Change>> {
        let mut changes = Vec::new();
        if !delta.reasoning.is_empty() {
            self.piece(Kind::Reasoning, delta.reasoning, &mut changes);
        }
        if !delta.text.is_empty() {
            self.text(delta.text, &mut changes);
        }
        for call in delta.tool_calls {
            if call.index == self.calls {
                self.calls += 1;
                self.blank.clear();
                self.open(
                    Kind::Call {
                        id: call.id,
                        name: call.name,
                    },
                    &mut changes,
                );
            } else if call.index + 1 != self.calls || !matches!(self.current(), Some(Kind::Call { .. })) {
                return Err(stray("tool call", call.index));
            }
            self.append(call.arguments, &mut changes);
        }
        Ok(changes)
    }

    /// The answer is over: closes what is open.
    pub(crate) fn finish(&mut self) -> Vec<Change> {
        let mut changes = Vec::new();
        self.close(&mut changes);
        changes
    }

    fn current(&self) -> Option<&Kind> {
        self.list.last().filter(|_| self.is_open).map(|block| &block.kind)
    }

    fn text(&mut self, text: String, changes: &mut Vec<Change>) {
        if self.current() == Some(&Kind::Text) {
            return self.append(text, changes);
        }
        self.blank.push_str(&text);
        if !self.blank.trim().is_empty() {
            let text = std::mem::take(&mut self.blank);
            self.piece(Kind::Text, text.trim_start().to_owned(), changes);
        }
    }

    fn piece(&mut self, kind: Kind, text: String, changes: &mut Vec<Change>) {
        if self.current() != Some(&kind) {
            self.blank.clear();
            self.open(kind, changes);
        }
        self.append(text, changes);
    }

    fn open(&mut self, kind: Kind, changes: &mut Vec<Change>) {
        self.close(changes);
        self.is_open = true;
        changes.push(Change::Open(self.list.len()));
        self.list.push(Block {
            kind,
            content: String::new(),
        });
    }

    fn close(&mut self, changes: &mut Vec<Change>) {
        if std::mem::take(&mut self.is_open) {
            changes.push(Change::Close(self.list.len() - 1));
        }
    }

    fn append(&mut self, text: String, changes: &mut Vec<Change>) {
        if text.is_empty() {
            return;
        }
        let at = self.list.len().saturating_sub(1);
        if let Some(block) = self.list.last_mut() {
            block.content.push_str(&text);
            changes.push(Change::Piece(at, text));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delta(reasoning: &str, text: &str) -> v1::Delta {
        v1::Delta {
            reasoning: reasoning.into(),
            text: text.into(),
            ..Default::default()
        }
    }

    fn call(index: u32, name: &str, arguments: &str) -> v1::Delta {
        let call = v1::ToolCallDelta {
            index,
            id: name.into(),
            name: name.into(),
            arguments: arguments.into(),
        };
        v1::Delta {
            tool_calls: vec![call],
            ..Default::default()
        }
    }

    #[test]
    fn blocks_follow_each_other_and_blanks_between_them_vanish() {
        let mut blocks = Blocks::default();
        let mut changes = Vec::new();
        for delta in [
            delta("hm", ""),
            delta("", "\n\n"),
            call(0, "add", ""),
            call(0, "", "{}"),
            delta("", "\n"),
            delta("", " so"),
            delta("", "\n"),
            call(1, "sub", "{"),
        ] {
            changes.extend(blocks.push(delta).unwrap());
        }
        changes.extend(blocks.finish());
        let contents: Vec<_> = blocks.list.iter().map(|block| block.content.as_str()).collect();
        assert_eq!(contents, ["hm", "{}", "so\n", "{"]);
        let opened = changes
            .iter()
            .filter(|change| matches!(change, Change::Open(_)))
            .count();
        let closed = changes
            .iter()
            .filter(|change| matches!(change, Change::Close(_)))
            .count();
        assert_eq!((opened, closed), (4, 4));
        assert_eq!(changes.last(), Some(&Change::Close(3)));
    }

    #[test]
    fn pieces_of_a_call_that_is_over_are_an_error() {
        for deltas in [
            vec![call(1, "a", "")],
            vec![call(0, "a", ""), call(1, "b", ""), call(0, "", "x")],
        ] {
            let mut blocks = Blocks::default();
            let results: Vec<_> = deltas
                .into_iter()
                .map(|delta| blocks.push(delta).is_ok())
                .collect();
            assert_eq!(results.last(), Some(&false));
        }
    }
}

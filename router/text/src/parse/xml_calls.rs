//! Calls written as nested tags, with every argument as bare text: MiniMax-M2's format and its relatives.
//!
//! States and what moves them, with MiniMax-M2's tags (text in between is dropped, but for names and values):
//!
//! ```text
//! Block  --<invoke name=--> Name --  > --> Invoke --<parameter name=--> Key --  > --> Value
//! Value  --</parameter>--> Invoke --</invoke>--> Block --</minimax:tool_call>--> (closed)
//! Value  --<parameter name=--> Key
//! ```
//! A value is text byte for byte. Closing tags that were forgotten must not swallow the calls that follow, yet a
//! value may well contain `</invoke>` or `<minimax:tool_call>` (a file about this format does). So such a tag in a
//! value puts it in doubt: what follows is kept until it is clear. `</parameter>` next: all of it was value.
//! `<parameter name=` or the output's end next: the value ended before the first tag in doubt, and what was kept is
//! read again from there.

use super::{
    End, Pieces,
    calls::Calls,
    scan::Marker,
    tagged::{Item, Step, ToolSyntax},
};

/// Longest name of a function or parameter, in bytes; a longer one is no name.
const MAX_NAME_BYTES: usize = 1024;

/// The tags of one format.
pub struct Dialect {
    pub open: &'static str,
    pub close: &'static str,
    pub call: &'static str,
    pub call_end: &'static str,
    pub parameter: &'static str,
    pub parameter_end: &'static str,
    /// A line break after the opening and before the closing parameter tag is not part of the value.
    pub line_breaks: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Block,
    Name,
    Invoke,
    Key,
    Value,
    Doubt,
}

pub struct XmlCalls {
    state: State,
    line_breaks: bool,
    /// A line break at the value's beginning is still to be taken off.
    skip_break: bool,
    /// A line break at the value's end so far.
    held_break: bool,
    /// A name so far, after `name=`.
    name: String,
    /// What came since the value is in doubt.
    kept: Vec<Item>,
    openers: [Marker; 1],
    tags: [Marker; 6],
    names: [Marker; 3],
}

// Indices in `tags` that are told apart; 1 and 4 are the call's end and the block's beginning.
const INVOKE: usize = 0;
const PARAMETER: usize = 2;
const PARAMETER_END: usize = 3;
const BLOCK_END: usize = 5;
// Indices in `names`.
const NAME_END: usize = 0;

impl XmlCalls {
    /// `id` tells the tokens of markers, `None` for those that are text.
    pub fn new(dialect: &Dialect, id: impl Fn(&str) -> Option<u32>) -> Self {
        let marker = |text| Marker { text, id: id(text) };
        Self {
            state: State::Block,
            line_breaks: dialect.line_breaks,
            skip_break: false,
            held_break: false,
            name: String::new(),
            kept: Vec::new(),
            openers: [marker(dialect.open)],
            tags: [
                Marker::text(dialect.call),
                Marker::text(dialect.call_end),
                Marker::text(dialect.parameter),
                Marker::text(dialect.parameter_end),
                marker(dialect.open),
                marker(dialect.close),
            ],
            names: [Marker::text(">"), marker(dialect.open), marker(dialect.close)],
        }
    }

    /// A name is over: the text up to `>`, in double quotes, single quotes or bare.
    fn name(&mut self, calls: &mut Calls, out: &mut Pieces) {
        let text = std::mem::take(&mut self.name);
        let text = text.trim();
        let quoted = ['"', '\''].into_iter().find_map(|quote| {
            let rest = text.strip_prefix(quote)?;
            Some(rest.split_once(quote).map_or(rest, |(name, _)| name))
        });
        let name = quoted.unwrap_or(text);
        if self.state == State::Name {
            calls.begin(name, out);
            self.state = State::Invoke;
        } else {
            calls.parameter(name, out);
            self.state = State::Value;
            (self.skip_break, self.held_break) = (self.line_breaks, false);
        }
    }

    /// A piece of a value, less the dialect's line breaks.
    fn value(&mut self, mut text: &str, calls: &mut Calls, out: &mut Pieces) {
        if !self.line_breaks {
            return calls.value(text, out);
        }
        if std::mem::take(&mut self.skip_break) {
            text = text.strip_prefix('\n').unwrap_or(text);
        }
        if text.is_empty() {
            return;
        }
        if std::mem::take(&mut self.held_break) {
            calls.value("\n", out);
        }
        if let Some(rest) = text.strip_suffix('\n') {
            self.held_break = true;
            text = rest;
        }
        calls.value(text, out);
    }

    /// Something in place of a name's end: there is no name, and what stands there counts.
    fn no_name(&mut self, item: Item) -> Step {
        self.name.clear();
        self.state = if self.state == State::Name {
            State::Block
        } else {
            State::Invoke
        };
        Step::Again(vec![item])
    }

    /// A marker between the parts of a block.
    fn structure(&mut self, tag: usize, calls: &mut Calls, out: &mut Pieces) -> Step {
        let inside = self.state == State::Invoke;
        match tag {
            PARAMETER if inside => self.state = State::Key,
            PARAMETER | PARAMETER_END => {}
            _ => {
                if inside {
                    calls.end(out);
                }
                self.state = if tag == INVOKE { State::Name } else { State::Block };
            }
        }
        if tag == BLOCK_END {
            Step::Closed
        } else {
            Step::Inside
        }
    }
}

impl ToolSyntax for XmlCalls {
    fn openers(&self) -> &[Marker] {
        &self.openers
    }

    fn open(&mut self, _index: usize, _calls: &mut Calls, _out: &mut Pieces) {
        self.state = State::Block;
    }

    fn markers(&self) -> &[Marker] {
        match self.state {
            State::Name | State::Key => &self.names,
            _ => &self.tags,
        }
    }

    fn text(&mut self, text: &str, calls: &mut Calls, out: &mut Pieces) -> Step {
        match self.state {
            State::Block | State::Invoke => {}
            State::Value => self.value(text, calls, out),
            State::Doubt => self.kept.push(Item {
                id: None,
                text: text.to_owned(),
            }),
            State::Name | State::Key => {
                // The first character that is too much ends the attempt, wherever pieces are cut.
                let too_much = |(at, c): &(usize, char)| self.name.len() + at + c.len_utf8() > MAX_NAME_BYTES;
                let Some((at, _)) = text.char_indices().find(too_much) else {
                    self.name.push_str(text);
                    return Step::Inside;
                };
                return self.no_name(Item {
                    id: None,
                    text: text[at..].to_owned(),
                });
            }
        }
        Step::Inside
    }

    fn marker(&mut self, index: usize, item: Item, calls: &mut Calls, out: &mut Pieces) -> Step {
        match (self.state, index) {
            (State::Name | State::Key, NAME_END) => self.name(calls, out),
            (State::Name | State::Key, _) => return self.no_name(item),
            (State::Value, PARAMETER_END) => {
                calls.end_value(out);
                self.state = State::Invoke;
            }
            (State::Value, PARAMETER) => {
                calls.end_value(out);
                self.state = State::Key;
            }
            (State::Value, _) => {
                self.kept.push(item);
                self.state = State::Doubt;
            }
            (State::Doubt, PARAMETER_END) => {
                for item in std::mem::take(&mut self.kept) {
                    self.value(&item.text, calls, out);
                }
                calls.end_value(out);
                self.state = State::Invoke;
            }
            (State::Doubt, PARAMETER) => {
                self.kept.push(item);
                return self.end_doubt(calls, out);
            }
            (State::Doubt, _) => self.kept.push(item),
            (State::Block | State::Invoke, tag) => return self.structure(tag, calls, out),
        }
        Step::Inside
    }

    fn finish(&mut self, end: End, calls: &mut Calls, out: &mut Pieces) -> Step {
        if self.state == State::Doubt && end == End::Stop {
            return self.end_doubt(calls, out);
        }
        if matches!(
            self.state,
            State::Invoke | State::Key | State::Value | State::Doubt
        ) {
            calls.finish(end, out);
        }
        Step::Inside
    }
}

impl XmlCalls {
    /// The value in doubt ended where the doubt began.
    fn end_doubt(&mut self, calls: &mut Calls, out: &mut Pieces) -> Step {
        calls.end_value(out);
        self.state = State::Invoke;
        Step::Again(std::mem::take(&mut self.kept))
    }
}

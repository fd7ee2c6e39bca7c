//! Hermes' calls, which Qwen2.5 and Qwen3 write too: `<tool_call>{"name": "f", "arguments": {…}}</tool_call>`.
//!
//! A tag within a JSON string may be the string's text, or the string's end may be missing. It is in doubt until the
//! next quote (then it was text, unless an opening tag and a brace came just before) or until a line break or the
//! output's end (then it was a tag).

use super::{
    End, Pieces,
    call_object::{CallObject, CallStatus},
    calls::Calls,
    scan::Marker,
    tagged::{Item, Step, ToolSyntax},
};

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

pub struct Hermes {
    openers: [Marker; 1],
    tags: [Marker; 2],
    /// `None` once the object is over, or was none.
    call: Option<CallObject>,
    /// What came since the string is in doubt.
    kept: Vec<Item>,
}

impl Hermes {
    pub fn new(id: impl Fn(&str) -> Option<u32>) -> Self {
        let marker = |text| Marker { text, id: id(text) };
        Self {
            openers: [marker(OPEN)],
            tags: [marker(OPEN), marker(CLOSE)],
            call: None,
            kept: Vec::new(),
        }
    }

    fn json(&mut self, text: &str, calls: &mut Calls, out: &mut Pieces) {
        let Some(call) = &mut self.call else { return };
        for c in text.chars() {
            if call.push(c, calls, out) != CallStatus::More {
                // Whatever follows, up to the closing tag, belongs to no call.
                self.call = None;
                return;
            }
        }
    }

    /// Whether what was kept, up to byte `at` of its last piece, ends with an opening tag and a brace.
    fn opens_again(&self, at: usize) -> bool {
        let opener = self
            .kept
            .iter()
            .rposition(|item| item.text == OPEN || self.is_open(item.id));
        let after: Vec<&str> = match opener {
            Some(opener) => self.kept[opener + 1..]
                .iter()
                .map(|item| item.text.as_str())
                .collect(),
            None => return false,
        };
        let text = after.concat();
        let last = after.last().map_or(0, |last| last.len());
        text[..text.len() - last + at].trim() == "{"
    }

    fn is_open(&self, id: Option<u32>) -> bool {
        id.is_some() && id == self.openers[0].id
    }

    /// The tag that began the doubt was one: the call ends there.
    fn end_doubt(&mut self, calls: &mut Calls, out: &mut Pieces) -> Step {
        if let Some(mut call) = self.call.take() {
            call.finish(End::Stop, calls, out);
        }
        Step::Again(std::mem::take(&mut self.kept))
    }
}

impl ToolSyntax for Hermes {
    fn openers(&self) -> &[Marker] {
        &self.openers
    }

    fn open(&mut self, _index: usize, _calls: &mut Calls, _out: &mut Pieces) {
        self.call = Some(CallObject::new(false));
    }

    fn markers(&self) -> &[Marker] {
        &self.tags
    }

    fn text(&mut self, text: &str, calls: &mut Calls, out: &mut Pieces) -> Step {
        if self.kept.is_empty() {
            self.json(text, calls, out);
            return Step::Inside;
        }
        self.kept.push(Item {
            id: None,
            text: text.to_owned(),
        });
        match text.find(['"', '\n']) {
            None => Step::Inside,
            Some(at) if text[at..].starts_with('"') && !self.opens_again(at) => {
                for item in std::mem::take(&mut self.kept) {
                    self.json(&item.text, calls, out);
                }
                Step::Inside
            }
            Some(_) => self.end_doubt(calls, out),
        }
    }

    fn marker(&mut self, index: usize, item: Item, calls: &mut Calls, out: &mut Pieces) -> Step {
        let closes = self.tags[index].text == CLOSE;
        if !self.kept.is_empty() {
            self.kept.push(item);
            return if closes {
                Step::Inside
            } else {
                self.end_doubt(calls, out)
            };
        }
        match &mut self.call {
            Some(call) if call.in_string() => {
                self.kept.push(item);
                return Step::Inside;
            }
            Some(call) => call.finish(End::Stop, calls, out),
            None => {}
        }
        self.call = None;
        if closes {
            return Step::Closed;
        }
        self.open(index, calls, out);
        Step::Inside
    }

    fn finish(&mut self, end: End, calls: &mut Calls, out: &mut Pieces) -> Step {
        if !self.kept.is_empty() && end == End::Stop {
            return self.end_doubt(calls, out);
        }
        if let Some(mut call) = self.call.take() {
            call.finish(end, calls, out);
        }
        Step::Inside
    }
}

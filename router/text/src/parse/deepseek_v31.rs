//! DeepSeek-V3.1's calls, arguments as JSON:
//!
//! ```text
//! <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{…}<｜tool▁call▁end｜><｜tool▁calls▁end｜>
//! ```
//! All tags are tokens of their own, so within a JSON string only their ids count.

use super::{
    End, Pieces,
    calls::Calls,
    json_stream::{JsonStream, Status},
    scan::Marker,
    tagged::{Item, Step, ToolSyntax},
};

/// Longest name of a function, in bytes.
const MAX_NAME_BYTES: usize = 1024;

const CALLS: &str = "<｜tool▁calls▁begin｜>";
const CALLS_END: &str = "<｜tool▁calls▁end｜>";
const CALL: &str = "<｜tool▁call▁begin｜>";
const CALL_END: &str = "<｜tool▁call▁end｜>";
const SEPARATOR: &str = "<｜tool▁sep｜>";
pub const TAGS: [&str; 5] = [CALLS, CALLS_END, CALL, CALL_END, SEPARATOR];

enum State {
    /// Between calls.
    Block,
    Name(String),
    Arguments(JsonStream),
    /// The arguments are over, or were none; their closing tag has not come.
    Over,
}

pub struct DeepseekV31 {
    openers: [Marker; 2],
    tags: [Marker; 5],
    state: State,
}

impl DeepseekV31 {
    pub fn new(id: impl Fn(&str) -> Option<u32>) -> Self {
        let marker = |text| Marker { text, id: id(text) };
        Self {
            // A call without the outer tag counts too.
            openers: [marker(CALLS), marker(CALL)],
            tags: TAGS.map(marker),
            state: State::Block,
        }
    }

    /// Closes a call whose arguments are not whole.
    fn close(&mut self, calls: &mut Calls, out: &mut Pieces) {
        if let State::Arguments(stream) = &mut self.state {
            let mut rest = String::new();
            stream.close(&mut rest);
            if !stream.begun() {
                rest.push_str("{}");
            }
            calls.json(&rest, out);
            calls.end_json();
        }
        self.state = State::Over;
    }
}

impl ToolSyntax for DeepseekV31 {
    fn openers(&self) -> &[Marker] {
        &self.openers
    }

    fn open(&mut self, index: usize, _calls: &mut Calls, _out: &mut Pieces) {
        self.state = match index {
            0 => State::Block,
            _ => State::Name(String::new()),
        };
    }

    fn markers(&self) -> &[Marker] {
        &self.tags
    }

    fn text(&mut self, text: &str, calls: &mut Calls, out: &mut Pieces) -> Step {
        match &mut self.state {
            State::Block | State::Over => {}
            State::Name(name) => {
                name.push_str(text);
                if name.len() > MAX_NAME_BYTES {
                    self.state = State::Over;
                }
            }
            State::Arguments(stream) => {
                let mut json = String::new();
                let status = stream.push_object(text, &mut json);
                calls.json(&json, out);
                match status {
                    Status::More => {}
                    Status::Invalid => self.close(calls, out),
                    Status::Done | Status::DoneBefore => {
                        calls.end_json();
                        self.state = State::Over;
                    }
                }
            }
        }
        Step::Inside
    }

    fn marker(&mut self, index: usize, _item: Item, calls: &mut Calls, out: &mut Pieces) -> Step {
        let tag = self.tags[index].text;
        match (&mut self.state, tag) {
            (State::Name(name), SEPARATOR) => {
                let name = std::mem::take(name);
                calls.begin(name.trim(), out);
                self.state = State::Arguments(JsonStream::default());
                return Step::Inside;
            }
            (_, SEPARATOR) => return Step::Inside,
            _ => {}
        }
        self.close(calls, out);
        self.state = match tag {
            CALL => State::Name(String::new()),
            _ => State::Block,
        };
        if tag == CALLS_END {
            Step::Closed
        } else {
            Step::Inside
        }
    }

    fn finish(&mut self, end: End, calls: &mut Calls, out: &mut Pieces) -> Step {
        if end == End::Stop {
            self.close(calls, out);
        }
        Step::Inside
    }
}

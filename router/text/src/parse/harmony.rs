//! gpt-oss' harmony format: a sequence of messages, each with a header that says what it is.
//!
//! ```text
//! <|channel|>analysis<|message|>thoughts<|end|>
//! <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{…}<|call|>
//! <|start|>assistant<|channel|>final<|message|>answer<|return|>
//! ```
//! The channel `analysis` is reasoning, a recipient `functions.f` makes a call of any channel, everything else is
//! content. The `openai-harmony` crate is not used: it brings its own copy of the tokenizer, which it downloads, and
//! works on its token ids, while every other format here reads the checkpoint's.

use super::{
    CallRules, End, OutputParser, Pieces,
    calls::Calls,
    json_stream::{JsonStream, Status},
    scan::{Event, Marker, Scanner},
};

/// Longest header, in bytes; a longer one is no header but text.
const MAX_HEADER_BYTES: usize = 512;

const START: usize = 0;
const CHANNEL: usize = 1;
const CONSTRAIN: usize = 2;
const MESSAGE: usize = 3;
pub const TAGS: [&str; 7] = [
    "<|start|>",
    "<|channel|>",
    "<|constrain|>",
    "<|message|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
];

enum State {
    /// The header so far. Channel and role are told apart by their words, so the tags between them only separate.
    Header(String),
    Reasoning,
    Content,
    Call(JsonStream),
    /// A message to somebody else, or what follows a call's arguments.
    Ignored,
}

pub struct Harmony {
    markers: [Marker; 7],
    scanner: Scanner,
    state: State,
    calls: Calls,
}

impl Harmony {
    pub fn new(rules: CallRules, id: impl Fn(&str) -> Option<u32>) -> Self {
        Self {
            markers: TAGS.map(|text| Marker { text, id: id(text) }),
            scanner: Scanner::default(),
            state: State::Header(String::new()),
            calls: Calls::new(rules),
        }
    }

    fn drain(&mut self, out: &mut Pieces) {
        let mut scanner = std::mem::take(&mut self.scanner);
        while let Some(event) = scanner.next(&self.markers) {
            match event {
                Event::Text(text) => self.text(text, out),
                Event::Marker(index) => self.marker(index, out),
            }
        }
        self.scanner = scanner;
    }

    fn text(&mut self, text: &str, out: &mut Pieces) {
        match &mut self.state {
            State::Ignored => {}
            State::Reasoning => out.reasoning.push_str(text),
            State::Content => out.text.push_str(text),
            State::Call(_) => self.arguments(text, out),
            State::Header(header) => {
                header.push_str(text);
                if header.len() > MAX_HEADER_BYTES {
                    out.text.push_str(header);
                    self.state = State::Content;
                }
            }
        }
    }

    fn arguments(&mut self, text: &str, out: &mut Pieces) {
        let State::Call(stream) = &mut self.state else {
            return;
        };
        let mut json = String::new();
        let status = stream.push_object(text, &mut json);
        self.calls.json(&json, out);
        match status {
            Status::More => {}
            Status::Invalid => self.end_message(out),
            Status::Done | Status::DoneBefore => {
                self.calls.end_json();
                self.state = State::Ignored;
            }
        }
    }

    fn marker(&mut self, index: usize, out: &mut Pieces) {
        match (&mut self.state, index) {
            // Blanks part the words on both sides of a tag.
            (State::Header(header), START | CHANNEL | CONSTRAIN) => header.push(' '),
            (State::Header(header), MESSAGE) => {
                let header = std::mem::take(header);
                self.begin_message(&header, out);
            }
            (State::Header(_), _) => self.state = State::Header(String::new()),
            // A header in the midst of a message: its end was forgotten.
            (_, START | CHANNEL) => {
                self.end_message(out);
                self.state = State::Header(String::new());
            }
            (_, CONSTRAIN | MESSAGE) => {}
            _ => {
                self.end_message(out);
                self.state = State::Header(String::new());
            }
        }
    }

    fn begin_message(&mut self, header: &str, out: &mut Pieces) {
        let mut words = header.split_whitespace();
        let recipient = words.clone().find_map(|word| word.strip_prefix("to="));
        self.state = match recipient {
            Some(recipient) => {
                let name = recipient.strip_prefix("functions.").unwrap_or(recipient);
                self.calls.begin(name, out);
                State::Call(JsonStream::default())
            }
            None if words.any(|word| word == "analysis") => State::Reasoning,
            None => State::Content,
        };
    }

    /// Closes a call whose arguments are not whole.
    fn end_message(&mut self, out: &mut Pieces) {
        if let State::Call(stream) = &mut self.state {
            let mut rest = String::new();
            stream.close(&mut rest);
            if !stream.begun() {
                rest.push_str("{}");
            }
            self.calls.json(&rest, out);
            self.calls.end_json();
        }
        self.state = State::Ignored;
    }
}

impl OutputParser for Harmony {
    fn push(&mut self, id: Option<u32>, text: &str, out: &mut Pieces) {
        let by_id = |marker: &Marker| marker.id.is_some() && marker.id == id;
        match self.markers.iter().position(by_id) {
            Some(index) => {
                if let Some(rest) = self.scanner.rest() {
                    self.text(&rest, out);
                }
                self.marker(index, out);
            }
            None => {
                self.scanner.feed(text);
                self.drain(out);
            }
        }
    }

    fn finish(&mut self, end: End, out: &mut Pieces) {
        if let Some(rest) = self.scanner.rest() {
            self.text(&rest, out);
        }
        match &mut self.state {
            // Text without any header, as when an answer was forced into another format.
            State::Header(header) => out.text.push_str(&std::mem::take(header)),
            State::Call(_) if end == End::Stop => self.end_message(out),
            _ => {}
        }
    }

    fn in_reasoning(&self) -> bool {
        matches!(self.state, State::Reasoning)
    }
}

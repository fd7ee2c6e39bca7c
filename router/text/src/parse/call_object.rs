//! Reads one call written as a JSON object: `{"name": "f", "arguments": {…}}`, keys in any order, `parameters` for
//! `arguments`. The arguments' text passes through as the model wrote it, while it is written.

use super::{
    End, Pieces,
    calls::Calls,
    json_stream::{JsonStream, Status},
};
use crate::json::{self, Json};

/// Where a call stands after a character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallStatus {
    More,
    /// The object is whole, with this character.
    Done,
    /// Not a call. What was begun has been closed.
    Invalid,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Start,
    /// Before a key or the end; `first` if no comma is needed.
    Key,
    KeyText,
    Colon,
    Value,
    /// After a value: a comma or the end.
    After,
    Over,
}

/// A reader of one call.
#[derive(Debug)]
pub struct CallObject {
    state: State,
    stream: JsonStream,
    /// The key or value being read, unless it passes through.
    text: String,
    key: String,
    begun: bool,
    /// The present value is the arguments' object and passes through.
    passing: bool,
    /// Arguments that came before the name.
    early: Option<String>,
    have_arguments: bool,
    /// Give calls to functions that are not offered back as invalid, not as dropped calls.
    strict: bool,
}

impl CallObject {
    pub fn new(strict: bool) -> Self {
        Self {
            state: State::Start,
            stream: JsonStream::default(),
            text: String::new(),
            key: String::new(),
            begun: false,
            passing: false,
            early: None,
            have_arguments: false,
            strict,
        }
    }

    /// Whether a string is open, so that markers in it may be text.
    pub fn in_string(&self) -> bool {
        matches!(self.state, State::KeyText | State::Value) && self.stream.in_string()
    }

    /// Whether the call has been given out (or dropped because nobody offers it).
    pub fn begun(&self) -> bool {
        self.begun
    }

    pub fn push(&mut self, c: char, calls: &mut Calls, out: &mut Pieces) -> CallStatus {
        let blank = matches!(c, ' ' | '\t' | '\n' | '\r');
        match (&self.state, c) {
            (State::KeyText, _) => return self.key_text(c, calls, out),
            (State::Value, _) => return self.value(c, calls, out),
            _ if blank => {}
            (State::Start, '{') => self.state = State::Key,
            (State::Key, '"') => {
                self.state = State::KeyText;
                self.begin_text();
                return self.key_text(c, calls, out);
            }
            (State::Colon, ':') => {
                self.state = State::Value;
                self.begin_text();
            }
            (State::After, ',') => self.state = State::Key,
            (State::Key | State::After, '}') => return self.done(calls, out),
            _ => return self.fail(calls, out),
        }
        CallStatus::More
    }

    /// The input has ended within the call.
    pub fn finish(&mut self, end: End, calls: &mut Calls, out: &mut Pieces) {
        if end == End::Stop && self.state != State::Over {
            self.fail(calls, out);
        }
    }

    fn begin_text(&mut self) {
        self.stream = JsonStream::default();
        self.text.clear();
        let arguments = matches!(self.key.as_str(), "arguments" | "parameters");
        self.passing = self.state == State::Value && arguments && self.begun && !self.have_arguments;
    }

    fn key_text(&mut self, c: char, calls: &mut Calls, out: &mut Pieces) -> CallStatus {
        match self.stream.push(c, &mut self.text) {
            Status::More => CallStatus::More,
            Status::Done => match json::parse(&self.text) {
                Ok(Json::String(key)) => {
                    self.key = key;
                    self.state = State::Colon;
                    CallStatus::More
                }
                _ => self.fail(calls, out),
            },
            _ => self.fail(calls, out),
        }
    }

    fn value(&mut self, c: char, calls: &mut Calls, out: &mut Pieces) -> CallStatus {
        let start = self.text.len();
        let status = self.stream.push(c, &mut self.text);
        if self.passing {
            if start == 0 && !self.text.is_empty() && !self.text.starts_with('{') {
                // Not an object: wait for the whole of it.
                self.passing = false;
            } else {
                calls.json(&self.text[start..], out);
            }
        }
        match status {
            Status::More => CallStatus::More,
            Status::Invalid => self.fail(calls, out),
            Status::Done | Status::DoneBefore => {
                if !self.end_value(calls, out) {
                    return self.fail(calls, out);
                }
                self.state = State::After;
                match status {
                    Status::DoneBefore => self.push(c, calls, out),
                    _ => CallStatus::More,
                }
            }
        }
    }

    /// A value is whole; false if the object is no call.
    fn end_value(&mut self, calls: &mut Calls, out: &mut Pieces) -> bool {
        if std::mem::take(&mut self.passing) {
            self.have_arguments = true;
            return true;
        }
        match self.key.as_str() {
            "name" if !self.begun => {
                let Ok(Json::String(name)) = json::parse(&self.text) else {
                    return false;
                };
                if self.strict && !calls.knows(&name) {
                    return false;
                }
                self.begun = true;
                calls.begin(&name, out);
                if let Some(early) = self.early.take() {
                    calls.json(&early, out);
                    self.have_arguments = true;
                }
            }
            "arguments" | "parameters" if !self.have_arguments => {
                let Some(arguments) = object_text(&self.text) else {
                    return false;
                };
                if self.begun {
                    calls.json(&arguments, out);
                    self.have_arguments = true;
                } else {
                    self.early = Some(arguments);
                }
            }
            _ => {}
        }
        true
    }

    fn done(&mut self, calls: &mut Calls, out: &mut Pieces) -> CallStatus {
        if !self.begun {
            return self.fail(calls, out);
        }
        self.state = State::Over;
        if !self.have_arguments {
            calls.json("{}", out);
        }
        calls.end_json();
        CallStatus::Done
    }

    /// Closes a call that was begun with what came of its arguments.
    fn fail(&mut self, calls: &mut Calls, out: &mut Pieces) -> CallStatus {
        self.state = State::Over;
        if self.begun {
            let mut closing = String::new();
            if self.passing {
                self.stream.close(&mut closing);
                if self.text.is_empty() {
                    closing.push_str("{}");
                }
            } else if !self.have_arguments {
                closing.push_str("{}");
            }
            calls.json(&closing, out);
            calls.end_json();
        }
        CallStatus::Invalid
    }
}

/// The text of an arguments value: an object as written, a string that holds one, or null for none.
fn object_text(text: &str) -> Option<String> {
    match json::parse(text).ok()? {
        Json::Object(_) => Some(text.to_owned()),
        Json::Null => Some("{}".to_owned()),
        Json::String(inner) if inner.trim().is_empty() => Some("{}".to_owned()),
        Json::String(inner) => matches!(json::parse(&inner), Ok(Json::Object(_))).then_some(inner),
        _ => None,
    }
}

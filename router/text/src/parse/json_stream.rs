//! Reads one JSON value character by character, and gives out the part that can still be made whole.
//!
//! Arguments stream while a model writes them, so their text is out before it is known to be right. What is given
//! out is always a prefix that a few closing quotes and braces complete: a comma, a key or half a number waits
//! until what belongs to it has come.

use crate::json::MAX_DEPTH;

/// Where a value stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    More,
    /// The value is whole; the character just taken is part of it.
    Done,
    /// The value was whole before the character just taken, which is not part of it.
    DoneBefore,
    /// This is not JSON. What was given out can still be closed.
    Invalid,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A value must come; after `[` its end may come instead.
    Value {
        or_end: bool,
    },
    /// A key must come; after `{` its end may come instead.
    Key {
        or_end: bool,
    },
    Colon,
    /// A comma or the container's end must come.
    After,
    String {
        key: bool,
        escape: Escape,
    },
    /// A number or word; its text is in `held`.
    Scalar,
    Done,
    Invalid,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Escape {
    No,
    Letter,
    /// Hexadecimal digits still to come.
    Hex(u8),
}

/// A reader of one value.
#[derive(Debug)]
pub struct JsonStream {
    state: State,
    /// Closing characters of the open containers.
    stack: Vec<char>,
    /// Text that waits: blanks, commas, keys, unfinished scalars and escapes.
    held: String,
    /// Where the present scalar or escape begins in `held`.
    part: usize,
    /// A value's string is open in what was given out.
    string_out: bool,
    /// Closing characters of the containers whose opening was given out.
    stack_out: Vec<char>,
}

impl Default for JsonStream {
    fn default() -> Self {
        Self {
            state: State::Value { or_end: false },
            stack: Vec::new(),
            held: String::new(),
            part: 0,
            string_out: false,
            stack_out: Vec::new(),
        }
    }
}

impl JsonStream {
    /// Whether a string is open, so that markers in it may be text.
    pub fn in_string(&self) -> bool {
        matches!(self.state, State::String { .. })
    }

    /// Whether anything but blanks has come.
    pub fn begun(&self) -> bool {
        self.state != State::Value { or_end: false } || !self.stack.is_empty()
    }

    /// Takes text of what must be an object; appends to `out` what can be given out. The rest of the text behind its
    /// end is nobody's.
    pub fn push_object(&mut self, text: &str, out: &mut String) -> Status {
        for c in text.chars() {
            let begins = !self.begun() && !c.is_whitespace();
            let status = if begins && c != '{' {
                Status::Invalid
            } else {
                self.push(c, out)
            };
            if status != Status::More {
                return status;
            }
        }
        Status::More
    }

    /// Takes a character; appends to `out` what can be given out.
    pub fn push(&mut self, c: char, out: &mut String) -> Status {
        match self.state {
            State::Done => return Status::DoneBefore,
            State::Invalid => return Status::Invalid,
            State::String { key, escape } => self.string(c, key, escape, out),
            State::Scalar if !scalar_ends(c) => self.held.push(c),
            State::Scalar => {
                if !is_scalar(&self.held[self.part..]) {
                    return self.fail();
                }
                self.give(out);
                self.after_value();
                if self.state == State::Done {
                    return Status::DoneBefore;
                }
                return self.push(c, out);
            }
            _ => self.structure(c, out),
        }
        match self.state {
            State::Done => Status::Done,
            State::Invalid => Status::Invalid,
            _ => Status::More,
        }
    }

    /// Appends what makes the text given out a whole value. Nothing must be pushed afterwards.
    pub fn close(&mut self, out: &mut String) {
        if std::mem::take(&mut self.string_out) {
            out.push('"');
        }
        out.extend(self.stack_out.drain(..).rev());
    }

    fn fail(&mut self) -> Status {
        self.state = State::Invalid;
        Status::Invalid
    }

    /// Everything held is safe now.
    fn give(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
        self.stack_out.clone_from(&self.stack);
    }

    fn after_value(&mut self) {
        self.state = if self.stack.is_empty() {
            State::Done
        } else {
            State::After
        };
    }

    fn structure(&mut self, c: char, out: &mut String) {
        let top = self.stack.last().copied();
        match (self.state, c) {
            // Blanks before the value are not part of it.
            (_, ' ' | '\t' | '\n' | '\r') => {
                if !self.stack.is_empty() {
                    self.held.push(c);
                }
            }
            (State::Value { or_end: true }, ']') | (State::Key { or_end: true }, '}') => self.pop(c, out),
            (State::Value { .. }, '{' | '[') => {
                if self.stack.len() >= MAX_DEPTH {
                    self.fail();
                    return;
                }
                self.held.push(c);
                let object = c == '{';
                self.stack.push(if object { '}' } else { ']' });
                self.state = if object {
                    State::Key { or_end: true }
                } else {
                    State::Value { or_end: true }
                };
                self.give(out);
            }
            (State::Value { .. }, '"') => {
                self.held.push(c);
                self.give(out);
                self.string_out = true;
                self.state = State::String {
                    key: false,
                    escape: Escape::No,
                };
            }
            (State::Value { .. }, '-' | '0'..='9' | 't' | 'f' | 'n') => {
                self.part = self.held.len();
                self.held.push(c);
                self.state = State::Scalar;
            }
            (State::Key { .. }, '"') => {
                self.held.push(c);
                self.state = State::String {
                    key: true,
                    escape: Escape::No,
                };
            }
            (State::Colon, ':') => {
                self.held.push(c);
                self.state = State::Value { or_end: false };
            }
            (State::After, ',') => {
                self.held.push(c);
                self.state = match top {
                    Some('}') => State::Key { or_end: false },
                    _ => State::Value { or_end: false },
                };
            }
            (State::After, c) if Some(c) == top => self.pop(c, out),
            _ => {
                self.fail();
            }
        }
    }

    fn pop(&mut self, c: char, out: &mut String) {
        self.stack.pop();
        self.held.push(c);
        self.give(out);
        self.after_value();
    }

    fn string(&mut self, c: char, key: bool, escape: Escape, out: &mut String) {
        let next = match (escape, c) {
            (Escape::No, '"') => {
                self.held.push(c);
                if key {
                    self.state = State::Colon;
                } else {
                    self.string_out = false;
                    self.give(out);
                    self.after_value();
                }
                return;
            }
            (Escape::No, '\\') => Escape::Letter,
            (Escape::No, '\0'..='\u{1f}') => {
                self.fail();
                return;
            }
            (Escape::No, _) => Escape::No,
            (Escape::Letter, 'u') => Escape::Hex(4),
            (Escape::Letter, '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't') => Escape::No,
            (Escape::Hex(1), c) if c.is_ascii_hexdigit() => Escape::No,
            (Escape::Hex(n), c) if c.is_ascii_hexdigit() => Escape::Hex(n - 1),
            (Escape::Letter | Escape::Hex(_), _) => {
                self.fail();
                return;
            }
        };
        self.held.push(c);
        self.state = State::String { key, escape: next };
        if !key && next == Escape::No {
            out.push_str(&self.held);
            self.held.clear();
        }
    }
}

fn scalar_ends(c: char) -> bool {
    !matches!(c, '-' | '+' | '.' | '0'..='9' | 'a'..='z' | 'A'..='Z')
}

fn is_scalar(text: &str) -> bool {
    crate::json::parse(text).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json;
    use proptest::prelude::*;

    /// Whether all of `text` is one value, and what was given out for it.
    fn read(text: &str) -> (bool, String) {
        let (mut stream, mut out) = (JsonStream::default(), String::new());
        for c in text.chars() {
            let status = stream.push(c, &mut out);
            let blank = status == Status::DoneBefore && c.is_ascii_whitespace();
            if !matches!(status, Status::More | Status::Done) && !blank {
                return (false, out);
            }
        }
        // A number ends with what comes after it.
        (stream.push(' ', &mut out) == Status::DoneBefore, out)
    }

    const SAMPLE: &str =
        r#"{"a": [1, -2.5e3, true, null, "x\"\u00e9\n"], "b": {}, "c": {"d": []}, "": "é🤔"}"#;

    #[test]
    fn whole_values_pass_unchanged() {
        for text in [SAMPLE, "12", "\"a\"", "[]", "{\"a\":\n\t1 }", "null"] {
            assert_eq!(read(text), (true, text.to_owned()));
        }
    }

    #[test]
    fn every_prefix_can_be_closed() {
        for cut in (0..SAMPLE.len()).filter(|&cut| SAMPLE.is_char_boundary(cut)) {
            let (mut stream, mut out) = (JsonStream::default(), String::new());
            for c in SAMPLE[..cut].chars() {
                assert_eq!(stream.push(c, &mut out), Status::More);
            }
            assert!(SAMPLE.starts_with(&out));
            stream.close(&mut out);
            assert!(cut == 0 || json::parse(&out).is_ok(), "{out}");
        }
    }

    #[test]
    fn strings_stream() {
        let (mut stream, mut out) = (JsonStream::default(), String::new());
        for c in "{\"a\": \"xy".chars() {
            stream.push(c, &mut out);
        }
        assert_eq!(out, "{\"a\": \"xy");
    }

    #[test]
    fn depth_is_bounded() {
        assert!(read(&("[".repeat(MAX_DEPTH) + &"]".repeat(MAX_DEPTH))).0);
        assert!(!read(&"[".repeat(MAX_DEPTH + 1)).0);
    }

    proptest! {
        #[test]
        fn agrees_with_the_reader(text in "[\\[\\]{}\",:a1\\\\un .-]{0,12}") {
            prop_assert_eq!(read(&text).0, json::parse(&text).is_ok(), "{}", text);
            let (mut stream, mut out) = (JsonStream::default(), String::new());
            for c in text.chars() {
                stream.push(c, &mut out);
            }
            stream.close(&mut out);
            prop_assert!(out.is_empty() || json::parse(&out).is_ok(), "{} {}", text, out);
        }
    }
}

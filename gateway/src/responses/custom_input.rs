//! A custom tool's input out of the arguments that carry it, `{"input": "…"}`, while they come.
//!
//! What is given out is the beginning of what [`super::tools::as_input`] reads of the whole; where the arguments look
//! otherwise nothing more is given out, and their end says what the input is.

use super::tools::INPUT;

/// Reads the arguments of one call piece by piece.
#[derive(Debug, Default)]
pub(super) struct CustomInput {
    state: State,
    /// Text of the key, or an escape, that is not whole yet.
    held: String,
    /// All that was given out.
    given: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum State {
    /// The object's opening, its first key, a colon and the string's opening must come.
    #[default]
    Object,
    BeforeKey,
    Key,
    Colon,
    BeforeText,
    Text,
    /// An escape in the text: it is held.
    Escape,
    /// The text has ended, or is none that can be read in pieces.
    Over,
}

impl CustomInput {
    /// Takes a piece of the arguments and gives what it adds to the input.
    pub(super) fn push(&mut self, piece: &str) -> String {
        let mut out = String::new();
        for c in piece.chars() {
            self.state = self.step(c, &mut out);
        }
        self.given.push_str(&out);
        out
    }

    /// What is still missing of the input, now that it is whole.
    pub(super) fn rest<'a>(&self, whole: &'a str) -> &'a str {
        whole.strip_prefix(self.given.as_str()).unwrap_or_default()
    }

    fn step(&mut self, c: char, out: &mut String) -> State {
        match (self.state, c) {
            (State::Over, _) => State::Over,
            (State::Text, '"') => State::Over,
            (State::Text, '\\') => {
                self.held.push(c);
                State::Escape
            }
            (State::Text, _) => {
                out.push(c);
                State::Text
            }
            (State::Escape, _) => {
                self.held.push(c);
                self.escape(out)
            }
            (State::Key, '"') if self.held == INPUT => {
                self.held.clear();
                State::Colon
            }
            (State::Key, _) if self.held.len() < INPUT.len() => {
                self.held.push(c);
                State::Key
            }
            (state, ' ' | '\t' | '\n' | '\r') if state != State::Key => state,
            (State::Object, '{') => State::BeforeKey,
            (State::BeforeKey, '"') => State::Key,
            (State::Colon, ':') => State::BeforeText,
            (State::BeforeText, '"') => State::Text,
            _ => State::Over,
        }
    }

    /// The escape that is held, if it is whole. The two halves of a character beyond U+FFFF are one.
    fn escape(&mut self, out: &mut String) -> State {
        let digits_to_come = match self.held.as_bytes() {
            [b'\\', b'u', digits @ ..] if digits.len() < 4 => true,
            [
                b'\\',
                b'u',
                b'd' | b'D',
                b'8' | b'9' | b'a' | b'b' | b'A' | b'B',
                ..,
            ] => self.held.len() < 12,
            _ => false,
        };
        if digits_to_come {
            return State::Escape;
        }
        let whole = format!("\"{}\"", std::mem::take(&mut self.held));
        match serde_json::from_str::<String>(&whole) {
            Ok(text) => {
                out.push_str(&text);
                State::Text
            }
            Err(_) => State::Over,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tools::{as_arguments, as_input};
    use super::*;

    /// In every cut in two, and by character: what is given out, and what is left for the end.
    fn pieces(arguments: &str) -> (String, String) {
        let read = |pieces: &[&str]| {
            let mut input = CustomInput::default();
            let given: String = pieces.iter().map(|piece| input.push(piece)).collect();
            (given, input.rest(&as_input(arguments)).to_owned())
        };
        let whole = read(&[arguments]);
        for (at, _) in arguments.char_indices() {
            let (head, tail) = arguments.split_at(at);
            assert_eq!(read(&[head, tail]), whole, "{arguments} at {at}");
        }
        let chars: Vec<String> = arguments.chars().map(String::from).collect();
        let chars: Vec<&str> = chars.iter().map(String::as_str).collect();
        assert_eq!(read(&chars), whole, "{arguments}");
        whole
    }

    #[test]
    fn a_text_is_given_out_as_it_comes() {
        for input in ["", "*** Begin Patch\n\"x\"\\n\t/", "é😀\u{1}\u{7f}"] {
            assert_eq!(pieces(&as_arguments(input)), (input.to_owned(), String::new()));
        }
        let escaped = r#" { "input" : "a\u00e9\ud83d\uDE00\/b" } "#;
        assert_eq!(pieces(escaped), ("aé😀/b".to_owned(), String::new()));
        assert_eq!(pieces(r#"{"input":"half a lin"#).0, "half a lin");
        assert_eq!(
            pieces(r#"{"input":"a","more":1}"#),
            ("a".to_owned(), String::new())
        );
    }

    #[test]
    fn what_looks_otherwise_comes_at_the_end() {
        for arguments in [
            r#"{"patch":"x"}"#,
            r#"{"input":5}"#,
            r#"{"inputs":"x"}"#,
            r#"["input"]"#,
            "",
            "text",
        ] {
            let (given, rest) = pieces(arguments);
            assert_eq!((given.as_str(), rest), ("", as_input(arguments).into_owned()));
        }
        // Half a character is none.
        let (given, _) = pieces(r#"{"input":"a\ud83dxxxxxxx"}"#);
        assert_eq!(given, "a");
    }
}

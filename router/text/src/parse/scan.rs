//! Finds markers in text that arrives in pieces, holding back no more than what may be a marker's beginning.
//!
//! Every byte is looked at a bounded number of times (the length of the longest marker), so a megabyte of
//! half-written markers costs what a megabyte of prose does.

/// A piece of text with a meaning, and the token that stands for it, if the tokenizer has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Marker {
    pub text: &'static str,
    /// With an id the marker is recognised by it alone, and its letters in text are text.
    pub id: Option<u32>,
}

impl Marker {
    /// A marker that is always looked for in text.
    pub const fn text(text: &'static str) -> Self {
        Self { text, id: None }
    }
}

/// Longest piece of text in one event, in bytes. Who gives a part of it back has it scanned again.
const MAX_TEXT_BYTES: usize = 1024;

/// What stands next.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    Text(&'a str),
    /// The marker of this index.
    Marker(usize),
}

/// Text that was taken and not given out.
#[derive(Debug, Default)]
pub struct Scanner {
    text: String,
    at: usize,
}

impl Scanner {
    pub fn feed(&mut self, text: &str) {
        self.text.drain(..self.at);
        self.at = 0;
        self.text.push_str(text);
    }

    /// Puts text before what is still to come.
    pub fn put_back(&mut self, text: &str) {
        self.text.replace_range(..self.at, text);
        self.at = 0;
    }

    /// The next event, or `None` until more text comes.
    pub fn next(&mut self, markers: &[Marker]) -> Option<Event<'_>> {
        let rest = &self.text[self.at..];
        let start = self.at;
        for (offset, byte) in rest.bytes().enumerate() {
            if offset >= MAX_TEXT_BYTES && rest.is_char_boundary(offset) {
                self.at += offset;
                return Some(Event::Text(&self.text[start..self.at]));
            }
            let tail = &rest.as_bytes()[offset..];
            let mut partial = false;
            for (index, marker) in markers.iter().enumerate() {
                let pattern = marker.text.as_bytes();
                if marker.id.is_some() || pattern[0] != byte {
                    continue;
                }
                if tail.starts_with(pattern) {
                    if offset > 0 {
                        self.at += offset;
                        return Some(Event::Text(&self.text[start..self.at]));
                    }
                    self.at += pattern.len();
                    return Some(Event::Marker(index));
                }
                partial |= pattern.starts_with(tail);
            }
            if partial {
                self.at += offset;
                return (offset > 0).then(|| Event::Text(&self.text[start..self.at]));
            }
        }
        self.at = self.text.len();
        (start < self.at).then(|| Event::Text(&self.text[start..]))
    }

    /// What is held back, as text.
    pub fn rest(&mut self) -> Option<String> {
        let rest = self.text.split_off(self.at);
        *self = Self::default();
        (!rest.is_empty()).then_some(rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MARKERS: [Marker; 3] = [
        Marker::text("<ab>"),
        Marker::text("</a"),
        Marker {
            text: "b>",
            id: Some(7),
        },
    ];

    fn run(pieces: &[&str]) -> Vec<String> {
        let mut scanner = Scanner::default();
        let mut out: Vec<String> = vec![String::new()];
        for piece in pieces {
            scanner.feed(piece);
            while let Some(event) = scanner.next(&MARKERS) {
                match event {
                    Event::Text(text) => out.last_mut().unwrap().push_str(text),
                    Event::Marker(index) => out.extend([format!("#{index}"), String::new()]),
                }
            }
        }
        out.last_mut()
            .unwrap()
            .push_str(&scanner.rest().unwrap_or_default());
        out
    }

    #[test]
    fn markers_with_an_id_are_text() {
        assert_eq!(run(&["x<ab>b></a<a"]), ["x", "#0", "b>", "#1", "<a"]);
    }

    proptest! {
        #[test]
        fn cut_does_not_matter(pieces in prop::collection::vec("[<ab>/é]{0,5}", 0..10)) {
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            prop_assert_eq!(run(&pieces), run(&[&pieces.concat()]));
        }
    }
}

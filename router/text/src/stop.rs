//! Stop strings, searched for in text that arrives in pieces.
//!
//! Text is held back only while it may be the beginning of a stop string. What is found does not depend on the
//! pieces: the first stop string to be complete ends the text; of several that end together, the longest.

use crate::error::{Result, TextError};

/// Stop strings per request; each text byte is compared with every one of them.
pub const MAX_STOP_STRINGS: usize = 64;
/// Bytes per stop string; so much text may be held back.
pub const MAX_STOP_STRING_BYTES: usize = 4096;

/// Checks a request's stop strings: not empty, not too many, not too long.
pub fn check_stop_strings(stop: &[String]) -> Result<()> {
    if stop.len() > MAX_STOP_STRINGS {
        return Err(TextError::request(
            "stop",
            format!(
                "{} stop strings; at most {MAX_STOP_STRINGS} are allowed",
                stop.len()
            ),
        ));
    }
    for (index, text) in stop.iter().enumerate() {
        if text.is_empty() || text.len() > MAX_STOP_STRING_BYTES {
            return Err(TextError::request(
                format!("stop[{index}]"),
                format!(
                    "is {} bytes long; 1 to {MAX_STOP_STRING_BYTES} are allowed",
                    text.len()
                ),
            ));
        }
    }
    Ok(())
}

/// What a piece of text led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// This many bytes, counted from the first held-back one, can go out.
    Release(usize),
    /// A stop string was found: this many bytes go out and nothing after them. `index` says which string.
    Stopped { release: usize, index: usize },
}

/// Searches one sequence's text for stop strings.
pub struct StopMatcher {
    patterns: Vec<Pattern>,
    include: bool,
    /// Bytes that went in and have not gone out.
    held: usize,
}

/// Knuth, Morris and Pratt's automaton of one string.
struct Pattern {
    bytes: Vec<u8>,
    /// `fallback[n]`: length of the longest proper prefix of the string that ends its first `n` bytes.
    fallback: Vec<usize>,
    matched: usize,
}

impl StopMatcher {
    /// `include`: the stop string itself belongs to the text (`include_stop_str_in_output`).
    pub fn new(stop: &[String], include: bool) -> Result<Self> {
        check_stop_strings(stop)?;
        Ok(Self {
            patterns: stop.iter().map(|text| Pattern::new(text.as_bytes())).collect(),
            include,
            held: 0,
        })
    }

    /// Takes the next piece of text. Releases always end between characters if pieces do, because a stop string
    /// is whole characters.
    pub fn push(&mut self, text: &str) -> Outcome {
        let mut end = self.held;
        for byte in text.bytes() {
            end += 1;
            let mut found: Option<(usize, usize)> = None;
            for (index, pattern) in self.patterns.iter_mut().enumerate() {
                let length = pattern.bytes.len();
                if pattern.step(byte) && found.is_none_or(|(_, longest)| length > longest) {
                    found = Some((index, length));
                }
            }
            if let Some((index, length)) = found {
                self.held = 0;
                let release = if self.include { end } else { end - length };
                return Outcome::Stopped { release, index };
            }
        }
        let may_match = self.patterns.iter().map(|pattern| pattern.matched).max();
        self.held = may_match.unwrap_or(0);
        Outcome::Release(end - self.held)
    }

    /// At the end nothing can become a stop string any more.
    pub fn finish(&mut self) -> usize {
        std::mem::take(&mut self.held)
    }
}

impl Pattern {
    fn new(bytes: &[u8]) -> Self {
        let mut fallback = vec![0; bytes.len() + 1];
        let mut matched = 0;
        for end in 1..bytes.len() {
            while matched > 0 && bytes[matched] != bytes[end] {
                matched = fallback[matched];
            }
            matched += usize::from(bytes[matched] == bytes[end]);
            fallback[end + 1] = matched;
        }
        Self {
            bytes: bytes.to_vec(),
            fallback,
            matched: 0,
        }
    }

    /// Whether the string ends with this byte.
    fn step(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.fallback[self.matched];
        }
        self.matched += usize::from(self.bytes[self.matched] == byte);
        let found = self.matched == self.bytes.len();
        if found {
            self.matched = self.fallback[self.matched];
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Pushes the pieces; returns the text that went out and the index of the string that stopped it.
    fn run(stop: &[&str], include: bool, pieces: &[&str]) -> (String, Option<usize>) {
        let stop: Vec<String> = stop.iter().map(|s| (*s).to_owned()).collect();
        let mut matcher = StopMatcher::new(&stop, include).unwrap();
        let (mut held, mut out) = (String::new(), String::new());
        for piece in pieces {
            held.push_str(piece);
            match matcher.push(piece) {
                Outcome::Release(n) => out.extend(held.drain(..n)),
                Outcome::Stopped { release, index } => {
                    out.push_str(&held[..release]);
                    return (out, Some(index));
                }
            }
        }
        out.push_str(&held[..matcher.finish()]);
        (out, None)
    }

    #[test]
    fn stops_across_pieces_and_cuts_the_string() {
        assert_eq!(
            run(&["END"], false, &["ab E", "N", "D c"]),
            ("ab ".to_owned(), Some(0))
        );
        assert_eq!(
            run(&["END"], true, &["ab E", "N", "D c"]),
            ("ab END".to_owned(), Some(0))
        );
        assert_eq!(run(&["END"], false, &["ab E", "N"]), ("ab EN".to_owned(), None));
    }

    #[test]
    fn holds_back_only_what_may_match() {
        let mut matcher = StopMatcher::new(&["aab".to_owned()], false).unwrap();
        assert_eq!(matcher.push("xaa"), Outcome::Release(1));
        assert_eq!(matcher.push("a"), Outcome::Release(1));
        assert_eq!(matcher.push("c"), Outcome::Release(3));
        assert_eq!(matcher.finish(), 0);
    }

    #[test]
    fn first_complete_then_longest() {
        assert_eq!(run(&["bcd", "c"], false, &["abcd"]), ("ab".to_owned(), Some(1)));
        assert_eq!(run(&["c", "bc"], false, &["abcd"]), ("a".to_owned(), Some(1)));
    }

    #[test]
    fn bounds() {
        let many = |n| vec!["x".to_owned(); n];
        assert!(check_stop_strings(&many(MAX_STOP_STRINGS)).is_ok());
        assert!(check_stop_strings(&many(MAX_STOP_STRINGS + 1)).is_err());
        assert!(check_stop_strings(&["x".repeat(MAX_STOP_STRING_BYTES)]).is_ok());
        let error = check_stop_strings(&["a".to_owned(), "x".repeat(MAX_STOP_STRING_BYTES + 1)]);
        assert_eq!(error.unwrap_err().field(), Some("stop[1]"));
        assert!(check_stop_strings(&[String::new()]).is_err());
    }

    proptest! {
        #[test]
        fn cut_does_not_matter(
            pieces in prop::collection::vec("[abé]{0,4}", 0..12),
            stop in prop::collection::vec("[abé]{1,3}", 0..4),
            include in any::<bool>(),
        ) {
            let stop: Vec<&str> = stop.iter().map(String::as_str).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let whole = pieces.concat();
            let cut = run(&stop, include, &pieces);
            prop_assert_eq!(&cut, &run(&stop, include, &[&whole]));
            // The definition: the smallest end, then the smallest start.
            let first = stop.iter().enumerate().filter_map(|(i, s)| {
                whole.find(s).map(|at| (at + s.len(), at, i))
            }).min();
            match first {
                None => prop_assert_eq!(cut, (whole, None)),
                Some((end, at, index)) => {
                    prop_assert_eq!(cut.0, &whole[..if include { end } else { at }]);
                    prop_assert_eq!(stop[cut.1.unwrap()], stop[index]);
                }
            }
        }
    }
}

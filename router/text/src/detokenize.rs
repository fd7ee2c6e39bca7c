//! Token ids to text, one token at a time: whole characters only, and in the end exactly the whole decode.

use std::sync::Arc;

use crate::tokenizer::Tokenizer;

/// Tokens of a vocabulary that is not byte-level which may wait for a character to become whole. A longer run of
/// broken bytes is given out as U+FFFD.
const MAX_WAITING_TOKENS: usize = 64;

/// Decodes one sequence. For byte-level vocabularies the pieces concatenate to `Tokenizer::decode` of all ids;
/// for others they do whenever the bytes are valid UTF-8.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special_tokens: bool,
    state: State,
    /// Unicode scalar values given out so far.
    chars: usize,
}

enum State {
    /// The bytes of an unfinished character, at most 3.
    Bytes(Vec<u8>),
    Window(Window),
}

/// Decoders that look at several tokens (SentencePiece): decode a window of the last tokens again and again and
/// give out what has become longer.
#[derive(Default)]
struct Window {
    ids: Vec<u32>,
    /// Tokens of `ids` whose text is out; the rest waits.
    settled: usize,
    /// Bytes of the decoded window that are out.
    out: usize,
}

impl Detokenizer {
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special_tokens: bool) -> Self {
        let state = if tokenizer.is_byte_level() {
            State::Bytes(Vec::new())
        } else {
            State::Window(Window::default())
        };
        Self {
            tokenizer,
            skip_special_tokens,
            state,
            chars: 0,
        }
    }

    /// Unicode scalar values given out so far: the text offset of the next token.
    pub fn chars(&self) -> usize {
        self.chars
    }

    /// Appends the text that this token completes, which may be nothing.
    pub fn push(&mut self, id: u32, out: &mut String) {
        if self.skip_special_tokens && self.tokenizer.is_special(id) {
            return;
        }
        let start = out.len();
        match &mut self.state {
            State::Bytes(waiting) => {
                waiting.extend_from_slice(self.tokenizer.token_bytes(id));
                let rest = decode_whole_characters(waiting, out);
                waiting.drain(..waiting.len() - rest);
            }
            State::Window(window) => window.push(&self.tokenizer, id, out),
        }
        self.chars += out[start..].chars().count();
    }

    /// Appends what still waits, as U+FFFD. Call once, after the last token.
    pub fn finish(&mut self, out: &mut String) {
        let start = out.len();
        match &mut self.state {
            State::Bytes(waiting) => {
                out.push_str(&String::from_utf8_lossy(waiting));
                waiting.clear();
            }
            State::Window(window) => window.flush(&self.tokenizer, out),
        }
        self.chars += out[start..].chars().count();
    }
}

/// Appends all whole characters of `bytes`, broken ones as U+FFFD; returns how many bytes at the end may still
/// become a character.
fn decode_whole_characters(bytes: &[u8], out: &mut String) -> usize {
    let mut rest = bytes;
    loop {
        match std::str::from_utf8(rest) {
            Ok(text) => {
                out.push_str(text);
                return 0;
            }
            Err(error) => {
                let (whole, broken) = rest.split_at(error.valid_up_to());
                // Cannot fail: `valid_up_to` bytes are valid.
                out.push_str(std::str::from_utf8(whole).unwrap_or_default());
                match error.error_len() {
                    None => return broken.len(),
                    Some(length) => {
                        out.push(char::REPLACEMENT_CHARACTER);
                        rest = &broken[length..];
                    }
                }
            }
        }
    }
}

impl Window {
    fn push(&mut self, tokenizer: &Tokenizer, id: u32, out: &mut String) {
        self.ids.push(id);
        let text = tokenizer.decode(&self.ids, false).unwrap_or_default();
        let whole = text.trim_end_matches(char::REPLACEMENT_CHARACTER).len();
        let waiting = self.ids.len() - self.settled;
        if whole < text.len() && waiting < MAX_WAITING_TOKENS {
            self.give(&text[..whole], out);
            return;
        }
        self.give(&text, out);
        // Keep the tokens just settled as context: a decoder may strip a blank from the first token it sees.
        self.ids.drain(..self.settled);
        self.settled = self.ids.len();
        self.out = tokenizer.decode(&self.ids, false).unwrap_or_default().len();
    }

    fn flush(&mut self, tokenizer: &Tokenizer, out: &mut String) {
        let text = tokenizer.decode(&self.ids, false).unwrap_or_default();
        self.give(&text, out);
    }

    fn give(&mut self, text: &str, out: &mut String) {
        if let Some(new) = text.get(self.out..) {
            out.push_str(new);
            self.out = text.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::demo;
    use proptest::prelude::*;

    fn tokenizer() -> Arc<Tokenizer> {
        static ONCE: std::sync::OnceLock<Arc<Tokenizer>> = std::sync::OnceLock::new();
        ONCE.get_or_init(|| Arc::new(Tokenizer::load(&demo()).unwrap()))
            .clone()
    }

    fn pieces(ids: &[u32], skip: bool) -> Vec<String> {
        let mut detokenizer = Detokenizer::new(tokenizer(), skip);
        let mut pieces = Vec::new();
        for &id in ids {
            let mut piece = String::new();
            detokenizer.push(id, &mut piece);
            pieces.push(piece);
        }
        let mut last = String::new();
        detokenizer.finish(&mut last);
        pieces.push(last);
        assert_eq!(detokenizer.chars(), pieces.concat().chars().count());
        pieces
    }

    #[test]
    fn half_a_character_waits() {
        let ids = tokenizer().encode("🤔", false).unwrap();
        assert!(ids.len() > 1);
        let pieces = pieces(&ids, true);
        assert!(pieces[..ids.len() - 1].iter().all(String::is_empty));
        assert_eq!(pieces[ids.len() - 1], "🤔");
    }

    #[test]
    fn an_unfinished_character_ends_as_replacement() {
        let ids = tokenizer().encode("🤔", false).unwrap();
        assert_eq!(pieces(&ids[..ids.len() - 1], true).concat(), "\u{fffd}");
    }

    #[test]
    fn special_tokens_are_kept_on_request() {
        assert_eq!(pieces(&[3071, 3064], true).concat(), "</think>");
        assert_eq!(pieces(&[3071, 3064], false).concat(), "[e~[</think>");
    }

    #[test]
    fn sentencepiece_like_vocabularies() {
        let json = r#"{"version":"1.0","added_tokens":[],"normalizer":null,
          "pre_tokenizer":{"type":"Metaspace","replacement":"▁","prepend_scheme":"first","split":false},
          "post_processor":null,
          "decoder":{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},"content":" "},
            {"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]},
          "model":{"type":"BPE","vocab":{"▁":0,"a":1,"▁b":2,"<0xC3>":3,"<0xA9>":4},"merges":[],"byte_fallback":true}}"#;
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("tokenizer.json"), json).unwrap();
        let tokenizer = Arc::new(Tokenizer::load(directory.path()).unwrap());
        assert!(!tokenizer.is_byte_level());
        let ids = [2, 1, 2, 3, 4, 2, 0, 1];
        let mut detokenizer = Detokenizer::new(tokenizer.clone(), true);
        let (mut text, mut steps) = (String::new(), Vec::new());
        for id in ids {
            detokenizer.push(id, &mut text);
            steps.push(text.clone());
        }
        detokenizer.finish(&mut text);
        assert_eq!(text, tokenizer.decode(&ids, true).unwrap());
        assert_eq!(text, "ba bé b a");
        assert!(steps.iter().all(|step| !step.contains('\u{fffd}')));
        // A run of broken bytes is given out in the end.
        let mut text = String::new();
        let mut detokenizer = Detokenizer::new(tokenizer, true);
        for _ in 0..=MAX_WAITING_TOKENS {
            detokenizer.push(4, &mut text);
        }
        assert!(!text.is_empty());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn pieces_concatenate_to_the_whole_decode(
            ids in prop::collection::vec(prop_oneof![0u32..3080, 0u32..260], 0..60),
            skip in any::<bool>(),
        ) {
            let pieces = pieces(&ids, skip);
            prop_assert_eq!(pieces.concat(), tokenizer().decode(&ids, skip).unwrap());
        }
    }
}

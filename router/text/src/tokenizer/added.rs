//! Added tokens (`<think>`, `]~b]` …): found in text before any merging, each one id.
//!
//! `split` repeats the library's search (leftmost, longest, with the tokens' strip and word rules) over text in
//! which some bytes are barred, which the library cannot express.

use std::{collections::HashSet, ops::Range};

use aho_corasick::{AhoCorasick, MatchKind};

/// One added token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddedToken {
    pub id: u32,
    pub content: String,
    /// Dropped from text by `skip_special_tokens`.
    pub special: bool,
    lstrip: bool,
    rstrip: bool,
    single_word: bool,
}

pub(crate) struct AddedTokens {
    tokens: Vec<AddedToken>,
    /// Tokens are matched in text as it is written, not after normalization.
    as_written: bool,
    special: HashSet<u32>,
    /// Patterns are `tokens`' contents, in the same order.
    search: AhoCorasick,
    /// The same patterns, for finding every occurrence, overlapping ones too.
    overlapping: AhoCorasick,
    /// Every proper beginning and every proper end of a token.
    heads: HashSet<String>,
    tails: HashSet<String>,
    longest: usize,
}

/// A byte that no UTF-8 text contains: a barred byte is replaced by it before searching.
const BARRED: u8 = 0xff;

impl AddedTokens {
    pub fn new(inner: &tokenizers::Tokenizer) -> std::result::Result<Self, String> {
        let decoder = inner.get_added_tokens_decoder();
        let as_written = inner.get_normalizer().is_none() || decoder.values().all(|token| !token.normalized);
        let mut tokens: Vec<AddedToken> = decoder
            .into_iter()
            .filter(|(_, token)| !token.content.is_empty())
            .map(|(id, token)| AddedToken {
                id,
                content: token.content,
                special: token.special,
                lstrip: token.lstrip,
                rstrip: token.rstrip,
                single_word: token.single_word,
            })
            .collect();
        tokens.sort_by_key(|token| token.id);
        let contents = || tokens.iter().map(|token| &token.content);
        Ok(Self {
            special: tokens.iter().filter(|t| t.special).map(|t| t.id).collect(),
            search: AhoCorasick::builder()
                .match_kind(MatchKind::LeftmostLongest)
                .build(contents())
                .map_err(|error| error.to_string())?,
            overlapping: AhoCorasick::new(contents()).map_err(|error| error.to_string())?,
            heads: contents()
                .flat_map(|token| cuts(token).map(|(head, _)| head.to_owned()))
                .collect(),
            tails: contents()
                .flat_map(|token| cuts(token).map(|(_, tail)| tail.to_owned()))
                .collect(),
            longest: contents().map(String::len).max().unwrap_or(0),
            as_written,
            tokens,
        })
    }

    pub fn tokens(&self) -> &[AddedToken] {
        &self.tokens
    }

    /// Whether `split` finds exactly what the library finds.
    pub fn is_exact(&self) -> bool {
        self.as_written
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// Every place where an added token's text stands, overlapping ones too: (index of the token, start).
    pub fn occurrences<'a>(&'a self, text: &'a str) -> impl Iterator<Item = (usize, usize)> + 'a {
        self.overlapping
            .find_overlapping_iter(text)
            .map(|found| (found.pattern().as_usize(), found.start()))
    }

    /// Parts of added tokens at the text's edges: what could become a token with other text beside it. Gives each
    /// part and where it starts.
    pub fn edges<'a>(&'a self, text: &'a str) -> impl Iterator<Item = (&'a str, usize)> {
        let last = text.len().saturating_sub(self.longest);
        let at_end = (last..text.len())
            .filter_map(|at| Some((text.get(at..)?, at)))
            .filter(|(part, _)| self.heads.contains(*part));
        let at_start = (1..=self.longest.min(text.len()))
            .filter_map(|end| Some((text.get(..end)?, 0)))
            .filter(|(part, _)| self.tails.contains(*part));
        at_end.chain(at_start)
    }

    /// Cuts text into added tokens (with id) and the rest, none of them covering a byte at `barred` (ascending).
    pub fn split(&self, text: &str, barred: &[usize]) -> Vec<(Option<u32>, Range<usize>)> {
        let mut bytes = text.as_bytes().to_vec();
        for &at in barred {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = BARRED;
            }
        }
        let mut spans = Vec::new();
        let mut done = 0;
        for found in self.search.find_iter(&bytes) {
            let token = &self.tokens[found.pattern().as_usize()];
            let (mut start, mut end) = (found.start(), found.end());
            if start < done || token.single_word && !stands_alone(text, start, end) {
                continue;
            }
            if token.lstrip {
                start = text[..start].trim_end().len().max(done);
            }
            if token.rstrip {
                end += text[end..].len() - text[end..].trim_start().len();
            }
            if done < start {
                spans.push((None, done..start));
            }
            spans.push((Some(token.id), start..end));
            done = end;
        }
        if done < text.len() {
            spans.push((None, done..text.len()));
        }
        spans
    }
}

/// All ways to cut a text in two.
fn cuts(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.char_indices().skip(1).map(|(at, _)| text.split_at(at))
}

fn stands_alone(text: &str, start: usize, end: usize) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    !text[..start].chars().next_back().is_some_and(is_word)
        && !text[end..].chars().next().is_some_and(is_word)
}

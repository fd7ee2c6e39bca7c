//! Follows one choice through a grammar: which tokens may come next.

use std::sync::Arc;

use llguidance::{Matcher, toktrie::SimpleVob};

use super::{Grammar, refusal::first_lines};
use crate::error::{Result, TextError};

/// The state of one choice. The same tokens always lead to the same state.
pub struct GrammarMatcher {
    matcher: Matcher,
    eos: Arc<[u32]>,
    free_mask: Arc<[u8]>,
    /// The output is still reasoning; this token ends it.
    reasoning_end: Option<u32>,
    ended: bool,
}

impl GrammarMatcher {
    pub(super) fn new(grammar: &Grammar) -> Self {
        Self {
            matcher: grammar.matcher.clone(),
            eos: grammar.eos.clone(),
            free_mask: grammar.free_mask.clone(),
            reasoning_end: grammar.reasoning_end,
            ended: false,
        }
    }

    /// The tokens that may come next: one bit per token, token `i` in byte `i / 8`, bit `i % 8`. As long as the
    /// vocabulary, rounded up to whole bytes.
    pub fn mask(&mut self) -> Result<Arc<[u8]>> {
        if self.reasoning_end.is_some() {
            return Ok(self.free_mask.clone());
        }
        let mut mask = self.matcher.compute_mask_or_eos().map_err(failed)?;
        // Any of the eos tokens ends a text that may end.
        if self.eos.iter().any(|&eos| mask.is_allowed(eos)) {
            self.eos.iter().for_each(|&eos| mask.allow_token(eos));
        }
        Ok(to_bytes(&mask, vocab_size(&self.free_mask)))
    }

    /// Takes the next generated token. A token that the mask did not allow is an error, after which the matcher
    /// gives nothing but errors.
    pub fn consume(&mut self, token: u32) -> Result<()> {
        if let Some(end) = self.reasoning_end {
            if token == end {
                self.reasoning_end = None;
            }
            return Ok(());
        }
        if self.ended || self.eos.contains(&token) && self.matcher.is_accepting().map_err(failed)? {
            self.ended = true;
            return Ok(());
        }
        self.matcher.consume_token(token).map_err(failed)
    }

    /// Whether the text so far may stand as it is.
    pub fn may_end(&mut self) -> bool {
        self.reasoning_end.is_none() && self.matcher.is_accepting().unwrap_or(false)
    }
}

fn vocab_size(mask: &[u8]) -> u32 {
    u32::try_from(mask.len() * 8).unwrap_or(u32::MAX)
}

fn failed(error: impl ToString) -> TextError {
    TextError::request("structured_outputs", first_lines(&error.to_string()))
}

/// The mask's bits in little-endian order, cut to the vocabulary.
pub fn to_bytes(mask: &SimpleVob, vocab_size: u32) -> Arc<[u8]> {
    let bytes = mask.as_slice().iter().flat_map(|word| word.to_le_bytes());
    let length = (vocab_size as usize).div_ceil(8);
    bytes.chain(std::iter::repeat(0)).take(length).collect()
}

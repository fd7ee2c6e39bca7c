//! The tokenizer as llguidance sees it.
//!
//! Added tokens are given as control tokens: they are never part of a grammar's text, only of grammars that name
//! them by id. So a constrained string can hold the letters of `</think>`, but not the token.

use std::sync::Arc;

use llguidance::toktrie::{TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

use crate::{
    error::{Result, TextError},
    tokenizer::Tokenizer,
};

struct Vocabulary {
    tokenizer: Arc<Tokenizer>,
    trie: TokTrie,
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    /// The canonical tokens of a text. Bytes that are no text fall back to the trie's longest matches.
    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| {
            self.tokenizer.encode_literal(text).unwrap_or_default()
        })
    }
}

pub fn environment(tokenizer: Arc<Tokenizer>, vocab_size: u32, eos: &[u32]) -> Result<TokEnv> {
    let size = (vocab_size as usize).max(tokenizer.vocab_len());
    let wrong = |reason: String| TextError::request("structured_outputs", reason);
    let Some(&first) = eos.first() else {
        return Err(wrong("this model has no token that ends an output".to_owned()));
    };
    if let Some(id) = eos.iter().find(|&&id| id as usize >= size) {
        return Err(wrong(format!(
            "eos token {id} is outside the vocabulary of {size}"
        )));
    }
    let added: std::collections::HashSet<u32> =
        tokenizer.added_tokens().iter().map(|token| token.id).collect();
    let word = |id: u32| {
        let bytes = tokenizer.token_bytes(id);
        if added.contains(&id) || eos.contains(&id) {
            [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat()
        } else {
            bytes.to_vec()
        }
    };
    let size = u32::try_from(size).map_err(|_| wrong("vocabulary above 2^32".to_owned()))?;
    let words: Vec<Vec<u8>> = (0..size).map(word).collect();
    let trie = TokTrie::from(&TokRxInfo::new(size, first), &words).with_eos_tokens(eos);
    Ok(Arc::new(Vocabulary { tokenizer, trie }))
}

/// Every token that has a text, but for the eos tokens.
pub fn free_mask(trie: &TokTrie, eos: &[u32]) -> Arc<[u8]> {
    let mut mask = trie.alloc_token_set();
    for id in 0..trie.info().vocab_size {
        if !trie.token(id).is_empty() && !eos.contains(&id) {
            mask.allow_token(id);
        }
    }
    super::matcher::to_bytes(&mask, trie.info().vocab_size)
}

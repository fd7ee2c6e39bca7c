//! The checkpoint's tokenizer: text to token ids, token ids to bytes.
//!
//! Reads tokenizer.json (Hugging Face `tokenizers` format) and tokenizer_config.json. Encoding is the library's;
//! what is added here is a table of each token's bytes, and encoding in which given places of the text can never
//! become part of an added token (`encode_marked`), so that a user cannot write control tokens.

mod added;
mod cache;
mod config;
mod table;

use std::path::Path;

use tokenizers::{
    Model, NormalizedString, Normalizer, OffsetType, PreTokenizedString, PreTokenizer, normalizer::Range,
};

pub use added::AddedToken;
pub use config::TokenizerConfig;

use crate::error::{Result, TextError};
pub(crate) use added::AddedTokens;
use cache::PieceCache;
use table::TokenTable;

/// Longest text that is encoded at once, in bytes. Longer text is more tokens than any context holds.
pub const MAX_TEXT_BYTES: usize = 32 << 20;

/// Text and tokens kept to encode growing conversations quickly, in bytes.
pub const MAX_CACHE_BYTES: usize = 64 << 20;

/// A loaded tokenizer. Shared by all requests; nothing in it changes.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    added: AddedTokens,
    table: TokenTable,
    config: TokenizerConfig,
    cache: PieceCache,
}

impl Tokenizer {
    /// Loads tokenizer.json and, if present, tokenizer_config.json from a checkpoint directory.
    pub fn load(directory: &Path) -> Result<Self> {
        let config = TokenizerConfig::load(directory)?;
        let file = directory.join("tokenizer.json");
        let bytes = std::fs::read(&file).map_err(|error| TextError::checkpoint(&file, error))?;
        let mut inner =
            tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| TextError::checkpoint(&file, error))?;
        // A checkpoint may carry the settings of its training run; prompts are never cut or padded here.
        inner
            .with_truncation(None)
            .map_err(|error| TextError::checkpoint(&file, error))?
            .with_padding(None);
        config.add_missing_tokens(&mut inner, &directory.join("tokenizer_config.json"))?;
        let added = AddedTokens::new(&inner).map_err(|e| TextError::checkpoint(&file, e))?;
        let table = TokenTable::new(&inner).map_err(|e| TextError::checkpoint(&file, e))?;
        Ok(Self {
            inner,
            added,
            table,
            config,
            cache: PieceCache::new(MAX_CACHE_BYTES),
        })
    }

    /// What tokenizer_config.json says.
    pub fn config(&self) -> &TokenizerConfig {
        &self.config
    }

    /// Encodes text in which added tokens are recognised wherever they stand. With `add_special_tokens` the
    /// tokenizer's post-processor adds what it adds (often bos).
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        check_length(text)?;
        let encoding = self
            .inner
            .encode_fast(text, add_special_tokens)
            .map_err(|error| TextError::request("prompt", error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Encodes text without recognising any added token in it.
    pub fn encode_literal(&self, text: &str) -> Result<Vec<u32>> {
        check_length(text)?;
        self.encode_spans(text, vec![(None, 0..text.len())])
    }

    /// Encodes text like `encode(text, false)`, except that no added token may cover any of the bytes at
    /// `literal` (ascending). Everything else is cut into words and merged exactly as without them. (With bytes
    /// given, added tokens are matched as written, also those that the library would match in normalized text.)
    pub fn encode_marked(&self, text: &str, literal: &[usize]) -> Result<Vec<u32>> {
        if literal.is_empty() && !self.added.is_exact() {
            return self.encode(text, false);
        }
        check_length(text)?;
        self.encode_spans(text, self.added.split(text, literal))
    }

    /// The same, remembering the tokens of the pieces between added tokens for the next time this `salt` comes
    /// with them.
    pub fn encode_remembering(&self, text: &str, literal: &[usize], salt: u64) -> Result<Vec<u32>> {
        // Other vocabularies treat the first piece of a text differently.
        if !self.is_byte_level() || !self.added.is_exact() {
            return self.encode_marked(text, literal);
        }
        check_length(text)?;
        let mut ids = Vec::with_capacity(text.len() / 3);
        for (id, range) in self.added.split(text, literal) {
            let piece = &text[range];
            match id {
                Some(id) => ids.push(id),
                None => ids.extend_from_slice(&self.cache.get(salt, piece, || self.encode_literal(piece))?),
            }
        }
        Ok(ids)
    }

    /// The library's pipeline over spans that are added tokens already (with id) or not.
    fn encode_spans(
        &self,
        text: &str,
        spans: Vec<(Option<u32>, std::ops::Range<usize>)>,
    ) -> Result<Vec<u32>> {
        let failed = |error: tokenizers::Error| TextError::request("prompt", error.to_string());
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let mut pieces = PreTokenizedString::from(text);
        pieces
            .split(|_, whole| {
                Ok(spans
                    .iter()
                    .filter_map(|(id, range)| {
                        let slice = whole.slice(Range::Original(range.clone()))?;
                        let token =
                            |&id: &u32| vec![tokenizers::Token::new(id, String::new(), (0, range.len()))];
                        Some((slice, id.as_ref().map(token)))
                    })
                    .collect::<Vec<(NormalizedString, Option<Vec<tokenizers::Token>>)>>())
            })
            .map_err(failed)?;
        if let Some(normalizer) = self.inner.get_normalizer() {
            pieces
                .normalize(|piece| normalizer.normalize(piece))
                .map_err(failed)?;
        }
        if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces).map_err(failed)?;
        }
        pieces
            .tokenize(|piece| self.inner.get_model().tokenize(piece.get()))
            .map_err(failed)?;
        let encoding = pieces.into_encoding(None, 0, OffsetType::None).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The whole decode: ids without a token give nothing, halves of characters at the end give U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.inner
            .decode(ids, skip_special_tokens)
            .map_err(|error| TextError::request("token_ids", error.to_string()))
    }

    /// The bytes a token stands for, maybe part of a character; empty for an id without a token.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.table.bytes(id)
    }

    /// Whether decoding is the concatenation of `token_bytes` (byte-level BPE).
    pub fn is_byte_level(&self) -> bool {
        self.table.is_byte_level()
    }

    /// Whether `skip_special_tokens` drops this token from text.
    pub fn is_special(&self, id: u32) -> bool {
        self.added.is_special(id)
    }

    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token as the vocabulary spells it (byte-level alphabet and all).
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// One more than the highest id with a token. A model's logits may reach further.
    pub fn vocab_len(&self) -> usize {
        self.table.len()
    }

    /// Added tokens: those matched in text before any merging.
    pub fn added_tokens(&self) -> &[AddedToken] {
        self.added.tokens()
    }

    pub(crate) fn added(&self) -> &AddedTokens {
        &self.added
    }
}

fn check_length(text: &str) -> Result<()> {
    if text.len() > MAX_TEXT_BYTES {
        return Err(TextError::request(
            "prompt",
            format!(
                "{} bytes of text; at most {MAX_TEXT_BYTES} are encoded",
                text.len()
            ),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests;

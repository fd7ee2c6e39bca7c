//! The bytes of every token, in one flat array.
//!
//! Byte-level BPE spells each byte as one printable character (GPT-2's table); SentencePiece-like vocabularies
//! spell a blank as U+2581 and rare bytes as `<0xNN>`. The same reading as the library's decoders.

use std::collections::HashMap;

use serde_json::Value;

pub struct TokenTable {
    bytes: Vec<u8>,
    /// Token `id` is `bytes[starts[id]..starts[id + 1]]`.
    starts: Vec<u32>,
    byte_level: bool,
}

/// Ids above this are a mistake in tokenizer.json: the table is as long as the highest id.
const MAX_ID: u32 = 1 << 24;

impl TokenTable {
    pub fn new(inner: &tokenizers::Tokenizer) -> Result<Self, String> {
        let byte_level = decodes_byte_level(inner)?;
        let vocab = inner.get_vocab(true);
        let last = vocab.values().copied().max().ok_or("empty vocabulary")?;
        if last > MAX_ID {
            return Err(format!("token id {last} is above {MAX_ID}"));
        }
        let mut tokens: Vec<Option<&str>> = vec![None; last as usize + 1];
        for (token, id) in &vocab {
            tokens[*id as usize] = Some(token);
        }
        // An added token hides a model's token of the same id, as in the library's decode.
        let added = inner.get_added_tokens_decoder();
        for (id, token) in &added {
            tokens[*id as usize] = Some(&token.content);
        }
        let letters = byte_level.then(byte_of_letter);
        let mut table = Self {
            bytes: Vec::new(),
            starts: Vec::with_capacity(tokens.len() + 1),
            byte_level,
        };
        table.starts.push(0);
        for token in tokens {
            match (token, &letters) {
                (None, _) => {}
                (Some(token), Some(letters)) => push_byte_level(token, letters, &mut table.bytes),
                (Some(token), None) => push_spelled(token, &mut table.bytes),
            }
            let end = u32::try_from(table.bytes.len()).map_err(|_| "vocabulary above 4 GiB")?;
            table.starts.push(end);
        }
        Ok(table)
    }

    pub fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        match (self.starts.get(id), self.starts.get(id.saturating_add(1))) {
            (Some(&start), Some(&end)) => &self.bytes[start as usize..end as usize],
            _ => &[],
        }
    }

    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    pub fn is_byte_level(&self) -> bool {
        self.byte_level
    }
}

/// Whether the decoder is ByteLevel and nothing else: then tokens' bytes concatenate.
fn decodes_byte_level(inner: &tokenizers::Tokenizer) -> Result<bool, String> {
    let decoder = serde_json::to_value(inner.get_decoder()).map_err(|error| error.to_string())?;
    let is_byte_level = |decoder: &Value| decoder["type"] == "ByteLevel";
    let sequence = decoder["decoders"].as_array();
    Ok(is_byte_level(&decoder)
        || sequence.is_some_and(|decoders| decoders.len() == 1 && is_byte_level(&decoders[0])))
}

/// A token with any character outside the table (an added token with a blank or CJK in it) is its own UTF-8.
fn push_byte_level(token: &str, letters: &HashMap<char, u8>, out: &mut Vec<u8>) {
    let start = out.len();
    for letter in token.chars() {
        match letters.get(&letter) {
            Some(&byte) => out.push(byte),
            None => {
                out.truncate(start);
                out.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

fn push_spelled(token: &str, out: &mut Vec<u8>) {
    let hex = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    match hex
        .filter(|hex| hex.len() == 2)
        .map(|hex| u8::from_str_radix(hex, 16))
    {
        Some(Ok(byte)) => out.push(byte),
        _ => out.extend_from_slice(token.replace('\u{2581}', " ").as_bytes()),
    }
}

/// GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 onwards in ascending order.
fn byte_of_letter() -> HashMap<char, u8> {
    let mut next = 0x100u32;
    (0..=255u8)
        .map(|byte| {
            let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
            let letter = if printable {
                u32::from(byte)
            } else {
                next += 1;
                next - 1
            };
            (char::from_u32(letter).unwrap_or('\0'), byte)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alphabet_covers_every_byte_once() {
        let letters = byte_of_letter();
        assert_eq!(letters.len(), 256);
        assert_eq!(letters[&'Ġ'], b' ');
        assert_eq!(letters[&'Ċ'], b'\n');
        assert_eq!(letters[&'A'], b'A');
    }

    #[test]
    fn spelled_tokens() {
        let mut out = Vec::new();
        push_spelled("▁the", &mut out);
        push_spelled("<0x0A>", &mut out);
        push_spelled("<0xZZ>", &mut out);
        assert_eq!(out, b" the\n<0xZZ>");
    }

    #[test]
    fn added_token_outside_the_alphabet_is_itself() {
        let letters = byte_of_letter();
        let mut out = Vec::new();
        push_byte_level("<｜User｜>", &letters, &mut out);
        push_byte_level("Ġa", &letters, &mut out);
        assert_eq!(out, "<｜User｜> a".as_bytes());
    }
}

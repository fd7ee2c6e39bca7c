//! Which router has seen which prompt's beginning: an approximation of the routers' prefix caches, without tokens.
//!
//! A prompt is cut into blocks of bytes; each block's hash covers everything before it as well, so the set of
//! hashes is a prefix tree whose nodes find themselves. The table forgets what was not used for two of its
//! generations. It may believe in what a router has evicted: that costs a recomputation, nothing else.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, Hasher, RandomState};

use conclave_proto::v1;
use conclave_proto::v1::chat_message::Content;
use conclave_proto::v1::generate_request::Prompt;

/// About 64 tokens of text.
pub(super) const BLOCK_BYTES: usize = 256;
/// Bytes of a prompt that are looked at: beyond a megabyte two prompts that agree so far are one conversation.
const FINGERPRINT_BLOCKS_MAX: usize = 4096;
/// Blocks that one generation of the table holds: 32 MiB of distinct prompts.
const GENERATION_BLOCKS: usize = 128 << 10;
/// Routers are bits of a word.
pub(super) const ROUTERS_MAX: usize = 64;

/// A prompt's blocks.
pub(super) struct Fingerprint {
    hashes: Vec<u64>,
    /// All of the prompt, also what no block covers.
    pub(super) bytes: u64,
}

/// Makes fingerprints. Keyed at random, so that no client can find two prompts of one hash.
#[derive(Default)]
pub(super) struct Fingerprints(RandomState);

struct Chain<H> {
    hasher: H,
    hashes: Vec<u64>,
    in_block: usize,
    bytes: u64,
}

impl<H: Hasher> Chain<H> {
    fn push(&mut self, mut bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        while !bytes.is_empty() && self.hashes.len() < FINGERPRINT_BLOCKS_MAX {
            let (piece, rest) = bytes.split_at(bytes.len().min(BLOCK_BYTES - self.in_block));
            self.hasher.write(piece);
            self.in_block += piece.len();
            bytes = rest;
            if self.in_block == BLOCK_BYTES {
                self.in_block = 0;
                self.hashes.push(self.hasher.finish());
            }
        }
    }
}

impl Fingerprints {
    pub(super) fn of(&self, request: &v1::GenerateRequest) -> Fingerprint {
        let mut hasher = self.0.build_hasher();
        (&request.model, &request.cache_salt).hash(&mut hasher);
        let mut chain = Chain {
            hasher,
            hashes: Vec::new(),
            in_block: 0,
            bytes: 0,
        };
        match &request.prompt {
            None => {}
            Some(Prompt::Text(text)) => chain.push(text.as_bytes()),
            Some(Prompt::TokenIds(ids)) => ids.ids.iter().for_each(|id| chain.push(&id.to_le_bytes())),
            Some(Prompt::Chat(chat)) => push_chat(&mut chain, chat),
        }
        Fingerprint {
            hashes: chain.hashes,
            bytes: chain.bytes,
        }
    }
}

/// In the order of templates: tools first, then the messages.
fn push_chat<H: Hasher>(chain: &mut Chain<H>, chat: &v1::Chat) {
    for tool in &chat.tools {
        chain.push(tool.function_json.as_bytes());
    }
    for message in &chat.messages {
        chain.push(message.role.as_bytes());
        match &message.content {
            None => {}
            Some(Content::Text(text)) => chain.push(text.as_bytes()),
            Some(Content::Parts(parts)) => parts
                .parts
                .iter()
                .for_each(|part| chain.push(part.text.as_bytes())),
        }
        for call in &message.tool_calls {
            chain.push(call.name.as_bytes());
            chain.push(call.arguments_json.as_bytes());
        }
        chain.push(b"\0");
    }
}

/// Hash to the routers that were sent it, in two generations.
pub(super) struct PrefixTable {
    young: HashMap<u64, u64>,
    old: HashMap<u64, u64>,
    generation_blocks: usize,
}

impl Default for PrefixTable {
    fn default() -> Self {
        Self {
            young: HashMap::new(),
            old: HashMap::new(),
            generation_blocks: GENERATION_BLOCKS,
        }
    }
}

impl PrefixTable {
    /// Bytes of the prompt's beginning that each of `slots` was sent before.
    pub(super) fn matched(&self, fingerprint: &Fingerprint, slots: &[u8]) -> Vec<u64> {
        let mut matched = vec![0; slots.len()];
        let mut left = slots.iter().fold(0_u64, |left, slot| left | 1 << slot);
        for hash in &fingerprint.hashes {
            left &= self.seen(*hash);
            if left == 0 {
                break;
            }
            for (bytes, slot) in matched.iter_mut().zip(slots) {
                *bytes += if left >> slot & 1 == 1 {
                    BLOCK_BYTES as u64
                } else {
                    0
                };
            }
        }
        matched
    }

    /// Remembers that the router of `slot` is sent this prompt.
    pub(super) fn insert(&mut self, fingerprint: &Fingerprint, slot: u8) {
        for hash in &fingerprint.hashes {
            let seen = self.seen(*hash) | 1 << slot;
            if self.young.len() >= self.generation_blocks {
                self.old = std::mem::take(&mut self.young);
            }
            self.young.insert(*hash, seen);
        }
    }

    /// The router of `slot` is gone, or has lost its memory.
    pub(super) fn forget(&mut self, slot: u8) {
        for seen in self.young.values_mut().chain(self.old.values_mut()) {
            *seen &= !(1 << slot);
        }
    }

    fn seen(&self, hash: u64) -> u64 {
        let of = |map: &HashMap<u64, u64>| map.get(&hash).copied().unwrap_or(0);
        of(&self.young) | of(&self.old)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: String) -> v1::GenerateRequest {
        v1::GenerateRequest {
            prompt: Some(Prompt::Text(text)),
            ..Default::default()
        }
    }

    #[test]
    fn the_longest_common_beginning_is_found_per_router() {
        let prints = Fingerprints::default();
        let mut table = PrefixTable::default();
        let shared = "s".repeat(1024);
        table.insert(&prints.of(&text(format!("{shared}{}", "a".repeat(1024)))), 3);
        table.insert(&prints.of(&text(shared.clone())), 5);
        let wanted = prints.of(&text(format!("{shared}{}", "a".repeat(600))));
        assert_eq!(table.matched(&wanted, &[3, 4, 5]), [1024 + 512, 0, 1024]);
        let salted = v1::GenerateRequest {
            cache_salt: "other".into(),
            ..text(shared)
        };
        assert_eq!(table.matched(&prints.of(&salted), &[3, 5]), [0, 0]);
        table.forget(3);
        assert_eq!(table.matched(&wanted, &[3, 5]), [0, 1024]);
    }

    #[test]
    fn a_conversation_that_grows_keeps_its_beginning() {
        let prints = Fingerprints::default();
        let mut table = PrefixTable::default();
        let message = |role: &str, text: &str| v1::ChatMessage {
            role: role.into(),
            content: Some(Content::Text(text.repeat(300))),
            ..Default::default()
        };
        let chat = |messages: Vec<v1::ChatMessage>| v1::GenerateRequest {
            prompt: Some(Prompt::Chat(v1::Chat {
                messages,
                ..Default::default()
            })),
            ..Default::default()
        };
        let first = vec![message("system", "be brief"), message("user", "hi")];
        let print = prints.of(&chat(first.clone()));
        table.insert(&print, 0);
        let second = [
            first,
            vec![message("assistant", "hello"), message("user", "more")],
        ]
        .concat();
        let matched = table.matched(&prints.of(&chat(second)), &[0])[0];
        assert!(
            matched + BLOCK_BYTES as u64 > print.bytes,
            "{matched} of {}",
            print.bytes
        );
    }

    #[test]
    fn the_table_and_the_fingerprint_are_bounded() {
        let prints = Fingerprints::default();
        let long = prints.of(&text("x".repeat(3 << 20)));
        assert_eq!((long.hashes.len(), long.bytes), (FINGERPRINT_BLOCKS_MAX, 3 << 20));
        let mut table = PrefixTable {
            generation_blocks: 100,
            ..Default::default()
        };
        for at in 0..100 {
            table.insert(&prints.of(&text(at.to_string().repeat(2000))), 0);
            assert!(table.young.len() <= 100 && table.old.len() <= 100);
        }
    }
}

//! Remembers the tokens of long pieces of text.
//!
//! An agent sends its whole history with every turn. Between added tokens each message is encoded by itself, so
//! all but the newest pieces have been encoded before. Pieces are kept by the caller's salt: what one tenant sent
//! makes nobody else's request faster, so nobody learns of it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

/// Shorter pieces are encoded faster than looked up.
const MIN_BYTES: usize = 256;

/// Tokens by salt and text. Two generations: when the younger is full the older is forgotten, so that a piece used
/// again within that time stays.
pub struct PieceCache {
    max_bytes: usize,
    generations: Mutex<Generations>,
}

type Pieces = HashMap<(u64, Box<str>), Arc<[u32]>>;

#[derive(Default)]
struct Generations {
    young: Pieces,
    old: Pieces,
    young_bytes: usize,
}

impl PieceCache {
    /// At most about `max_bytes` of text and tokens are kept.
    pub fn new(max_bytes: usize) -> Self {
        Self {
            max_bytes,
            generations: Mutex::default(),
        }
    }

    /// The tokens of this text, from the cache or from `encode`.
    pub fn get<E>(
        &self,
        salt: u64,
        text: &str,
        encode: impl FnOnce() -> Result<Vec<u32>, E>,
    ) -> Result<Arc<[u32]>, E> {
        if text.len() < MIN_BYTES || text.len() > self.max_bytes / 8 {
            return encode().map(Into::into);
        }
        let key = (salt, Box::from(text));
        if let Some(ids) = self.find(&key) {
            return Ok(ids);
        }
        // Not under the lock: encoding is what takes the time.
        let ids: Arc<[u32]> = encode()?.into();
        self.lock().insert(key, ids.clone(), self.max_bytes);
        Ok(ids)
    }

    fn find(&self, key: &(u64, Box<str>)) -> Option<Arc<[u32]>> {
        let mut generations = self.lock();
        if let Some(ids) = generations.young.get(key) {
            return Some(ids.clone());
        }
        let (key, ids) = generations.old.remove_entry(key)?;
        generations.insert(key, ids.clone(), self.max_bytes);
        Some(ids)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Generations> {
        // A panic elsewhere leaves whole maps behind: nothing is half-changed between two calls.
        self.generations.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Generations {
    fn insert(&mut self, key: (u64, Box<str>), ids: Arc<[u32]>, max_bytes: usize) {
        let bytes = key.1.len() + size_of_val(&*ids);
        if self.young_bytes + bytes > max_bytes / 2 {
            self.old = std::mem::take(&mut self.young);
            self.young_bytes = 0;
        }
        if self.young.insert(key, ids).is_none() {
            self.young_bytes += bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    fn encode(cache: &PieceCache, salt: u64, text: &str) -> bool {
        let missed = Cell::new(false);
        let ids = cache.get(salt, text, || {
            missed.set(true);
            Ok::<_, ()>(vec![text.len() as u32])
        });
        assert_eq!(&*ids.unwrap(), [text.len() as u32]);
        !missed.get()
    }

    #[test]
    fn pieces_are_found_again_by_the_same_salt_only() {
        let cache = PieceCache::new(1 << 20);
        let text = "a".repeat(MIN_BYTES);
        assert!(!encode(&cache, 1, &text));
        assert!(encode(&cache, 1, &text));
        assert!(!encode(&cache, 2, &text));
        let short = "a".repeat(MIN_BYTES - 1);
        assert!(!encode(&cache, 1, &short));
        assert!(!encode(&cache, 1, &short));
    }

    #[test]
    fn size_is_bounded_and_what_is_used_stays() {
        const MAX: usize = 64 << 10;
        let cache = PieceCache::new(MAX);
        let text = |n: usize| format!("{n:0>width$}", width = MIN_BYTES * 2);
        encode(&cache, 0, &text(0));
        for n in 1..1000 {
            encode(&cache, 0, &text(n));
            assert!(encode(&cache, 0, &text(0)), "{n}");
            let generations = cache.lock();
            let maps = [&generations.young, &generations.old];
            let bytes: usize = maps
                .iter()
                .flat_map(|map| map.iter())
                .map(|(key, ids)| key.1.len() + ids.len() * 4)
                .sum();
            assert!(bytes <= MAX);
        }
        assert!(!encode(&cache, 0, &text(1)));
        let long = "x".repeat(MAX);
        assert!(!encode(&cache, 0, &long));
        assert!(!encode(&cache, 0, &long));
    }
}

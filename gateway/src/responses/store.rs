//! Responses that a later request may continue. Bounded in number, bytes and turns; the least recently used go
//! first; each is visible only to the key that made it.
//!
//! A turn points to the one before it, so that a long conversation is held once and not once per turn. Bytes are
//! counted as long as any turn holds them, also where the turn's own entry is gone.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use conclave_proto::v1::ChatMessage;
use prost::Message as _;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::config::Limits;
use crate::http::auth::Caller;

/// Turns in one conversation: each is a link of a chain that is walked, and dropped, link by link.
pub(super) const TURNS_MAX: usize = 1000;

pub(crate) struct Store {
    inner: Mutex<Inner>,
    /// Bytes of all turns that are alive.
    bytes: Arc<AtomicUsize>,
    entries_max: usize,
    bytes_max: usize,
}

#[derive(Default)]
struct Inner {
    entries: HashMap<String, Entry>,
    /// By last use.
    order: BTreeMap<u64, String>,
    clock: u64,
}

struct Entry {
    caller: Caller,
    turn: Arc<Turn>,
    json: Bytes,
    /// Each item of its `output`, a part of `json`.
    items: Vec<Bytes>,
    used: u64,
}

/// The items of a response object's `output`, found once, so that those who name one read no more than it.
fn items(json: &Bytes) -> Vec<Bytes> {
    #[derive(Deserialize)]
    struct Stored<'a> {
        #[serde(borrow)]
        output: Vec<&'a RawValue>,
    }

    match serde_json::from_slice::<Stored<'_>>(json) {
        Ok(stored) => stored
            .output
            .into_iter()
            .map(|item| json.slice_ref(item.get().as_bytes()))
            .collect(),
        Err(_) => Vec::new(),
    }
}

/// One request's input and its answer, after an earlier turn.
pub(super) struct Turn {
    earlier: Option<Arc<Turn>>,
    messages: Vec<ChatMessage>,
    turns: usize,
    bytes: usize,
    counter: Arc<AtomicUsize>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.counter.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Turn {
    pub(super) fn turns(&self) -> usize {
        self.turns
    }

    /// All messages of the conversation up to here, oldest first.
    pub(super) fn conversation(&self) -> Vec<ChatMessage> {
        let mut chain = vec![self];
        while let Some(earlier) = chain.last().and_then(|turn| turn.earlier.as_deref()) {
            chain.push(earlier);
        }
        chain
            .into_iter()
            .rev()
            .flat_map(|turn| turn.messages.iter().cloned())
            .collect()
    }
}

impl Store {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            inner: Mutex::default(),
            bytes: Arc::default(),
            entries_max: limits.responses_stored,
            bytes_max: limits.responses_stored_bytes,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a turn and its response object under the response's id.
    pub(super) fn put(
        &self,
        id: String,
        caller: Caller,
        earlier: Option<Arc<Turn>>,
        messages: Vec<ChatMessage>,
        json: Bytes,
    ) {
        let items = items(&json);
        let bytes = messages
            .iter()
            .map(|message| message.encoded_len())
            .sum::<usize>()
            + json.len()
            + items.len() * size_of::<Bytes>()
            + id.len();
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        let turns = earlier.as_ref().map_or(0, |turn| turn.turns) + 1;
        let turn = Arc::new(Turn {
            earlier,
            messages,
            turns,
            bytes,
            counter: self.bytes.clone(),
        });
        let mut inner = self.lock();
        let used = inner.tick();
        inner.order.insert(used, id.clone());
        if let Some(replaced) = inner.entries.insert(
            id,
            Entry {
                caller,
                turn,
                json,
                items,
                used,
            },
        ) {
            inner.order.remove(&replaced.used);
        }
        while inner.entries.len() > self.entries_max || self.bytes.load(Ordering::Relaxed) > self.bytes_max {
            let Some((_, oldest)) = inner.order.pop_first() else {
                break;
            };
            inner.entries.remove(&oldest);
        }
    }

    pub(super) fn turn(&self, id: &str, caller: Caller) -> Option<Arc<Turn>> {
        self.lock().touch(id, caller).map(|entry| entry.turn.clone())
    }

    pub(super) fn json(&self, id: &str, caller: Caller) -> Option<Bytes> {
        self.lock().touch(id, caller).map(|entry| entry.json.clone())
    }

    /// The JSON of the item at this place of a response's output.
    pub(super) fn item(&self, id: &str, at: usize, caller: Caller) -> Option<Bytes> {
        self.lock()
            .touch(id, caller)
            .and_then(|entry| entry.items.get(at).cloned())
    }

    /// Whether there was one.
    pub(super) fn remove(&self, id: &str, caller: Caller) -> bool {
        let mut inner = self.lock();
        let Some(used) = inner
            .entries
            .get(id)
            .filter(|entry| entry.caller == caller)
            .map(|entry| entry.used)
        else {
            return false;
        };
        inner.order.remove(&used);
        inner.entries.remove(id);
        true
    }
}

impl Inner {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn touch(&mut self, id: &str, caller: Caller) -> Option<&Entry> {
        let now = self.tick();
        let entry = self.entries.get_mut(id).filter(|entry| entry.caller == caller)?;
        self.order.remove(&entry.used);
        self.order.insert(now, id.to_owned());
        entry.used = now;
        Some(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: Caller = Caller::Anyone;

    fn store(entries: usize, bytes: usize) -> Store {
        Store::new(&Limits {
            responses_stored: entries,
            responses_stored_bytes: bytes,
            ..Limits::default()
        })
    }

    fn say(text: &str) -> Vec<ChatMessage> {
        vec![ChatMessage {
            role: text.into(),
            ..Default::default()
        }]
    }

    fn roles(turn: &Turn) -> Vec<String> {
        turn.conversation()
            .into_iter()
            .map(|message| message.role)
            .collect()
    }

    #[test]
    fn the_least_recently_used_go_first_and_chains_stay_whole() {
        let store = store(2, usize::MAX);
        store.put("a".into(), OPEN, None, say("1"), Bytes::new());
        let first = store.turn("a", OPEN);
        store.put("b".into(), OPEN, first, say("2"), Bytes::new());
        store.turn("a", OPEN).unwrap();
        store.put("c".into(), OPEN, store.turn("b", OPEN), say("3"), Bytes::new());
        assert!(store.turn("a", OPEN).is_none());
        assert_eq!(roles(&store.turn("c", OPEN).unwrap()), ["1", "2", "3"]);
        assert_eq!(store.turn("c", OPEN).unwrap().turns(), 3);
    }

    #[test]
    fn bytes_are_bounded_and_come_back() {
        let store = store(usize::MAX, 10_000);
        let mut earlier = None;
        for at in 0..1000 {
            store.put(
                at.to_string(),
                OPEN,
                earlier.take(),
                say(&"x".repeat(100)),
                Bytes::new(),
            );
            // One chain for all: its early turns must not be kept by the late ones for ever.
            earlier = store.turn(&at.to_string(), OPEN);
            assert!(store.bytes.load(Ordering::Relaxed) <= 10_000 + 200);
        }
        drop(earlier);
        let mut inner = store.lock();
        (inner.entries, inner.order) = Default::default();
        drop(inner);
        assert_eq!(store.bytes.load(Ordering::Relaxed), 0);
    }

    /// However many references a request has, none reads the response they name: its items are parts of it, found
    /// when it was stored.
    #[test]
    fn items_are_parts_of_the_response_that_was_stored() {
        let store = store(9, 9999);
        let json =
            Bytes::from_static(br#"{"tools":[{"output":[1]}],"output":[{"id":"a"}, {"id":"b"}],"x":2}"#);
        store.put("r".into(), OPEN, None, Vec::new(), json.clone());
        for (at, expected) in [(0, r#"{"id":"a"}"#), (1, r#"{"id":"b"}"#)] {
            let item = store.item("r", at, OPEN).unwrap();
            assert_eq!(item, expected);
            let place = json.as_ptr_range();
            assert!(place.contains(&item.as_ptr()) && place.contains(&item.as_ptr_range().end));
        }
        assert_eq!(store.item("r", 2, OPEN), None);
        assert_eq!(store.item("r", 0, Caller::Key([1; 32])), None);
        store.put("s".into(), OPEN, None, Vec::new(), Bytes::from_static(b"{}"));
        assert_eq!(store.item("s", 0, OPEN), None);
    }

    #[test]
    fn a_response_belongs_to_its_key() {
        let (one, other) = (Caller::Key([1; 32]), Caller::Key([2; 32]));
        let store = store(9, 9999);
        store.put("a".into(), one, None, say("1"), Bytes::from_static(b"{}"));
        assert!(
            store.turn("a", other).is_none() && store.json("a", OPEN).is_none() && !store.remove("a", other)
        );
        assert!(store.json("a", one).is_some() && store.remove("a", one) && !store.remove("a", one));
    }
}

//! Tokens of sequences that stay on the device between steps, for penalties: whose lie where in one area of memory.
//!
//! Pure: it says where tokens lie and which are to be sent, and takes for granted that they are. A step sends what came
//! since the last one; the token that it draws the kernel adds itself, before the host has seen it. Bounded by the area:
//! who was not used for the longest time goes first, and who finds no room is not kept.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};

use crate::backend::SAMPLED;

/// Words of the area: four million tokens.
pub(crate) const HISTORY_WORDS: usize = 4 << 20;
/// Parts begin and end at multiples of so many tokens.
const UNIT: usize = 1024;
/// Who was used in one of so many last steps keeps its place: its last token may be known to the device only.
const RECENT: u64 = 2;

/// What of a row's tokens is on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    /// Where `count` tokens lie.
    pub(super) from: u32,
    pub(super) count: u32,
    /// Where all of them shall lie, and the drawn one behind.
    pub(super) to: u32,
}

#[derive(Debug)]
struct Part {
    begin: u32,
    length: u32,
}

#[derive(Debug)]
struct Entry {
    part: Part,
    /// Tokens there; one more is behind them, which the device drew.
    count: usize,
    /// The last step that used it.
    used: u64,
}

#[derive(Debug)]
pub(crate) struct Histories {
    entries: HashMap<u64, Entry>,
    /// Lengths by where they begin; no two touch.
    free: BTreeMap<u32, u32>,
    /// What this step still reads and nobody needs after it.
    left: Vec<Part>,
    step: u64,
}

impl Histories {
    pub(crate) fn new(words: usize) -> Histories {
        Histories {
            entries: HashMap::new(),
            free: BTreeMap::from([(0, words as u32)]),
            left: Vec::new(),
            step: RECENT,
        }
    }

    pub(super) fn begin_step(&mut self) {
        self.step += 1;
        for part in std::mem::take(&mut self.left) {
            self.give_back(part);
        }
    }

    /// Nothing of this step was queued.
    pub(crate) fn forget_step(&mut self) {
        let step = self.step;
        let touched = self.entries.extract_if(|_, entry| entry.used == step);
        let parts: Vec<Part> = touched.map(|(_, entry)| entry.part).collect();
        for part in parts {
            self.give_back(part);
        }
    }

    /// Where a row's `tokens` are kept; those behind the first `Kept::count` are to be sent. `None`: nowhere.
    pub(super) fn place(&mut self, id: u64, tokens: &[u32]) -> Option<Kept> {
        let (step, length) = (self.step, tokens.len());
        let old = match self.entries.remove(&id) {
            // Two rows cannot both go on from there.
            Some(entry) if entry.used == step => {
                self.entries.insert(id, entry);
                return None;
            }
            old => old,
        };
        let drawn = tokens.last().is_some_and(|token| token & SAMPLED != 0);
        let count = match &old {
            Some(entry) if drawn && length == entry.count + 1 => length,
            Some(entry) if entry.count <= length => entry.count,
            _ => 0,
        };
        let from = old.as_ref().map_or(0, |entry| entry.part.begin);
        let part = match old.map(|entry| entry.part) {
            Some(part) if length < part.length as usize => part,
            part => {
                self.left.extend(part);
                self.take(2 * (length + 1))?
            }
        };
        let to = part.begin;
        let entry = Entry {
            part,
            count: length,
            used: step,
        };
        self.entries.insert(id, entry);
        Some(Kept {
            from,
            count: count as u32,
            to,
        })
    }

    /// A part of the area for so many tokens or more.
    fn take(&mut self, tokens: usize) -> Option<Part> {
        let length = u32::try_from(tokens.next_multiple_of(UNIT)).ok()?;
        loop {
            let found = self.free.iter().find(|(_, room)| **room >= length);
            if let Some((&begin, &room)) = found {
                self.free.remove(&begin);
                if room > length {
                    self.free.insert(begin + length, room - length);
                }
                return Some(Part { begin, length });
            }
            let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.used);
            let (&id, _) = oldest.filter(|(_, entry)| entry.used + RECENT <= self.step)?;
            let entry = self.entries.remove(&id)?;
            self.give_back(entry.part);
        }
    }

    fn give_back(&mut self, part: Part) {
        let Part {
            mut begin,
            mut length,
        } = part;
        if let Some(behind) = self.free.remove(&(begin + length)) {
            length += behind;
        }
        if let Some((&before, &room)) = self.free.range(..begin).next_back()
            && before + room == begin
        {
            (begin, length) = (before, room + length);
        }
        self.free.insert(begin, length);
    }
}

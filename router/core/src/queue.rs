//! The waiting queue: bounded, by priority, without starvation.
//!
//! A sequence's [`Turn`] never changes: it is the time it came, moved forward by [`AGING_US_PER_LEVEL`] for each level
//! of priority. That is linear aging: of two waiting sequences the one with the higher priority goes first, unless the
//! other has waited so much longer. Turns of later sequences only grow, so finitely many go before any given one: the
//! first in turn is admitted before all others (no later one passes it because it is smaller), and it is the last to
//! be preempted. Hence no starvation.
//!
//! Must stay true: at most `limit` sequences that were never admitted wait. Those that lost their place (preemption,
//! a failed epoch) come back whatever the limit is: they were counted when they were admitted.
//!
//! Keeps invariant S4 of ARCHITECTURE.md.

use std::collections::BTreeMap;

use crate::api::Micros;
use crate::limits::{AGING_US_PER_LEVEL, PRIORITY_LEVELS_MAX};
use crate::planted::{Bug, planted};
use crate::sequence::Key;

/// Place in the order of service: lower goes first and is preempted last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Turn {
    aged_us: i64,
    /// Order of submission.
    number: u64,
}

impl Turn {
    pub(crate) fn new(now: Micros, priority: i32, number: u64) -> Turn {
        let levels = priority.clamp(-PRIORITY_LEVELS_MAX, PRIORITY_LEVELS_MAX);
        let now = i64::try_from(now.0).unwrap_or(i64::MAX);
        Turn {
            aged_us: now.saturating_sub(i64::from(levels) * AGING_US_PER_LEVEL),
            number,
        }
    }
}

#[derive(Debug)]
pub(crate) struct Queue {
    limit: usize,
    waiting: BTreeMap<Turn, Waiting>,
    new: usize,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    key: Key,
    /// Never admitted.
    new: bool,
}

impl Queue {
    pub(crate) fn new(limit: usize) -> Queue {
        Queue {
            limit,
            waiting: BTreeMap::new(),
            new: 0,
        }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.new >= self.limit && !planted(Bug::UnboundedQueue)
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    pub(crate) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// How many of them were never admitted.
    pub(crate) fn new_len(&self) -> usize {
        self.new
    }

    /// Adds a new sequence. The caller has asked [`Queue::is_full`].
    pub(crate) fn push(&mut self, turn: Turn, key: Key) {
        assert!(!self.is_full(), "the caller rejects what does not fit");
        self.new += 1;
        self.insert(turn, Waiting { key, new: true });
    }

    /// Puts a sequence back that had been admitted.
    pub(crate) fn put_back(&mut self, turn: Turn, key: Key) {
        self.insert(turn, Waiting { key, new: false });
    }

    pub(crate) fn remove(&mut self, turn: Turn) -> Key {
        let waiting = self
            .waiting
            .remove(&turn)
            .expect("a waiting sequence is in the queue");
        self.new -= usize::from(waiting.new);
        waiting.key
    }

    /// The first `count` in turn.
    pub(crate) fn first(&self, count: usize) -> impl Iterator<Item = (Turn, Key)> + '_ {
        self.waiting
            .iter()
            .take(count)
            .map(|(&turn, waiting)| (turn, waiting.key))
    }

    fn insert(&mut self, turn: Turn, waiting: Waiting) {
        let before = self.waiting.insert(turn, waiting);
        assert!(before.is_none(), "two sequences have one turn");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(seconds: u64, priority: i32, number: u64) -> Turn {
        Turn::new(Micros(seconds * 1_000_000), priority, number)
    }

    #[test]
    fn higher_priority_first_then_first_come() {
        let mut turns = [turn(0, 0, 0), turn(0, 0, 1), turn(10, 1, 2), turn(1, -1, 3)];
        turns.sort();
        assert_eq!(turns.map(|turn| turn.number), [2, 0, 1, 3]);
    }

    #[test]
    fn thirty_seconds_of_waiting_outweigh_a_level() {
        assert!(turn(0, 0, 0) > turn(29, 1, 1));
        assert!(turn(0, 0, 0) < turn(31, 1, 1));
    }

    #[test]
    fn overtaking_ends_whatever_the_priorities() {
        let bound = 2 * PRIORITY_LEVELS_MAX as u64 * AGING_US_PER_LEVEL as u64 / 1_000_000;
        assert!(turn(0, i32::MIN, 0) > turn(bound - 1, i32::MAX, 1));
        assert!(turn(0, i32::MIN, 0) < turn(bound + 1, i32::MAX, 1));
    }

    #[test]
    fn is_full_at_its_limit_of_new_ones() {
        let mut queue = Queue::new(2);
        queue.put_back(turn(0, 0, 0), Key(0));
        queue.push(turn(0, 0, 1), Key(1));
        assert!(!queue.is_full());
        queue.push(turn(0, 0, 2), Key(2));
        assert!(queue.is_full());
        assert_eq!(queue.remove(turn(0, 0, 1)), Key(1));
        assert!(!queue.is_full());
        assert_eq!((queue.len(), queue.new_len()), (2, 1));
    }
}

//! One worker within an epoch: its slots, what runs there, how loaded it is, and the changes it has yet to be told.
//! What outlives an epoch (its pages, its suspicions) is in [`Attached`].

use crate::api::{Micros, Slot, StepPlan, WorkerId, WorkerInfo};
use crate::queue::Turn;
use crate::radix::PoolId;
use crate::sequence::Key;

/// A worker that is attached, in the epoch or not.
#[derive(Debug)]
pub(crate) struct Attached {
    pub(crate) info: WorkerInfo,
    pub(crate) pool: PoolId,
    /// It will be gone by then.
    pub(crate) leaving: Option<Micros>,
    /// Index in `Core::members`, and rank.
    pub(crate) member: Option<usize>,
    /// Its rank in the latest epoch it was in.
    pub(crate) last_rank: Option<u32>,
    /// Experts of the latest placement it loaded.
    pub(crate) experts: Vec<u32>,
    /// Epochs it has broken.
    pub(crate) suspicions: u32,
    pub(crate) busy_us: u64,
    pub(crate) idle_us: u64,
}

#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) worker: WorkerId,
    pub(crate) pool: PoolId,
    /// Tokens per step.
    pub(crate) tokens_max: u32,
    /// In turn: the first is served first, the last preempted first.
    pub(crate) running: Vec<(Turn, Key)>,
    pub(crate) slots: Slots,
    /// Changes for the next step, filled between steps.
    pub(crate) pending: StepPlan,
    /// Work given to it and not yet sent, in prompt tokens.
    pub(crate) load: u64,
    /// Steps of this epoch that have come back from it.
    pub(crate) done: u64,
}

impl Member {
    pub(crate) fn add(&mut self, turn: Turn, key: Key) {
        let at = self.running.partition_point(|&(other, _)| other < turn);
        self.running.insert(at, (turn, key));
    }

    pub(crate) fn remove(&mut self, turn: Turn) {
        let at = self.running.binary_search_by_key(&turn, |&(other, _)| other);
        self.running
            .remove(at.expect("a running sequence is in its member's list"));
    }
}

/// Slots of a worker, each free or taken by one sequence.
#[derive(Debug)]
pub(crate) struct Slots {
    max: u32,
    taken: Vec<bool>,
    free: Vec<Slot>,
}

impl Slots {
    pub(crate) fn new(max: u32) -> Slots {
        Slots {
            max,
            taken: Vec::new(),
            free: Vec::new(),
        }
    }

    pub(crate) fn max(&self) -> u32 {
        self.max
    }

    pub(crate) fn any_free(&self) -> bool {
        !self.free.is_empty() || (self.taken.len() as u32) < self.max
    }

    pub(crate) fn take(&mut self) -> Option<Slot> {
        if let Some(slot) = self.free.pop() {
            self.taken[slot.0 as usize] = true;
            return Some(slot);
        }
        let next = self.taken.len() as u32;
        (next < self.max).then(|| {
            self.taken.push(true);
            Slot(next)
        })
    }

    pub(crate) fn give_back(&mut self, slot: Slot) {
        let taken = &mut self.taken[slot.0 as usize];
        assert!(*taken, "slot {} is given back twice", slot.0);
        *taken = false;
        self.free.push(slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_end_at_their_limit_and_are_used_again() {
        let mut slots = Slots::new(2);
        let taken = [slots.take(), slots.take(), slots.take()];
        assert_eq!(taken, [Some(Slot(0)), Some(Slot(1)), None]);
        assert!(!slots.any_free());
        slots.give_back(Slot(0));
        assert_eq!(slots.take(), Some(Slot(0)));
    }

    #[test]
    #[should_panic(expected = "given back twice")]
    fn a_slot_is_given_back_once() {
        let mut slots = Slots::new(1);
        let slot = slots.take().unwrap();
        slots.give_back(slot);
        slots.give_back(slot);
    }
}

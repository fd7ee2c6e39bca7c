//! Clients' side: submitting, ending, masks, draining; and the ways a sequence leaves the core or its worker.
//!
//! Keeps invariant S4 of ARCHITECTURE.md.

use std::sync::Arc;

use crate::api::{Command, EndReason, FinishReason, Rejection, SequenceId, Submit};
use crate::cache::Lease;
use crate::planted::{Bug, planted};
use crate::queue::Turn;
use crate::radix::{PoolId, Salt};
use crate::sequence::{Key, Sequence, State};
use crate::sequencer::{Core, Draining};

impl Core {
    pub(crate) fn submit(&mut self, submit: Submit) {
        if let Err(error) = self.check(&submit) {
            self.counters.rejections += 1;
            self.out.push(Command::Reject { id: submit.id, error });
            return;
        }
        let salt = match self.config.enable_prefix_cache {
            true => Salt::Shared(submit.cache_salt),
            false => Salt::Private(submit.id),
        };
        self.submissions += 1;
        let turn = Turn::new(self.now, submit.priority, self.submissions);
        let sequence = Sequence::new(submit, turn, salt);
        let ended = match sequence.stopped_by() {
            _ if sequence.prompt_tokens == 0 => Some(FinishReason::Error("the prompt is empty".into())),
            _ if sequence.max_new_tokens == 0 => Some(FinishReason::Error("max_new_tokens is 0".into())),
            Some(token) => Some(FinishReason::Stop(Some(token))),
            None => (sequence.generated() >= sequence.max_new_tokens).then_some(FinishReason::Length),
        };
        if let Some(reason) = ended {
            let usage = sequence.usage();
            self.out.push(Command::Finish {
                id: sequence.id,
                reason,
                usage,
            });
            return;
        }
        let key = self.sequences.insert(sequence);
        self.queue.push(turn, key);
    }

    fn check(&self, submit: &Submit) -> Result<(), Rejection> {
        if self.draining != Draining::No {
            return Err(Rejection::Draining);
        }
        let tokens = submit.prompt.len() as u64 + u64::from(submit.max_new_tokens);
        let limit = self.tokens_max();
        if tokens > limit {
            return Err(Rejection::TooLong { tokens, limit });
        }
        if self.queue.is_full() {
            return Err(Rejection::QueueFull {
                limit: self.queue.limit(),
                retry_after_ms: self.rate.retry_after_ms(self.queue.len()),
            });
        }
        Ok(())
    }

    /// Prompt and new tokens of the longest sequence that some worker can hold: the last token needs no page.
    fn tokens_max(&self) -> u64 {
        let pages = self
            .attached
            .values()
            .map(|attached| attached.info.kv_pages)
            .max();
        let fits = pages.map(|pages| u64::from(pages) * u64::from(self.config.page_tokens) + 1);
        u64::from(self.config.max_model_len).min(fits.unwrap_or(u64::MAX))
    }

    pub(crate) fn end(&mut self, id: SequenceId, reason: EndReason) {
        // One that has ended by itself is not an error: the two messages crossed.
        let Some(key) = self.sequences.find(id) else {
            return;
        };
        let reason = match reason {
            EndReason::Stop => FinishReason::Stop(None),
            EndReason::Cancelled => FinishReason::Cancelled,
        };
        self.finish(key, reason);
    }

    pub(crate) fn mask(&mut self, id: SequenceId, position: u32, mask: Arc<[u8]>) {
        let Some(key) = self.sequences.find(id) else {
            return;
        };
        let sequence = &mut self.sequences[key];
        if sequence.masked && position == sequence.len() && sequence.in_flight == 0 {
            sequence.mask = Some(mask);
        }
    }

    pub(crate) fn drain(&mut self) {
        if self.draining == Draining::No {
            self.draining = Draining::Asked;
        }
    }

    /// Ends a sequence, wherever it stands.
    pub(crate) fn finish(&mut self, key: Key, reason: FinishReason) {
        match self.sequences[key].state {
            State::Waiting { .. } => {
                let removed = self.queue.remove(self.sequences[key].turn);
                assert_eq!(removed, key, "a turn belongs to one sequence");
            }
            State::Running(_) if planted(Bug::LeakOnEnd) => {
                let turn = self.sequences[key].turn;
                let member = self.sequences[key].running().map_or(0, |running| running.member);
                self.members[member].remove(turn);
            }
            State::Running(_) => {
                // Nobody looks for private pages again, and what a failed slot left behind is not to be trusted.
                let forget = matches!(reason, FinishReason::Error(_))
                    || matches!(self.sequences[key].salt, Salt::Private(_));
                let (lease, pool) = self.leave_slot(key);
                let path = if forget { lease.path.clone() } else { Vec::new() };
                self.cache.release(lease, pool);
                self.cache.forget(&path, pool);
            }
        }
        let sequence = self.sequences.remove(key);
        self.rate.ended(self.now);
        self.counters.finished += 1;
        self.out.push(Command::Finish {
            id: sequence.id,
            reason,
            usage: sequence.usage(),
        });
    }

    /// Takes a running sequence off its worker and back into the queue; its full pages stay in the tree.
    pub(crate) fn requeue(&mut self, key: Key) {
        let (lease, pool) = self.leave_slot(key);
        self.cache.release(lease, pool);
        self.queue.put_back(self.sequences[key].turn, key);
    }

    /// Frees the slot of a running sequence, which waits from now on, and hands out what it holds.
    fn leave_slot(&mut self, key: Key) -> (Lease, PoolId) {
        let sequence = &mut self.sequences[key];
        let waiting = State::Waiting { for_prefix_of: None };
        let State::Running(running) = std::mem::replace(&mut sequence.state, waiting) else {
            unreachable!("only running sequences have a slot");
        };
        let member = &mut self.members[running.member];
        member.remove(sequence.turn);
        member.slots.give_back(running.slot);
        let load = running.load + running.prefill_left;
        assert!(
            member.load >= load,
            "a worker's load is the sum over its sequences"
        );
        member.load -= load;
        let pending = &mut member.pending;
        let unsent = pending.start.iter().position(|start| start.slot == running.slot);
        match unsent {
            Some(start) => drop(pending.start.remove(start)),
            None if planted(Bug::ForgetEnd) => {}
            None => pending.end.push(running.slot),
        }
        (running.lease, member.pool)
    }
}

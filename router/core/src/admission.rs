//! From the queue to a worker.
//!
//! The first in turn is placed on the worker with the best score = prompt tokens it need not compute there - load of
//! the worker. The load counts work from the moment of admission, so that a hot prefix does not pull everything to one
//! worker; prompt tokens that another sequence is about to compute there count as matched and not as load. A sequence
//! whose prefix is in the making waits for it, passed by others, instead of computing it a second time.
//!
//! Must stay true: if the first in turn has no room anywhere, nobody behind it is admitted (see `queue`).

use std::cmp::Reverse;

use crate::api::{FinishReason, Sampling, SequenceId, SlotStart};
use crate::cache::Match;
use crate::limits::{
    ADMISSION_SCAN_MAX, CONTEXT_LOAD_DIVISOR, HEADROOM_PAGES_PER_SEQUENCE, SEQUENCE_LOAD_TOKENS,
};
use crate::planted::{Bug, planted};
use crate::queue::Turn;
use crate::schedule::Budget;
use crate::sequence::{Key, Running, Sequence, State};
use crate::sequencer::{Core, RunInFlight};

/// What becomes of a waiting sequence now.
enum Place {
    On(usize),
    /// Wait for this sequence to compute the common prefix.
    Behind(SequenceId),
    /// No room yet.
    Nowhere,
    /// No worker of this epoch will ever have the pages.
    Never,
}

impl Core {
    /// Admits waiting sequences to step `serial`, in turn; their first chunks go into the same step.
    pub(crate) fn admit(&mut self, serial: u64, budgets: &mut [Budget], ran: &mut [Vec<RunInFlight>]) {
        if self.queue.len() == 0 || !self.members.iter().any(|member| member.slots.any_free()) {
            return;
        }
        let first: Vec<(Turn, Key)> = self.queue.first(ADMISSION_SCAN_MAX).collect();
        for (turn, key) in first {
            if self.waits_for_prefix(key) {
                continue;
            }
            // Its tokens are not all known before the steps are back that ran it before it was preempted.
            if self.sequences[key].in_flight > 0 && !planted(Bug::ReadmitTooEarly) {
                return;
            }
            match self.place(key) {
                Place::On(member) => {
                    self.queue.remove(turn);
                    self.start(key, member, serial);
                    self.prefill(member, key, serial, &mut budgets[member], &mut ran[member]);
                }
                Place::Behind(filler) => {
                    self.sequences[key].state = State::Waiting {
                        for_prefix_of: Some(filler),
                    };
                }
                Place::Nowhere => return,
                Place::Never => {
                    let pages = self.pages_for(self.sequences[key].positions_max());
                    let reason =
                        format!("it needs {pages} KV pages, more than any worker of the group still has");
                    self.finish(key, FinishReason::Error(reason));
                }
            }
        }
    }

    fn waits_for_prefix(&self, key: Key) -> bool {
        let State::Waiting {
            for_prefix_of: Some(filler),
        } = self.sequences[key].state
        else {
            return false;
        };
        self.sequences
            .find(filler)
            .is_some_and(|filler| self.sequences[filler].is_filling())
    }

    fn place(&mut self, key: Key) -> Place {
        let sequence = &self.sequences[key];
        let page_tokens = self.config.page_tokens;
        let pages = sequence.cacheable_tokens() / page_tokens;
        let mut lookup = std::mem::take(&mut self.lookup);
        self.cache
            .look_up(sequence.salt, &sequence.tokens, pages, &mut lookup);
        let pages_max = self.pages_for(sequence.positions_max());
        let fits_ever =
            |member: &usize| u64::from(self.cache.pool(self.members[*member].pool).total()) >= pages_max;
        let able: Vec<usize> = (0..self.members.len()).filter(fits_ever).collect();
        let with_room = able.iter().copied().filter(|&member| {
            let found = lookup.on(self.members[member].pool);
            self.members[member].slots.any_free() && self.has_pages(member, sequence, found)
        });
        let best = with_room.max_by_key(|&member| {
            let at = &self.members[member];
            let found = lookup.on(at.pool);
            let in_the_making = u64::from(found.coming - found.filled) * u64::from(page_tokens);
            let matched = u64::from(found.coming) * u64::from(page_tokens);
            let score = matched as i64 - at.load.saturating_sub(in_the_making) as i64;
            (
                score,
                Reverse(at.load),
                Reverse(at.running.len()),
                Reverse(member),
            )
        });
        let place = match best {
            Some(member) => {
                let found = lookup.on(self.members[member].pool);
                let filler = found.filler.filter(|_| found.coming > found.filled);
                filler.map_or(Place::On(member), Place::Behind)
            }
            None if able.is_empty() && !self.will_fit(pages_max) => Place::Never,
            None => Place::Nowhere,
        };
        self.lookup = lookup;
        place
    }

    /// A worker of the next epoch has so many pages.
    fn will_fit(&self, pages: u64) -> bool {
        let chosen = self.chosen();
        chosen
            .iter()
            .any(|worker| u64::from(self.attached[worker].info.kv_pages) >= pages)
    }

    /// There are pages for all known tokens of `sequence`, and some to spare for those that run there.
    fn has_pages(&self, member: usize, sequence: &Sequence, found: Match) -> bool {
        let at = &self.members[member];
        let new = self.pages_for(u64::from(sequence.len())) - u64::from(found.coming);
        let headroom = at.running.len() as u64 * HEADROOM_PAGES_PER_SEQUENCE;
        let available = self.cache.available(at.pool) - found.unreferenced;
        new + headroom <= u64::from(available)
    }

    /// Gives a sequence a slot, and pages for all its known tokens. `self.lookup` is about this sequence.
    fn start(&mut self, key: Key, index: usize, serial: u64) {
        let page_tokens = self.config.page_tokens as usize;
        let sequence = &mut self.sequences[key];
        let member = &mut self.members[index];
        let slot = member.slots.take().expect("the place has a free slot");
        let (mut lease, mut pages, newest) = self.cache.lease(&self.lookup, member.pool);
        let filled = pages.len();
        let cached = (filled * page_tokens) as u32;
        let announced = (sequence.len() as usize - 1) / page_tokens;
        for number in filled..sequence.tokens.len().div_ceil(page_tokens) {
            let page = self
                .cache
                .allocate(member.pool)
                .expect("the place has enough pages");
            pages.push(page.id());
            let tokens =
                (number < announced).then(|| &sequence.tokens[number * page_tokens..][..page_tokens]);
            let coming = tokens.map(|tokens| (sequence.salt, tokens, sequence.id));
            self.cache.append(&mut lease, page, member.pool, coming);
        }
        self.counters.prefix_queries += u64::from(sequence.len());
        self.counters.prefix_hits += u64::from(cached);
        sequence
            .cached_tokens
            .get_or_insert(cached.min(sequence.prompt_tokens));
        let load = SEQUENCE_LOAD_TOKENS + u64::from(sequence.len()) / CONTEXT_LOAD_DIVISOR;
        let prefill_left = u64::from(sequence.len() - cached);
        member.load += load + prefill_left;
        let history = if needs_history(&sequence.sampling) {
            cached as usize
        } else {
            0
        };
        member.pending.start.push(SlotStart {
            slot,
            id: sequence.id,
            sampling: sequence.sampling.clone(),
            stop_tokens: sequence.stop_tokens.clone(),
            suppress_until: sequence.prompt_tokens.saturating_add(sequence.min_new_tokens),
            cached_tokens: cached,
            pages,
            prompt_tokens: sequence.prompt_tokens,
            history: sequence.tokens[..history].to_vec(),
        });
        let after_newest = newest.map_or(0, |newest| newest + 1);
        sequence.state = State::Running(Running {
            member: index,
            slot,
            lease,
            sent: cached,
            decoding: false,
            ready: if planted(Bug::ShareWithinStep) {
                serial
            } else {
                after_newest
            },
            last_step: serial,
            load,
            prefill_left,
            shared: filled as u32,
        });
        member.add(sequence.turn, key);
    }
}

/// Sampling depends on earlier tokens, which the worker would not see if they come from the cache.
fn needs_history(sampling: &Sampling) -> bool {
    sampling.repetition_penalty != 1.0
        || sampling.presence_penalty != 0.0
        || sampling.frequency_penalty != 0.0
        || !sampling.bad_words.is_empty()
}

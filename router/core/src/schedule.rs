//! The next step: who runs, on which tokens, with which pages.
//!
//! On each worker, within its token budget: first one token for every decoding sequence, in turn; then chunks of the
//! prompts that are being computed, in turn; then newly admitted sequences. When a page is missing, the last in turn is
//! preempted. It has no run in the step yet, because runs are given out in turn.
//!
//! Must stay true: what is known ahead is not run (length limits, a missing mask); every rank of the epoch gets every
//! step; no step is sent when nothing runs anywhere. Changes that wait for a step (slots to start and end) are kept in
//! `Member::pending` until one is sent.
//!
//! Keeps invariant S1 of ARCHITECTURE.md.

use crate::api::{Command, Micros, PageId, Run, RunInput, StepId, StepPlan};
use crate::limits::PROMPT_LOGPROBS_PER_STEP_MAX;
use crate::pages::Page;
use crate::planted::{Bug, planted};
use crate::queue::Turn;
use crate::sequence::{Key, State};
use crate::sequencer::{Core, RunInFlight, StepInFlight};

/// What one worker may still do in a step.
#[derive(Clone, Copy)]
pub(crate) struct Budget {
    pub(crate) tokens: u32,
    /// Tokens of those with log-probabilities of the prompt.
    pub(crate) prompt_logprobs: u32,
}

impl Core {
    /// Plans and sends one step; false if there is nothing to run.
    pub(crate) fn send_step(&mut self) -> bool {
        let serial = self.next_serial;
        let mut budgets: Vec<Budget> = self
            .members
            .iter()
            .map(|member| Budget {
                tokens: member.tokens_max,
                prompt_logprobs: PROMPT_LOGPROBS_PER_STEP_MAX,
            })
            .collect();
        let with_room = |count: usize| Vec::with_capacity(count);
        let mut ran: Vec<Vec<RunInFlight>> = self
            .members
            .iter()
            .map(|member| with_room(member.running.len()))
            .collect();
        for member in 0..self.members.len() {
            self.decode(member, serial, &mut budgets[member], &mut ran[member]);
            self.prefill_running(member, serial, &mut budgets[member], &mut ran[member]);
        }
        self.admit(serial, &mut budgets, &mut ran);
        if ran.iter().all(Vec::is_empty) {
            return false;
        }
        let step = StepId(serial - self.first_serial);
        let tokens = self.members.iter().map(|member| member.pending.tokens());
        let group_tokens = tokens.max().unwrap_or(0);
        let deadline = self.step_times.deadline_of(group_tokens);
        let is_longer = deadline > self.deadline;
        for member in &mut self.members {
            let plan = StepPlan {
                epoch: self.epoch,
                step,
                group_tokens,
                collective_deadline: if is_longer { deadline } else { Micros(0) },
                ..std::mem::take(&mut member.pending)
            };
            self.out.push(Command::Step {
                worker: member.worker,
                plan,
            });
        }
        self.in_flight.push_back(StepInFlight {
            serial,
            since: self.now,
            tokens: group_tokens,
            stall: self
                .step_times
                .stall_of(group_tokens, deadline.max(self.deadline)),
            runs: ran,
            reported: 0,
        });
        self.next_serial += 1;
        true
    }

    fn decode(&mut self, member: usize, serial: u64, budget: &mut Budget, ran: &mut Vec<RunInFlight>) {
        let mut index = 0;
        while budget.tokens > 0 && index < self.members[member].running.len() {
            let (turn, key) = self.members[member].running[index];
            index += 1;
            let sequence = &self.sequences[key];
            let State::Running(running) = &sequence.state else {
                unreachable!("the member's list holds running sequences");
            };
            if !running.decoding || sequence.is_exhausted() || !sequence.may_sample() {
                continue;
            }
            let full = running.sent as usize == running.lease.table.len() * self.config.page_tokens as usize;
            if full && !planted(Bug::MissPageBoundary) {
                let Some(page) = self.page_for(member, turn) else {
                    return;
                };
                self.add_page(key, page);
            }
            self.decode_one(member, key, serial, ran);
            budget.tokens -= 1;
        }
    }

    fn decode_one(&mut self, member: usize, key: Key, serial: u64, ran: &mut Vec<RunInFlight>) {
        let sequence = &mut self.sequences[key];
        let mask = sequence.mask.clone();
        let State::Running(running) = &mut sequence.state else {
            unreachable!("decode looks at running sequences");
        };
        let position = running.sent;
        assert_eq!(
            position + 1,
            sequence.tokens.len() as u32 + sequence.in_flight,
            "the token to run is the one sampled last"
        );
        running.sent += 1;
        running.last_step = serial;
        sequence.in_flight += 1;
        ran.push(RunInFlight {
            slot: running.slot,
            key,
            id: sequence.id,
            sample: true,
            end: running.sent,
        });
        self.members[member].pending.runs.push(Run {
            slot: running.slot,
            position,
            input: RunInput::LastSampled,
            sample: true,
            prompt_logprobs: None,
            next_prompt_token: None,
            mask,
        });
    }

    /// A page for the running sequence with this turn, taken from those behind it if need be; `None` if it was itself
    /// the last in turn, and is preempted.
    fn page_for(&mut self, member: usize, turn: Turn) -> Option<Page> {
        loop {
            if let Some(page) = self.cache.allocate(self.members[member].pool) {
                return Some(page);
            }
            let &(last, victim) = self.members[member].running.last()?;
            assert!(last >= turn, "who asks is in the list");
            self.counters.preemptions += 1;
            self.requeue(victim);
            if last == turn {
                return None;
            }
        }
    }

    fn add_page(&mut self, key: Key, page: Page) {
        let State::Running(running) = &mut self.sequences[key].state else {
            unreachable!("pages go to running sequences");
        };
        let member = &mut self.members[running.member];
        let id: PageId = page.id();
        member.pending.pages.push((running.slot, vec![id]));
        self.cache.append(&mut running.lease, page, member.pool, None);
    }

    fn prefill_running(
        &mut self,
        member: usize,
        serial: u64,
        budget: &mut Budget,
        ran: &mut Vec<RunInFlight>,
    ) {
        for index in 0..self.members[member].running.len() {
            let (_, key) = self.members[member].running[index];
            self.prefill(member, key, serial, budget, ran);
        }
    }

    /// Adds the next chunk of a sequence's known tokens to the step, as far as the budget goes.
    pub(crate) fn prefill(
        &mut self,
        member: usize,
        key: Key,
        serial: u64,
        budget: &mut Budget,
        ran: &mut Vec<RunInFlight>,
    ) {
        let sequence = &mut self.sequences[key];
        let known = sequence.len();
        let may_sample = sequence.may_sample();
        let wants_logprobs = sequence.wants_prompt_logprobs();
        let State::Running(running) = &mut sequence.state else {
            unreachable!("chunks are of running sequences");
        };
        if running.decoding || running.ready > serial {
            return;
        }
        let start = running.sent;
        // The last known token is computed together with the sample.
        let mut end = if may_sample { known } else { known - 1 };
        if wants_logprobs && start < sequence.prompt_tokens {
            end = end.min(sequence.prompt_tokens);
        }
        end = end.min(start.saturating_add(budget.tokens));
        let prompt_logprobs = sequence
            .prompt_logprobs
            .filter(|_| wants_logprobs && start < sequence.prompt_tokens);
        if prompt_logprobs.is_some() {
            end = end.min(start.saturating_add(budget.prompt_logprobs));
        }
        if end <= start {
            return;
        }
        let sample = end == known;
        let next = prompt_logprobs
            .filter(|_| end < sequence.prompt_tokens)
            .map(|_| sequence.tokens[end as usize]);
        budget.tokens -= end - start;
        if prompt_logprobs.is_some() {
            budget.prompt_logprobs -= end - start;
        }
        running.sent = end;
        running.last_step = serial;
        running.decoding = sample;
        running.prefill_left -= u64::from(end - start);
        self.members[member].load -= u64::from(end - start);
        sequence.in_flight += u32::from(sample);
        ran.push(RunInFlight {
            slot: running.slot,
            key,
            id: sequence.id,
            sample,
            end,
        });
        self.members[member].pending.runs.push(Run {
            slot: running.slot,
            position: start,
            input: RunInput::Tokens(sequence.tokens[start as usize..end as usize].to_vec()),
            sample,
            prompt_logprobs,
            next_prompt_token: next,
            mask: sequence.mask.clone().filter(|_| sample),
        });
        self.counters.prompt_tokens += u64::from(end - start);
        self.share_filled(key);
    }
}

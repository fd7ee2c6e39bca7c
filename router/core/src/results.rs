//! What steps bring back: tokens, each delivered once and in order, and proof that pages were filled.
//!
//! A rank's result is applied when it arrives, whether or not the other ranks have reported: it stands by itself, even
//! if the step fails elsewhere. The step is complete, and makes room for the next, when all ranks have reported. Results
//! of another epoch, results that came before, and samples of sequences that have ended are dropped. A worker that
//! answers anything else than what it was asked is dismissed.
//!
//! Keeps invariants S2 and S5 of ARCHITECTURE.md.

use crate::api::{
    Command, Delivered, Epoch, FinishReason, PromptLogprobs, Sample, SampleError, SequenceId, StepId,
    StepResult, WorkerId,
};
use crate::limits::SUSPICION_CLEARED_STEPS;
use crate::planted::{Bug, planted};
use crate::sequence::{Key, State};
use crate::sequencer::{Core, Phase, RunInFlight};

impl Core {
    pub(crate) fn step_done(&mut self, worker: WorkerId, epoch: Epoch, step: StepId, result: StepResult) {
        let current = epoch == self.epoch || planted(Bug::AcceptStaleEpoch);
        if !current || !matches!(self.phase, Phase::Serving { .. }) {
            return;
        }
        let Some(attached) = self.attached.get_mut(&worker) else {
            return;
        };
        let Some(rank) = attached.member else { return };
        let expected = self.members[rank].done;
        if step.0 < expected {
            return;
        }
        attached.busy_us = attached.busy_us.saturating_add(result.busy_us);
        attached.idle_us = attached.idle_us.saturating_add(result.idle_us);
        let oldest = self
            .in_flight
            .front()
            .map_or(self.next_serial, |front| front.serial);
        let serial = self.first_serial + expected;
        let due = self.in_flight.get_mut((serial - oldest) as usize);
        let Some(answered) = due.filter(|_| step.0 == expected) else {
            self.breach(
                worker,
                format!("it answered step {} when step {expected} was next", step.0),
            );
            return;
        };
        let runs = std::mem::take(&mut answered.runs[rank]);
        answered.reported += 1;
        if let Err(problem) = check(&runs, &result.samples) {
            self.breach(worker, format!("its result of step {} {problem}", step.0));
            return;
        }
        self.members[rank].done += 1;
        self.cache.prove(self.members[rank].pool, serial + 1);
        for entry in result.prompt_logprobs {
            self.deliver_prompt_logprobs(&runs, entry);
        }
        let mut at = 0;
        for sample in result.samples {
            at = find(&runs, at, &sample).expect("checked above");
            self.take_sample(runs[at], sample);
        }
        self.complete_steps();
    }

    /// Retires the steps that all ranks have reported.
    fn complete_steps(&mut self) {
        while self
            .in_flight
            .front()
            .is_some_and(|front| front.reported == self.members.len())
        {
            let Some(done) = self.in_flight.pop_front() else {
                return;
            };
            self.step_times.add(self.now.0 - done.since.0, done.tokens);
            if let Some(next) = self.in_flight.front_mut() {
                next.since = self.now;
            }
            self.counters.steps += 1;
            if done.serial - self.first_serial + 1 == SUSPICION_CLEARED_STEPS {
                for attached in self.attached.values_mut() {
                    attached.suspicions = 0;
                }
            }
        }
    }

    fn take_sample(&mut self, run: RunInFlight, sample: Sample) {
        if self.sequences.get(run.key, run.id).is_none() {
            return;
        }
        if let Some(error) = sample.error {
            let reason = match error {
                SampleError::Failed(error) => FinishReason::Error(error),
                SampleError::Unsatisfiable(error) => FinishReason::Unsatisfiable(error),
            };
            self.finish(run.key, reason);
            return;
        }
        let sequence = &mut self.sequences[run.key];
        assert!(sequence.in_flight > 0, "a sample was expected");
        assert_eq!(
            run.end,
            sequence.len(),
            "each position is delivered once, in order"
        );
        sequence.in_flight -= 1;
        sequence.mask = None;
        sequence.tokens.push(sample.token);
        self.counters.generated_tokens += 1;
        let delivered = Delivered {
            token: sample.token,
            logprobs: sample.logprobs,
        };
        self.out.push(Command::Deliver {
            id: run.id,
            tokens: vec![delivered],
        });
        self.after_token(run.key, run.id);
    }

    fn after_token(&mut self, key: Key, id: SequenceId) {
        self.share_filled(key);
        let sequence = &self.sequences[key];
        assert_eq!(sequence.id, id, "sharing pages ends no sequence");
        let stop = sequence.stopped_by().filter(|_| !planted(Bug::OverlookStopToken));
        if let Some(token) = stop {
            self.finish(key, FinishReason::Stop(Some(token)));
        } else if sequence.generated() >= sequence.max_new_tokens {
            self.finish(key, FinishReason::Length);
        }
    }

    /// Makes the pages of a running sequence shareable whose tokens are known and whose step is sent.
    pub(crate) fn share_filled(&mut self, key: Key) {
        let sequence = &mut self.sequences[key];
        let known = sequence.tokens.len() as u32;
        let State::Running(running) = &mut sequence.state else {
            return;
        };
        let page_tokens = self.config.page_tokens;
        let full = known.min(running.sent) / page_tokens;
        let pool = self.members[running.member].pool;
        while running.shared < full {
            let index = running.shared as usize;
            let start = index * page_tokens as usize;
            let tokens = &sequence.tokens[start..start + page_tokens as usize];
            let step = running.last_step;
            if !self
                .cache
                .share(&mut running.lease, index, pool, sequence.salt, tokens, step)
            {
                return;
            }
            running.shared += 1;
        }
    }

    /// Passes on the log-probabilities that have not been delivered before (a resumed prompt computes some again).
    fn deliver_prompt_logprobs(&mut self, runs: &[RunInFlight], found: PromptLogprobs) {
        let Some(run) = runs.iter().find(|run| run.slot == found.slot) else {
            return;
        };
        if self.sequences.get(run.key, run.id).is_none() {
            return;
        }
        let sequence = &mut self.sequences[run.key];
        let next = match planted(Bug::RepeatPromptLogprobs) {
            true => found.position,
            false => sequence.next_prompt_logprob,
        };
        let Some(known) = next.checked_sub(found.position) else {
            return;
        };
        let left = sequence.prompt_tokens.saturating_sub(next) as usize;
        let entries: Vec<_> = found
            .entries
            .into_iter()
            .skip(known as usize)
            .take(left)
            .collect();
        if entries.is_empty() {
            return;
        }
        sequence.next_prompt_logprob += entries.len() as u32;
        self.out.push(Command::PromptLogprobs {
            id: run.id,
            position: next,
            entries,
        });
    }
}

/// Every run that samples has exactly one sample; others have none, unless their slot failed.
fn check(runs: &[RunInFlight], samples: &[Sample]) -> Result<(), String> {
    let mut seen = vec![false; runs.len()];
    let mut at = 0;
    for sample in samples {
        let slot = sample.slot.0;
        at = find(runs, at, sample)
            .ok_or_else(|| format!("has a sample of slot {slot}, which did not run"))?;
        if std::mem::replace(&mut seen[at], true) {
            return Err(format!("has two samples of slot {slot}"));
        }
        if !runs[at].sample && sample.error.is_none() {
            return Err(format!("has a sample of slot {slot}, which was not to sample"));
        }
    }
    let missing = runs.iter().zip(seen).find(|(run, seen)| run.sample && !seen);
    match missing {
        Some((run, _)) => Err(format!("lacks the sample of slot {}", run.slot.0)),
        None => Ok(()),
    }
}

/// The run of a sample's slot. Samples usually come in the order of the runs: `from` is where the last one was.
fn find(runs: &[RunInFlight], from: usize, sample: &Sample) -> Option<usize> {
    let is_it = |run: &RunInFlight| run.slot == sample.slot;
    let ahead = runs[from.min(runs.len())..]
        .iter()
        .position(is_it)
        .map(|offset| from + offset);
    ahead.or_else(|| runs.iter().position(is_it))
}

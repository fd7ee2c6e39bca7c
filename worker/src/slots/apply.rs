//! A step message against the slots: end, start, pages, then runs.
//!
//! Keeps invariant B2 of ARCHITECTURE.md.

use std::collections::HashSet;

use conclave_kernels::backend::BatchRun;
use conclave_proto::cluster::v1 as wire;

use super::prepared::{Prepared, PromptWant, SampleWant};
use super::{Result, Slot, SlotLimits, StepError, run, sampling};
use crate::transport::MAX_COLLECTIVE_DEADLINE_MS;

/// All slots of this rank.
#[derive(Debug)]
pub struct Slots {
    limits: SlotLimits,
    slots: Vec<Option<Slot>>,
    /// Sequences that were started.
    started: u64,
}

impl Slots {
    pub fn new(limits: SlotLimits) -> Slots {
        Slots {
            slots: vec![None; limits.max_slots],
            limits,
            started: 0,
        }
    }

    /// Frees all slots: an epoch begins.
    pub fn reset(&mut self) {
        self.slots.fill(None);
    }

    pub fn get(&self, slot: u32) -> Option<&Slot> {
        self.slots.get(slot as usize)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, slot: u32) -> Option<&mut Slot> {
        self.slots.get_mut(slot as usize)?.as_mut()
    }

    /// Whether a step asks for a token's value that only the device knows yet: then the step before must be fetched
    /// first. Others may run: the device puts the token in.
    pub fn must_wait(&self, step: &wire::Step) -> bool {
        let waits = |run: &wire::Run| {
            self.get(run.slot)
                .is_some_and(|slot| slot.sampling.reads_tokens && slot.is_on_device())
        };
        step.runs.iter().any(waits)
    }

    /// Slots in use.
    pub fn running(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// Applies a step's changes and says what to run. On an error the slots are in an unknown state and good only
    /// for `reset`.
    pub fn apply(&mut self, step: wire::Step) -> Result<Prepared> {
        let layers = self.limits.layers as u32;
        // An end of 0 means all, as an unset field does.
        if step.layer_begin != 0 || (step.layer_end != 0 && step.layer_end != layers) {
            let problem = format!(
                "{}..{}: a step runs all {layers} layers",
                step.layer_begin, step.layer_end
            );
            return Err(StepError::new("layer_begin..layer_end", problem));
        }
        if step.collective_deadline_ms > MAX_COLLECTIVE_DEADLINE_MS {
            let value = step.collective_deadline_ms;
            let problem = format!("{value}, at most {MAX_COLLECTIVE_DEADLINE_MS} is allowed");
            return Err(StepError::new("collective_deadline_ms", problem));
        }
        for (index, &slot) in step.end_slots.iter().enumerate() {
            let field = || format!("end_slots[{index}]");
            match self.slots.get_mut(slot as usize) {
                None => return Err(out_of_range(&field(), slot, self.limits.max_slots)),
                Some(None) => return Err(StepError::new(field(), format!("slot {slot} is not in use"))),
                Some(slot) => *slot = None,
            }
        }
        for (index, start) in step.start_slots.into_iter().enumerate() {
            let slot = start.slot;
            self.start(&format!("start_slots[{index}]"), start)
                .map_err(|error| error.of(slot))?;
        }
        for (index, append) in step.append_pages.into_iter().enumerate() {
            let field = format!("append_pages[{index}]");
            self.check_pages(&field, &append.pages)?;
            let most = self.limits.max_pages_per_slot();
            let slot = self.running_slot(&field, append.slot)?;
            if slot.pages.len() + append.pages.len() > most {
                let problem = format!("slot {} would have more than {most} pages", append.slot);
                return Err(StepError::new(field, problem));
            }
            slot.pages.extend(append.pages);
        }
        self.runs(step.runs)
    }

    fn start(&mut self, field: &str, start: wire::SlotStart) -> Result<()> {
        let limits = self.limits;
        let wrong = |name: &str, problem: String| Err(StepError::new(format!("{field}.{name}"), problem));
        match self.slots.get(start.slot as usize) {
            None => {
                return Err(out_of_range(
                    &format!("{field}.slot"),
                    start.slot,
                    limits.max_slots,
                ));
            }
            Some(Some(_)) => return wrong("slot", format!("slot {} is in use", start.slot)),
            Some(None) => {}
        }
        let Some(message) = start.sampling else {
            return wrong("sampling", "it is not set".into());
        };
        let sampling = sampling::check(&format!("{field}.sampling"), message, limits.vocab)?;
        self.check_pages(&format!("{field}.pages"), &start.pages)?;
        if start.pages.len() > limits.max_pages_per_slot() {
            let most = limits.max_pages_per_slot();
            return wrong(
                "pages",
                format!("{} pages, a slot has at most {most}", start.pages.len()),
            );
        }
        let (cached, covered) = (
            start.cached_tokens as usize,
            start.pages.len() * limits.page_tokens,
        );
        if cached > covered.min(limits.max_position) {
            return wrong(
                "cached_tokens",
                format!("{cached} do not fit the {} pages given", start.pages.len()),
            );
        }
        if start.prompt_tokens as usize > limits.max_position {
            let most = limits.max_position;
            return wrong(
                "prompt_tokens",
                format!("{} is above the model's {most}", start.prompt_tokens),
            );
        }
        let known = if sampling.needs_tokens { cached } else { 0 };
        if start.history.len() != known && start.history.len() != cached {
            return wrong(
                "history",
                format!("{} tokens, {known} are needed", start.history.len()),
            );
        }
        if let Some(token) = start
            .history
            .iter()
            .find(|&&token| token as usize >= limits.vocab)
        {
            return wrong("history", format!("token {token} is not below {}", limits.vocab));
        }
        self.started += 1;
        self.slots[start.slot as usize] = Some(Slot {
            number: self.started,
            tokens: if sampling.needs_tokens {
                start.history
            } else {
                Vec::new()
            },
            sampling,
            pages: start.pages,
            prompt_tokens: start.prompt_tokens,
            position: start.cached_tokens,
            last_sampled: None,
        });
        Ok(())
    }

    fn runs(&mut self, runs: Vec<wire::Run>) -> Result<Prepared> {
        let mut prepared = Prepared::default();
        let mut seen = HashSet::new();
        for (index, run) in runs.into_iter().enumerate() {
            let field = format!("runs[{index}]");
            if !seen.insert(run.slot) {
                return Err(StepError::new(
                    field,
                    format!("slot {} runs twice in one step", run.slot),
                ));
            }
            let slot = run.slot;
            self.run(&field, run, &mut prepared)
                .map_err(|error| error.of(slot))?;
        }
        Ok(prepared)
    }

    fn run(&mut self, field: &str, mut run: wire::Run, prepared: &mut Prepared) -> Result<()> {
        let limits = self.limits;
        let slot = self.running_slot(field, run.slot)?;
        let batch = &mut prepared.batch;
        let tokens = run::checked(field, &mut run, batch.ids.len(), slot, limits)?;
        let end = run.position as usize + tokens.len();
        let first = batch.ids.len() as u32;
        if let Some(best) = run.prompt_logprobs {
            let following = tokens[1..].iter().copied().chain(run.next_prompt_token);
            prepared.prompts.push(PromptWant {
                slot: run.slot,
                position: run.position + 1,
                best: best.min(limits.vocab as u32),
                tokens: following.collect(),
                first,
            });
        }
        batch.positions.extend(run.position..end as u32);
        batch.runs.push(BatchRun {
            first,
            len: tokens.len() as u32,
            pages: slot.pages[..end.div_ceil(limits.page_tokens)].to_vec(),
            position: run.position,
        });
        slot.advance(&tokens);
        batch.ids.extend(tokens);
        if run.sample {
            prepared.samples.push(SampleWant {
                slot: run.slot,
                sequence: slot.number,
                position: slot.position,
                logprobs: slot.sampling.params.logprobs.is_some(),
                token_index: batch.ids.len() as u32 - 1,
                mask: run.mask,
            });
        }
        Ok(())
    }

    fn running_slot(&mut self, field: &str, slot: u32) -> Result<&mut Slot> {
        let most = self.limits.max_slots;
        match self.slots.get_mut(slot as usize) {
            None => Err(out_of_range(&format!("{field}.slot"), slot, most)),
            Some(None) => Err(StepError::new(
                format!("{field}.slot"),
                format!("slot {slot} is not in use"),
            )),
            Some(Some(slot)) => Ok(slot),
        }
    }

    fn check_pages(&self, field: &str, pages: &[u32]) -> Result<()> {
        match pages.iter().find(|&&page| page as usize >= self.limits.kv_pages) {
            None => Ok(()),
            Some(page) => Err(StepError::new(
                field,
                format!("page {page} is not below {}", self.limits.kv_pages),
            )),
        }
    }
}

fn out_of_range(field: &str, slot: u32, max_slots: usize) -> StepError {
    StepError::new(field, format!("slot {slot} is not below {max_slots}"))
}

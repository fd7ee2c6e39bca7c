//! A simulated worker: does what a step says, with pages that hold what was really written to them, and complains about
//! everything that a real worker could not do.
//!
//! Proves invariant S5 of ARCHITECTURE.md.

use std::collections::BTreeMap;

use crate::api::{
    Epoch, EpochPlan, PageId, PromptLogprobs, Run, RunInput, Sample, SlotStart, StepPlan, StepResult,
    WorkerId,
};
use crate::sim::model::{Choice, attend, has_penalties, kv, logprobs, sample};

#[derive(Debug)]
pub(crate) struct ModelWorker {
    id: WorkerId,
    page_tokens: u32,
    slots_max: u32,
    tokens_max: u32,
    /// KV by page and offset; 0 was never written.
    pages: Vec<Vec<u64>>,
    slots: BTreeMap<u32, SlotState>,
    pub(crate) epoch: Epoch,
    next_step: u64,
}

#[derive(Debug)]
struct SlotState {
    start: SlotStart,
    pages: Vec<PageId>,
    /// Next position to run.
    position: u32,
    last_sampled: Option<u32>,
    /// Tokens of the sequence from the start, kept if sampling has penalties.
    seen: Vec<u32>,
}

impl ModelWorker {
    pub(crate) fn new(
        id: WorkerId,
        page_tokens: u32,
        pages: u32,
        slots_max: u32,
        tokens_max: u32,
    ) -> ModelWorker {
        ModelWorker {
            id,
            page_tokens,
            slots_max,
            tokens_max,
            pages: vec![vec![0; page_tokens as usize]; pages as usize],
            slots: BTreeMap::new(),
            epoch: Epoch(0),
            next_step: 0,
        }
    }

    pub(crate) fn start_epoch(&mut self, plan: &EpochPlan) {
        assert!(
            plan.epoch > self.epoch,
            "worker {} got epoch {:?} again",
            self.id.0,
            plan.epoch
        );
        assert_eq!(
            plan.workers[plan.rank.0 as usize], self.id,
            "a worker is at its rank"
        );
        plan.placement
            .check(1)
            .expect("a placement that holds every expert");
        self.epoch = plan.epoch;
        self.next_step = 0;
        self.slots.clear();
        if !plan.keep_kv {
            self.pages.iter_mut().for_each(|page| page.fill(0));
        }
    }

    /// Runs one step.
    pub(crate) fn run(&mut self, plan: &StepPlan) -> StepResult {
        self.apply_changes(plan);
        let mut result = StepResult::default();
        let mut tokens = 0;
        let mut ran = Vec::new();
        // A step sees nothing of what it writes itself for other slots.
        let contexts: Vec<u64> = plan.runs.iter().map(|run| self.context(run)).collect();
        for (run, context) in plan.runs.iter().zip(contexts) {
            assert!(
                !ran.contains(&run.slot),
                "slot {} runs twice in a step",
                run.slot.0
            );
            ran.push(run.slot);
            tokens += self.run_slot(run, context, &mut result);
        }
        assert!(
            tokens <= self.tokens_max,
            "worker {} got {tokens} tokens in a step",
            self.id.0
        );
        result
    }

    /// The step was begun and broke off: what it was to write is undefined.
    pub(crate) fn break_off(&mut self, plan: &StepPlan) {
        self.apply_changes(plan);
        for run in &plan.runs {
            let pages = self.slots[&run.slot.0].pages.clone();
            for position in run.position..run.position + length(run) {
                *self.cell(&pages, position) = 0xdead;
            }
        }
    }

    fn apply_changes(&mut self, plan: &StepPlan) {
        assert_eq!(
            (plan.epoch, plan.step.0),
            (self.epoch, self.next_step),
            "steps come in order"
        );
        self.next_step += 1;
        for slot in &plan.end {
            assert!(
                self.slots.remove(&slot.0).is_some(),
                "slot {} ends and is not in use",
                slot.0
            );
        }
        for start in &plan.start {
            assert!(
                start.slot.0 < self.slots_max,
                "slot {} is beyond the worker's",
                start.slot.0
            );
            let state = SlotState {
                pages: start.pages.clone(),
                position: start.cached_tokens,
                last_sampled: None,
                seen: start.history.clone(),
                start: start.clone(),
            };
            let history = if has_penalties(&start.sampling) {
                start.cached_tokens as usize
            } else {
                0
            };
            assert_eq!(
                start.history.len(),
                history,
                "history goes where sampling needs it"
            );
            assert!(
                self.slots.insert(start.slot.0, state).is_none(),
                "slot {} is in use",
                start.slot.0
            );
        }
        for (slot, pages) in &plan.pages {
            self.slots
                .get_mut(&slot.0)
                .expect("pages go to a slot in use")
                .pages
                .extend(pages);
        }
    }

    /// The KV before a run.
    fn context(&mut self, run: &Run) -> u64 {
        let pages = self.slots[&run.slot.0].pages.clone();
        (0..run.position).fold(0, |context, position| {
            attend(context, position, *self.cell(&pages, position))
        })
    }

    fn run_slot(&mut self, run: &Run, mut context: u64, result: &mut StepResult) -> u32 {
        let mut slot = self.slots.remove(&run.slot.0).expect("a run is of a slot in use");
        assert_eq!(
            run.position, slot.position,
            "slot {} goes on where it was",
            run.slot.0
        );
        let tokens = match &run.input {
            RunInput::Tokens(tokens) => tokens.clone(),
            RunInput::LastSampled => vec![slot.last_sampled.expect("it has sampled before")],
        };
        assert!(!tokens.is_empty(), "a run has tokens");
        for (position, &token) in (run.position..).zip(&tokens) {
            let value = kv(token, position, context);
            *self.cell(&slot.pages, position) = value;
            context = attend(context, position, value);
        }
        slot.position += tokens.len() as u32;
        slot.seen.extend(&tokens);
        if run.prompt_logprobs.is_some() {
            result.prompt_logprobs.extend(prompt_logprobs(run, &tokens));
        }
        if run.sample {
            let token = sample_slot(&slot, run, context);
            slot.last_sampled = Some(token);
            result.samples.push(Sample {
                slot: run.slot,
                token,
                logprobs: slot
                    .start
                    .sampling
                    .logprobs
                    .map(|_| logprobs(token, slot.position)),
                error: None,
            });
        }
        self.slots.insert(run.slot.0, slot);
        tokens.len() as u32
    }

    fn cell(&mut self, table: &[PageId], position: u32) -> &mut u64 {
        let page = table[(position / self.page_tokens) as usize];
        &mut self.pages[page.0 as usize][(position % self.page_tokens) as usize]
    }
}

fn length(run: &Run) -> u32 {
    match &run.input {
        RunInput::Tokens(tokens) => tokens.len() as u32,
        RunInput::LastSampled => 1,
    }
}

fn sample_slot(slot: &SlotState, run: &Run, context: u64) -> u32 {
    let choice = Choice {
        sampling: &slot.start.sampling,
        seen: &slot.seen,
        stop_tokens: &slot.start.stop_tokens,
        suppress: slot.position < slot.start.suppress_until,
        mask: run.mask.as_deref(),
    };
    sample(context, slot.position, &choice)
}

fn prompt_logprobs(run: &Run, tokens: &[u32]) -> Option<PromptLogprobs> {
    let following = tokens[1..].iter().copied().chain(run.next_prompt_token);
    let entries: Vec<_> = (run.position + 1..)
        .zip(following)
        .map(|(at, token)| logprobs(token, at))
        .collect();
    (!entries.is_empty()).then_some(PromptLogprobs {
        slot: run.slot,
        position: run.position + 1,
        entries,
    })
}

//! A step ready to run, and its results turned back into messages.

use bytes::Bytes;
use conclave_kernels::backend::{Batch, SampleError, SampleParams, SampleRow, Sampled};
use conclave_proto::cluster::v1 as wire;

use super::slot::LastSampled;
use super::{Slots, sampling};
use crate::model::{RowSampling, StepOutput};

/// The batch of a step and what is wanted of it.
#[derive(Debug, Default)]
pub struct Prepared {
    pub batch: Batch,
    pub(super) samples: Vec<SampleWant>,
    pub(super) prompts: Vec<PromptWant>,
    forced: Vec<SampleParams>,
    forbidden: Vec<Vec<u32>>,
}

/// A token to sample after the token at `token_index` of the batch.
#[derive(Debug)]
pub(super) struct SampleWant {
    pub(super) slot: u32,
    /// The slot's `number`.
    pub(super) sequence: u64,
    /// Of the token to sample.
    pub(super) position: u32,
    /// Whether its log-probabilities are wanted.
    pub(super) logprobs: bool,
    pub(super) token_index: u32,
    pub(super) mask: Bytes,
}

/// Log-probabilities of given tokens: of `tokens[i]` after the token at `first + i` of the batch.
#[derive(Debug)]
pub(super) struct PromptWant {
    pub(super) slot: u32,
    pub(super) position: u32,
    pub(super) best: u32,
    pub(super) tokens: Vec<u32>,
    pub(super) first: u32,
}

impl Prepared {
    /// Lists of rows for the sampler: the sampled ones, then those of prompts. Fills the batch's logit rows.
    pub fn sampling<'a>(&'a mut self, slots: &'a Slots) -> (&'a Batch, [Vec<RowSampling<'a>>; 2]) {
        let prompt_rows = self
            .prompts
            .iter()
            .flat_map(|want| want.first..want.first + want.tokens.len() as u32);
        let mut rows: Vec<u32> = self
            .samples
            .iter()
            .map(|want| want.token_index)
            .chain(prompt_rows)
            .collect();
        rows.sort_unstable();
        rows.dedup();
        self.batch.logit_rows = rows;
        let forced = self.prompts.iter().flat_map(|want| {
            want.tokens
                .iter()
                .map(|&token| sampling::forced(token, want.best))
        });
        self.forced = forced.collect();
        let forbidden = |want: &SampleWant| {
            slots
                .get(want.slot)
                .map(super::Slot::forbidden)
                .unwrap_or_default()
        };
        self.forbidden = self.samples.iter().map(forbidden).collect();
        let this = &*self;
        let row = |token_index: u32| this.batch.logit_rows.partition_point(|&row| row < token_index);
        let samples = this
            .samples
            .iter()
            .zip(&this.forbidden)
            .filter_map(|(want, forbidden)| {
                let slot = slots.get(want.slot)?;
                Some(RowSampling {
                    row: row(want.token_index),
                    how: SampleRow {
                        params: &slot.sampling.params,
                        position: slot.position,
                        tokens: &slot.tokens,
                        output_start: slot.prompt_tokens as usize,
                        history: slot.sampling.needs_tokens.then_some(slot.number),
                        mask: (!want.mask.is_empty()).then_some(&want.mask[..]),
                        forbidden,
                    },
                })
            });
        let prompt_tokens = this
            .prompts
            .iter()
            .flat_map(|want| want.first..want.first + want.tokens.len() as u32);
        let prompts = prompt_tokens
            .zip(&this.forced)
            .map(|(token_index, params)| RowSampling {
                row: row(token_index),
                how: SampleRow {
                    params,
                    position: 0,
                    tokens: &[],
                    output_start: 0,
                    history: None,
                    mask: None,
                    forbidden: &[],
                },
            });
        (&this.batch, [samples.collect(), prompts.collect()])
    }

    /// Rows of logits and sampled rows are the same, in one order: a device may sample them all at once.
    pub fn samples_every_row(&self) -> bool {
        self.prompts.is_empty()
    }

    /// The tokens of `step` are drawn on the device and not fetched: until then the slots know them by their rows.
    pub fn leave_on_device(&self, slots: &mut Slots, step: u64) {
        for (want, row) in self.samples.iter().zip(0..) {
            if let Some(slot) = slots.get_mut(want.slot) {
                slot.last_sampled = Some(LastSampled::Row { step, row });
            }
        }
    }

    /// The tokens of `step`, fetched: into those slots that still run these sequences.
    pub fn fetched(
        self,
        slots: &mut Slots,
        step: u64,
        sampled: Vec<Sampled>,
    ) -> (Vec<wire::Sample>, Vec<wire::PromptLogprobs>) {
        for (row, (want, sampled)) in (0..).zip(self.samples.iter().zip(&sampled)) {
            let waits = Some(LastSampled::Row { step, row });
            let slot = slots.get_mut(want.slot);
            let Some(slot) = slot.filter(|slot| slot.number == want.sequence) else {
                continue;
            };
            slot.learn(want.position, row, sampled.token);
            if slot.last_sampled == waits {
                slot.last_sampled = Some(LastSampled::Token(sampled.token));
            }
        }
        self.messages(vec![sampled])
    }

    /// Takes the sampled tokens into the slots and turns everything into messages. `output` has the lists of
    /// [`Prepared::sampling`].
    pub fn finish(
        self,
        slots: &mut Slots,
        output: StepOutput,
    ) -> (Vec<wire::Sample>, Vec<wire::PromptLogprobs>) {
        for (want, sampled) in self.samples.iter().zip(output.first().into_iter().flatten()) {
            if let Some(slot) = slots.get_mut(want.slot) {
                // Also a failed row: the next step may be on its way and must find a token to run.
                slot.last_sampled = Some(LastSampled::Token(sampled.token));
            }
        }
        self.messages(output)
    }

    fn messages(self, output: StepOutput) -> (Vec<wire::Sample>, Vec<wire::PromptLogprobs>) {
        let mut lists = output.into_iter();
        let (sampled, forced) = (lists.next().unwrap_or_default(), lists.next().unwrap_or_default());
        let samples = self
            .samples
            .into_iter()
            .zip(sampled)
            .map(|(want, sampled)| wire::Sample {
                slot: want.slot,
                token: sampled.token,
                logprobs: (want.logprobs && sampled.error.is_none()).then(|| logprobs(&sampled)),
                unsatisfiable: sampled.error == Some(SampleError::Unsatisfiable),
                error: sampled.error.map(|error| error.to_string()).unwrap_or_default(),
            });
        let samples = samples.collect();
        let mut forced = forced.into_iter();
        let prompts = self.prompts.into_iter().map(|want| wire::PromptLogprobs {
            slot: want.slot,
            position: want.position,
            entries: forced
                .by_ref()
                .take(want.tokens.len())
                .map(|sampled| logprobs(&sampled))
                .collect(),
        });
        (samples, prompts.collect())
    }
}

fn logprobs(sampled: &Sampled) -> wire::Logprobs {
    wire::Logprobs {
        sampled: sampled.logprob,
        sampled_rank: sampled.rank,
        top_tokens: sampled.top.iter().map(|&(token, _)| token).collect(),
        top_logprobs: sampled.top.iter().map(|&(_, logprob)| logprob).collect(),
    }
}

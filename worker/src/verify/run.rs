//! A reference's prompt and its greedy continuation on rank 0, and everything that was computed on the way.

use std::sync::Arc;

use conclave_proto::cluster::v1 as wire;

use super::choices::{Choices, Forced};
use super::group::{GroupConfig, LocalGroup};
use super::member::{Looks, RankOutput};
use super::messages::{greedy, run, start};
use super::{Reference, VerifyError};

/// What is looked at.
#[derive(Clone, Debug)]
pub enum Way {
    /// Whole steps where the device runs those.
    AsServed,
    /// The same with the gates' logits.
    Watched,
    OpByOp,
    /// Op by op, with these experts.
    Forced(Arc<Choices>),
}

/// What a run computed.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    pub prompt: usize,
    pub vocab: usize,
    /// `[prompt + continuation - 1, vocab]`: of every token that was fed.
    pub logits: Vec<f32>,
    /// By layer, `[the same, experts]`; empty if nobody looked.
    pub router_logits: Vec<Vec<f32>>,
    /// What was drawn, each token after the reference's own tokens.
    pub greedy_ids: Vec<u32>,
}

impl Run {
    /// Logits of the prompt's positions.
    pub fn prompt_logits(&self) -> &[f32] {
        &self.logits[..self.prompt * self.vocab]
    }

    /// The logits that greedy token `index` was drawn from.
    pub fn drawn_from(&self, index: usize) -> &[f32] {
        &self.logits[(self.prompt - 1 + index) * self.vocab..][..self.vocab]
    }
}

/// Runs on a group that is otherwise idle, `chunk` prompt tokens per step. After a greedy token that differs it goes on
/// with the reference's.
pub fn run_reference(
    ranks: &mut LocalGroup,
    config: &GroupConfig,
    reference: &Reference,
    chunk: usize,
    way: &Way,
) -> Result<Run, VerifyError> {
    let prompt = &reference.input_ids;
    let total = prompt.len() + reference.greedy_ids.len();
    let pages = (0..total.div_ceil(config.page_tokens) as u32).collect();
    let mut begin = Some(start(0, pages, prompt.len(), greedy()));
    let mut done = Run {
        prompt: prompt.len(),
        vocab: reference.logits.len() / prompt.len().max(1),
        logits: Vec::new(),
        router_logits: Vec::new(),
        greedy_ids: Vec::new(),
    };
    for (index, tokens) in prompt.chunks(chunk).enumerate() {
        let position = index * chunk;
        let is_last = position + tokens.len() == prompt.len();
        let step = wire::Step {
            start_slots: begin.take().into_iter().collect(),
            runs: vec![wire::Run {
                // Asks for a row of logits at every position, and the last one samples.
                prompt_logprobs: Some(0),
                next_prompt_token: prompt.get(position + tokens.len()).copied(),
                ..run(0, position, tokens, is_last)
            }],
            ..wire::Step::default()
        };
        done.take(on_rank_0(ranks, step, &way.at(position))?);
    }
    for (position, expected) in (prompt.len()..total.saturating_sub(1)).zip(&reference.greedy_ids) {
        // As in serving, unless the token that was sampled is another.
        let differs = done.greedy_ids.last() != Some(expected);
        let tokens = if differs {
            std::slice::from_ref(expected)
        } else {
            &[]
        };
        let step = wire::Step {
            runs: vec![run(0, position, tokens, true)],
            ..wire::Step::default()
        };
        done.take(on_rank_0(ranks, step, &way.at(position))?);
    }
    let step = wire::Step {
        end_slots: vec![0],
        ..wire::Step::default()
    };
    on_rank_0(ranks, step, &Looks::Nothing)?;
    let rows = prompt.len() + reference.greedy_ids.len().saturating_sub(1);
    if done.logits.len() != rows * done.vocab {
        let problem = format!(
            "{} logits were computed, {} tokens of {} were expected",
            done.logits.len(),
            rows,
            done.vocab
        );
        return Err(VerifyError::Reference(problem));
    }
    Ok(done)
}

impl Way {
    fn at(&self, position: usize) -> Looks {
        match self {
            Way::AsServed => Looks::Logits,
            Way::Watched => Looks::Gates,
            Way::OpByOp => Looks::Inside,
            Way::Forced(choices) => Looks::Forced(Forced {
                choices: Arc::clone(choices),
                first: position,
            }),
        }
    }
}

impl Run {
    fn take(&mut self, mut output: RankOutput) {
        let samples = output.result.samples.iter();
        self.greedy_ids.extend(samples.map(|sample| sample.token));
        self.logits.append(&mut output.logits);
        let layers = self.router_logits.len().max(output.router_logits.len());
        self.router_logits.resize_with(layers, Vec::new);
        for (all, mut new) in self.router_logits.iter_mut().zip(output.router_logits) {
            all.append(&mut new);
        }
    }
}

/// The other ranks take part with no tokens.
fn on_rank_0(ranks: &mut LocalGroup, step: wire::Step, looks: &Looks) -> Result<RankOutput, VerifyError> {
    let mut steps = vec![wire::Step::default(); ranks.ranks()];
    steps[0] = step;
    ranks.submit(steps, looks);
    Ok(ranks.collect()?.swap_remove(0))
}

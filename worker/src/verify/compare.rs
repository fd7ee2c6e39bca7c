//! Runs a reference's prompt and its greedy continuation on rank 0 and measures the difference.

use conclave_proto::cluster::v1 as wire;

use super::group::{GroupConfig, LocalGroup, RankOutput};
use super::messages::{greedy, run, start};
use super::{Reference, VerifyError};

/// How far the model is from its reference.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    pub positions: usize,
    /// `|logits - reference| / |reference|` over all positions, 2-norms.
    pub logits_relative_error: f64,
    /// Of the position where it is largest.
    pub worst_position_relative_error: f64,
    /// Positions whose largest logit is at the same token.
    pub argmax_equal: usize,
    pub greedy_tokens: usize,
    /// Tokens of the continuation that are equal, up to the first that differs.
    pub greedy_equal: usize,
    /// Largest absolute difference of router logits; `None`: the reference has none.
    pub router_max_error: Option<f64>,
    /// What was computed, for comparing runs with each other.
    pub logits: Vec<f32>,
    pub greedy_ids: Vec<u32>,
}

/// The bound on the relative error of logits.
pub const MAX_LOGITS_RELATIVE_ERROR: f64 = 1e-3;

impl Comparison {
    /// Logits within [`MAX_LOGITS_RELATIVE_ERROR`] and every greedy token equal.
    pub fn passes(&self) -> bool {
        self.logits_relative_error <= MAX_LOGITS_RELATIVE_ERROR && self.greedy_equal == self.greedy_tokens
    }
}

/// Runs `reference` on a group that is otherwise idle, `chunk` prompt tokens per step.
pub fn compare(
    ranks: &mut LocalGroup,
    config: &GroupConfig,
    reference: &Reference,
    chunk: usize,
) -> Result<Comparison, VerifyError> {
    let prompt = &reference.input_ids;
    let total = prompt.len() + reference.greedy_ids.len();
    let pages = (0..total.div_ceil(config.page_tokens) as u32).collect();
    let mut begin = Some(start(0, pages, prompt.len(), greedy()));
    let (mut logits, mut router_logits, mut greedy_ids) = (Vec::new(), Vec::<Vec<f32>>::new(), Vec::new());
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
        let output = on_rank_0(ranks, step, true)?;
        logits.extend(output.logits);
        router_logits.resize_with(output.router_logits.len(), Vec::new);
        for (all, new) in router_logits.iter_mut().zip(output.router_logits) {
            all.extend(new);
        }
        greedy_ids.extend(output.result.samples.iter().map(|sample| sample.token));
    }
    for position in prompt.len()..total.saturating_sub(1) {
        let step = wire::Step {
            runs: vec![run(0, position, &[], true)],
            ..wire::Step::default()
        };
        let output = on_rank_0(ranks, step, false)?;
        greedy_ids.extend(output.result.samples.iter().map(|sample| sample.token));
    }
    let step = wire::Step {
        end_slots: vec![0],
        ..wire::Step::default()
    };
    on_rank_0(ranks, step, false)?;
    measure(reference, logits, &router_logits, greedy_ids)
}

/// The other ranks take part with no tokens.
fn on_rank_0(ranks: &mut LocalGroup, step: wire::Step, taps: bool) -> Result<RankOutput, VerifyError> {
    let mut steps = vec![wire::Step::default(); ranks.ranks()];
    steps[0] = step;
    Ok(ranks.step(steps, taps)?.swap_remove(0))
}

fn measure(
    reference: &Reference,
    logits: Vec<f32>,
    router_logits: &[Vec<f32>],
    greedy_ids: Vec<u32>,
) -> Result<Comparison, VerifyError> {
    let positions = reference.input_ids.len();
    let vocab = reference.logits.len() / positions.max(1);
    if logits.len() != reference.logits.len() {
        let problem = format!(
            "{} logits, computed were {}",
            reference.logits.len(),
            logits.len()
        );
        return Err(VerifyError::Reference(problem));
    }
    let relative = |found: &[f32], expected: &[f32]| {
        let norm =
            |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
        let difference = norm(
            &mut found
                .iter()
                .zip(expected)
                .map(|(a, b)| f64::from(*a) - f64::from(*b)),
        );
        difference / norm(&mut expected.iter().map(|value| f64::from(*value))).max(f64::MIN_POSITIVE)
    };
    let rows = || logits.chunks(vocab).zip(reference.logits.chunks(vocab));
    let router_max_error = (!reference.router_logits.is_empty()).then(|| {
        let pairs = router_logits.iter().zip(&reference.router_logits);
        let differences = pairs
            .flat_map(|(found, expected)| found.iter().zip(expected).map(|(a, b)| f64::from((a - b).abs())));
        differences.fold(0.0, f64::max)
    });
    Ok(Comparison {
        positions,
        logits_relative_error: relative(&logits, &reference.logits),
        worst_position_relative_error: rows().map(|(a, b)| relative(a, b)).fold(0.0, f64::max),
        argmax_equal: rows().filter(|(a, b)| argmax(a) == argmax(b)).count(),
        greedy_tokens: reference.greedy_ids.len(),
        greedy_equal: greedy_ids
            .iter()
            .zip(&reference.greedy_ids)
            .take_while(|(a, b)| a == b)
            .count(),
        router_max_error,
        logits,
        greedy_ids,
    })
}

fn argmax(row: &[f32]) -> usize {
    let best = |best: usize, (index, value): (usize, &f32)| if *value > row[best] { index } else { best };
    row.iter().enumerate().fold(0, best)
}

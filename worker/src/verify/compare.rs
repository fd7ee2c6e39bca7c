//! Runs a reference's prompt and its greedy continuation on rank 0 and measures the difference.

use conclave_proto::cluster::v1 as wire;

use super::group::{GroupConfig, LocalGroup};
use super::member::{Looks, RankOutput};
use super::messages::{greedy, run, start};
use super::{Reference, VerifyError};
use crate::device::DeviceKind;

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
    /// Tokens of the continuation that are equal, each after the reference's own tokens.
    pub greedy_equal: usize,
    /// Those that are not.
    pub misses: Vec<Miss>,
    /// The bound that applies to `logits_relative_error`.
    pub tolerance: f64,
    /// Largest absolute difference of router logits; `None`: the reference has none.
    pub router_max_error: Option<f64>,
    /// What was computed, for comparing runs with each other.
    pub logits: Vec<f32>,
    pub greedy_ids: Vec<u32>,
}

/// A greedy token that differs from the reference's.
#[derive(Clone, Debug, PartialEq)]
pub struct Miss {
    /// In the continuation.
    pub index: usize,
    pub expected: u32,
    pub found: u32,
    /// By how much the logit of the found token is above the expected one's.
    pub margin: f64,
    /// The margin is within what rounding does to a difference of two logits.
    pub is_tie: bool,
}

/// The bound on the relative error of logits: on the CPU everything is F32,
pub const CPU_TOLERANCE: f64 = 1e-3;
/// on a GPU prompts' activations are BF16,
pub const GPU_TOLERANCE: f64 = 1e-2;
/// and keys and values are rounded: so many times what that alone does on the CPU, where it makes other tokens choose
/// other experts.
pub const OF_ROUNDED_KV: f64 = 3.0;
/// A margin of so many root mean square errors of a logit is a tie,
const TIE_ERRORS: f64 = 4.0;
/// or of so many of the position where they are largest.
const WORST_TIE_ERRORS: f64 = 2.0;

/// On a GPU so many of the greedy tokens may differ without a tie: in a checkpoint of random weights rounding changes
/// the choice of experts now and then, and with it everything. A trained model has none.
const MOST_UNTIED: f64 = 1.0 / 8.0;

impl Comparison {
    /// Logits within the tolerance, and greedy tokens equal or tied.
    pub fn passes(&self) -> bool {
        let untied = self.misses.iter().filter(|miss| !miss.is_tie).count();
        let allowed = match self.tolerance {
            CPU_TOLERANCE => 0.0,
            _ => MOST_UNTIED * self.greedy_tokens as f64,
        };
        self.logits_relative_error <= self.tolerance && untied as f64 <= allowed
    }
}

/// Runs `reference` on a group that is otherwise idle, `chunk` prompt tokens per step. After a greedy token that
/// differs it goes on with the reference's.
pub fn compare(
    ranks: &mut LocalGroup,
    config: &GroupConfig,
    reference: &Reference,
    chunk: usize,
    looks: Looks,
) -> Result<Comparison, VerifyError> {
    let prompt = &reference.input_ids;
    let total = prompt.len() + reference.greedy_ids.len();
    let pages = (0..total.div_ceil(config.page_tokens) as u32).collect();
    let mut begin = Some(start(0, pages, prompt.len(), greedy()));
    let (mut logits, mut router_logits) = (Vec::new(), Vec::<Vec<f32>>::new());
    let mut greedy_ids = Vec::<u32>::new();
    // Logits of the last step that sampled.
    let mut last = Vec::new();
    let mut misses = Vec::new();
    let mut take = |greedy_ids: &mut Vec<u32>, output: &RankOutput, last: &[f32]| {
        for sample in &output.result.samples {
            let index = greedy_ids.len();
            greedy_ids.push(sample.token);
            let expected = reference.greedy_ids.get(index).copied().unwrap_or(sample.token);
            if sample.token != expected {
                let value = |token: u32| {
                    last.get(token as usize)
                        .map_or(f64::NAN, |value| f64::from(*value))
                };
                misses.push(Miss {
                    index,
                    expected,
                    found: sample.token,
                    margin: value(sample.token) - value(expected),
                    is_tie: false,
                });
            }
        }
    };
    let vocab = reference.logits.len() / prompt.len().max(1);
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
        let mut output = on_rank_0(ranks, step, looks)?;
        last.clear();
        last.extend_from_slice(&output.logits[output.logits.len().saturating_sub(vocab)..]);
        take(&mut greedy_ids, &output, &last);
        logits.append(&mut output.logits);
        router_logits.resize_with(output.router_logits.len(), Vec::new);
        for (all, new) in router_logits.iter_mut().zip(output.router_logits) {
            all.extend(new);
        }
    }
    for (position, expected) in (prompt.len()..total.saturating_sub(1)).zip(&reference.greedy_ids) {
        // As in serving, unless the token that was sampled is another.
        let differs = greedy_ids.last() != Some(expected);
        let tokens = if differs {
            std::slice::from_ref(expected)
        } else {
            &[]
        };
        let step = wire::Step {
            runs: vec![run(0, position, tokens, true)],
            ..wire::Step::default()
        };
        let output = on_rank_0(ranks, step, looks)?;
        take(&mut greedy_ids, &output, &output.logits);
    }
    let step = wire::Step {
        end_slots: vec![0],
        ..wire::Step::default()
    };
    on_rank_0(ranks, step, Looks::Nothing)?;
    let mut found = measure(reference, logits, &router_logits, greedy_ids)?;
    found.tolerance = match config.device {
        DeviceKind::Cpu => CPU_TOLERANCE,
        DeviceKind::Cuda(_) => GPU_TOLERANCE,
    };
    let error = rms_error(&found.logits, &reference.logits);
    let rows = found
        .logits
        .chunks(vocab.max(1))
        .zip(reference.logits.chunks(vocab.max(1)));
    let worst = rows.map(|(a, b)| rms_error(a, b)).fold(0.0, f64::max);
    let bound = (TIE_ERRORS * error).max(WORST_TIE_ERRORS * worst);
    for miss in &mut misses {
        miss.is_tie = miss.margin.abs() <= bound;
    }
    found.misses = misses;
    Ok(found)
}

/// The other ranks take part with no tokens.
fn on_rank_0(ranks: &mut LocalGroup, step: wire::Step, looks: Looks) -> Result<RankOutput, VerifyError> {
    let mut steps = vec![wire::Step::default(); ranks.ranks()];
    steps[0] = step;
    ranks.submit(steps, looks);
    Ok(ranks.collect()?.swap_remove(0))
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
            .filter(|(a, b)| a == b)
            .count(),
        misses: Vec::new(),
        tolerance: CPU_TOLERANCE,
        router_max_error,
        logits,
        greedy_ids,
    })
}

fn rms_error(found: &[f32], expected: &[f32]) -> f64 {
    let squares = found.iter().zip(expected).map(|(a, b)| f64::from(a - b).powi(2));
    (squares.sum::<f64>() / found.len().max(1) as f64).sqrt()
}

fn argmax(row: &[f32]) -> usize {
    let best = |best: usize, (index, value): (usize, &f32)| if *value > row[best] { index } else { best };
    row.iter().enumerate().fold(0, best)
}

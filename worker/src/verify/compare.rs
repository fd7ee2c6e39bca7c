//! A run beside its reference.

use super::run::Run;
use super::{Reference, VerifyError};

/// How far the model is from its reference.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    pub positions: usize,
    /// `|logits - reference| / |reference|` over the prompt's positions, 2-norms.
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
    /// Largest absolute difference of router logits; `None`: the reference has none, or nobody looked.
    pub router_max_error: Option<f64>,
    /// What was computed, for comparing runs with each other.
    pub logits: Vec<f32>,
    pub greedy_ids: Vec<u32>,
}

/// A greedy token that differs from the expected one.
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

/// The bound on the relative error of logits on the CPU, where everything is F32.
pub const CPU_TOLERANCE: f64 = 1e-3;
/// A margin of so many root mean square errors of a logit is a tie.
const TIE_ERRORS: f64 = 4.0;

impl Comparison {
    /// Logits within the CPU's tolerance, and greedy tokens equal or tied.
    pub fn passes(&self) -> bool {
        self.logits_relative_error <= CPU_TOLERANCE && self.misses.iter().all(|miss| miss.is_tie)
    }

    pub(super) fn of(found: &Run, reference: &Reference) -> Result<Comparison, VerifyError> {
        let (logits, expected) = (found.prompt_logits(), &reference.logits);
        if logits.len() != expected.len() {
            let problem = format!("{} logits, computed were {}", expected.len(), logits.len());
            return Err(VerifyError::Reference(problem));
        }
        let rows = || logits.chunks(found.vocab).zip(expected.chunks(found.vocab));
        let pairs = found.router_logits.iter().zip(&reference.router_logits);
        let differences = pairs
            .flat_map(|(found, expected)| found.iter().zip(expected).map(|(a, b)| f64::from((a - b).abs())));
        let misses = misses(
            found,
            &reference.greedy_ids,
            TIE_ERRORS * rms_error(logits, expected),
        );
        Ok(Comparison {
            positions: found.prompt,
            logits_relative_error: relative(logits, expected),
            worst_position_relative_error: rows().map(|(a, b)| relative(a, b)).fold(0.0, f64::max),
            argmax_equal: rows().filter(|(a, b)| argmax(a) == argmax(b)).count(),
            greedy_tokens: reference.greedy_ids.len(),
            greedy_equal: reference.greedy_ids.len() - misses.len(),
            misses,
            router_max_error: differences.reduce(f64::max),
            logits: logits.to_vec(),
            greedy_ids: found.greedy_ids.clone(),
        })
    }
}

/// The greedy tokens that are not as expected; a margin up to `bound` is a tie.
pub(super) fn misses(found: &Run, expected: &[u32], bound: f64) -> Vec<Miss> {
    let pairs = found.greedy_ids.iter().zip(expected).enumerate();
    let differing = pairs.filter(|(_, (found, expected))| found != expected);
    let miss = |(index, (&token, &expected)): (usize, (&u32, &u32))| {
        let row = found.drawn_from(index);
        let margin = f64::from(row[token as usize]) - f64::from(row[expected as usize]);
        Miss {
            index,
            expected,
            found: token,
            margin,
            is_tie: margin.abs() <= bound,
        }
    };
    differing.map(miss).collect()
}

/// Of 2-norms.
pub(super) fn relative(found: &[f32], expected: &[f32]) -> f64 {
    let squares = expected.iter().map(|value| f64::from(*value).powi(2));
    let norm = (squares.sum::<f64>() / expected.len().max(1) as f64).sqrt();
    rms_error(found, expected) / norm.max(f64::MIN_POSITIVE)
}

pub(super) fn rms_error(found: &[f32], expected: &[f32]) -> f64 {
    let difference = |(a, b): (&f32, &f32)| (f64::from(*a) - f64::from(*b)).powi(2);
    let squares = found.iter().zip(expected).map(difference);
    (squares.sum::<f64>() / found.len().max(1) as f64).sqrt()
}

fn argmax(row: &[f32]) -> usize {
    let best = |best: usize, (index, value): (usize, &f32)| if *value > row[best] { index } else { best };
    row.iter().enumerate().fold(0, best)
}

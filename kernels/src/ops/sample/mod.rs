//! Sampling of one row of logits, in this order:
//!
//! 1. `logit_bias` is added;
//! 2. repetition penalty, over all tokens so far: positive logits are divided by it, others multiplied;
//!    frequency penalty times the count, and presence penalty once, over the output tokens: subtracted;
//! 3. forbidden tokens and tokens outside the mask are left out;
//! 4. temperature 0: the largest logit, the lowest index among equals;
//! 5. `top_k`: the k largest logits stay, the lower index first among equals; `p = e^((x - max x) / temperature)`;
//!    `min_p`: `p >= min_p` stay; `top_p`: the fewest of the largest whose sum reaches `top_p` of the sum of what is
//!    left;
//! 6. the token where the running sum (F64; from the largest down after top-k or top-p, else by index) passes
//!    `u * sum`, with u from Philox 4x32-10 keyed by the seed and counted by the position.
//!
//! Log-probabilities are those of the logits as the model gave them, before 1. The result is a function of the row
//! alone: neither the batch nor earlier calls have a part in it.

mod choose;
mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod philox;
#[cfg(test)]
mod tests;

use crate::backend::{SampleError, SampleRow, Sampled};
use crate::simd::{Isa, Kernel, LANES, Simd, math, run};

/// Scratch of one thread for a vocabulary.
pub(crate) struct Scratch {
    pub(crate) values: Vec<f32>,
    pub(crate) candidates: Vec<choose::Candidate>,
    pub(crate) counts: Vec<u32>,
}

impl Scratch {
    pub(crate) fn new(vocab: usize) -> Scratch {
        Scratch {
            values: vec![0.0; vocab],
            candidates: Vec::with_capacity(vocab),
            counts: vec![0; vocab],
        }
    }
}

/// Samples one row; what is wrong with the row stands in `Sampled::error` and disturbs no other row.
pub(crate) fn sample(isa: Isa, logits: &[f32], row: &SampleRow<'_>, scratch: &mut Scratch) -> Sampled {
    match try_sample(isa, logits, row, scratch) {
        Ok(sampled) => sampled,
        Err(error) => Sampled {
            error: Some(error),
            ..Sampled::default()
        },
    }
}

fn try_sample(
    isa: Isa,
    logits: &[f32],
    row: &SampleRow<'_>,
    scratch: &mut Scratch,
) -> Result<Sampled, SampleError> {
    if choose::survey(isa, logits).is_none() {
        let bad = logits.iter().position(|x| x.is_nan() || *x == f32::INFINITY);
        let token = bad.unwrap_or(0);
        return Err(format!("the logit of token {token} is {}", logits[token]).into());
    }
    let Scratch {
        values,
        candidates,
        counts,
    } = scratch;
    let values = &mut values[..logits.len()];
    values.copy_from_slice(logits);
    adjust(values, row, counts)?;
    let token = choose::choose(isa, values, row, candidates)?;
    let mut sampled = Sampled {
        token,
        ..Sampled::default()
    };
    if let Some(best) = row.params.logprobs {
        values.copy_from_slice(logits);
        logprobs(isa, values, best as usize, candidates, &mut sampled);
    }
    Ok(sampled)
}

/// Steps 1 to 3.
fn adjust(values: &mut [f32], row: &SampleRow<'_>, counts: &mut [u32]) -> Result<(), String> {
    let vocab = values.len();
    let known = |what: &str, token: u32| match token as usize {
        token if token < vocab => Ok(token),
        token => Err(format!("{what} {token} is not below the vocabulary's {vocab}")),
    };
    for (token, bias) in &row.params.logit_bias {
        values[known("logit_bias token", *token)?] += bias;
    }
    let params = row.params;
    if params.repetition_penalty != 1.0 {
        for token in row.tokens {
            let at = known("token", *token)?;
            if counts[at] == 0 {
                let x = values[at];
                values[at] = if x > 0.0 {
                    x / params.repetition_penalty
                } else {
                    x * params.repetition_penalty
                };
            }
            counts[at] = 1;
        }
        row.tokens.iter().for_each(|token| counts[*token as usize] = 0);
    }
    if params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
        let output = row.tokens.get(row.output_start..).unwrap_or_default();
        for token in output {
            known("token", *token)?;
        }
        output.iter().for_each(|token| counts[*token as usize] += 1);
        for token in output {
            let count = std::mem::take(&mut counts[*token as usize]);
            if count > 0 {
                values[*token as usize] -= params.frequency_penalty * count as f32 + params.presence_penalty;
            }
        }
    }
    for token in row.forbidden {
        values[known("forbidden token", *token)?] = f32::NEG_INFINITY;
    }
    if let Some(mask) = row.mask {
        if mask.len() * 8 < vocab {
            return Err(format!(
                "the mask has {} bits for a vocabulary of {vocab}",
                mask.len() * 8
            ));
        }
        for (token, value) in values.iter_mut().enumerate() {
            if mask[token / 8] >> (token % 8) & 1 == 0 {
                *value = f32::NEG_INFINITY;
            }
        }
    }
    Ok(())
}

/// Log-probability and rank of the sampled token and the `best` best ones; overwrites `values`.
fn logprobs(
    isa: Isa,
    values: &mut [f32],
    best: usize,
    candidates: &mut Vec<choose::Candidate>,
    sampled: &mut Sampled,
) {
    let own = values[sampled.token as usize];
    sampled.rank = 1 + values.iter().filter(|x| **x > own).count() as u32;
    choose::largest(isa, values, best, candidates);
    let largest = choose::survey(isa, values).unwrap_or(f32::NAN);
    run(
        isa,
        Exp {
            values,
            largest,
            divisor: 1.0,
        },
    );
    let log_sum = libm::log(values.iter().map(|p| f64::from(*p)).sum());
    let logprob = |x: f32| (f64::from(x - largest) - log_sum) as f32;
    sampled.logprob = logprob(own);
    sampled.top = candidates
        .iter()
        .map(|(x, token)| (*token, logprob(*x)))
        .collect();
}

/// `values = e^((values - largest) / divisor)`.
struct Exp<'a> {
    values: &'a mut [f32],
    largest: f32,
    divisor: f32,
}

impl Kernel for Exp<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (chunks, rest) = self.values.as_chunks_mut::<LANES>();
        let mut last = [0.0; LANES];
        last[..rest.len()].copy_from_slice(rest);
        for chunk in chunks.iter_mut().chain([&mut last]) {
            let x = s.sub(s.load(chunk), s.splat(self.largest));
            s.store(math::exp(s, s.div(x, s.splat(self.divisor))), chunk);
        }
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

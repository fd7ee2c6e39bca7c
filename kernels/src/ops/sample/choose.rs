//! Steps 4 to 6 of sampling: from adjusted logits to a token. Allocates nothing: candidates have the vocabulary's
//! capacity.

use std::cmp::Ordering;

use super::Exp;
use super::philox::uniform;
use crate::backend::SampleRow;
use crate::simd::{Isa, run};

/// So many candidates are sorted first for top-p; eight times more whenever they do not reach it.
const FIRST_SORTED: usize = 256;

/// Larger first, then the lower index.
fn order(a: &(f32, u32), b: &(f32, u32)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// Leaves the `count` first candidates, in order.
pub(super) fn keep_largest(candidates: &mut Vec<(f32, u32)>, count: usize) {
    if count < candidates.len() {
        candidates.select_nth_unstable_by(count, order);
        candidates.truncate(count);
    }
    candidates.sort_unstable_by(order);
}

/// Picks a token; `values` are the adjusted logits and are overwritten.
pub(super) fn choose(
    isa: Isa,
    values: &mut [f32],
    row: &SampleRow<'_>,
    candidates: &mut Vec<(f32, u32)>,
) -> Result<u32, String> {
    let params = row.params;
    let (mut best, mut largest) = (0, f32::NEG_INFINITY);
    for (token, x) in values.iter().enumerate() {
        if *x > largest {
            (best, largest) = (token as u32, *x);
        }
    }
    if largest == f32::NEG_INFINITY {
        return Err("no token is allowed".into());
    }
    if !largest.is_finite() || values.iter().any(|x| x.is_nan()) {
        return Err("a penalty or bias made a logit infinite or NaN".into());
    }
    if params.temperature == 0.0 {
        return Ok(best);
    }
    if params.temperature.is_nan() || params.temperature < 0.0 {
        return Err(format!(
            "temperature is {}, must be 0 or more",
            params.temperature
        ));
    }
    candidates.clear();
    candidates.extend(values.iter().zip(0..).map(|(x, token)| (*x, token)));
    let excluded = f32::NEG_INFINITY;
    candidates.retain(|(x, _)| *x != excluded);
    run(
        isa,
        Exp {
            values,
            largest,
            divisor: params.temperature,
        },
    );
    candidates
        .iter_mut()
        .for_each(|(p, token)| *p = values[*token as usize]);
    candidates.retain(|(p, _)| *p >= params.min_p);
    if params.top_k > 0 && (params.top_k as usize) < values.len() {
        keep_largest(candidates, params.top_k as usize);
    }
    let mut sum = total(candidates);
    if params.top_p < 1.0 {
        sum = keep_mass(candidates, sum * f64::from(params.top_p));
    }
    let target = uniform(params.seed, row.position) * sum;
    let mut running = 0.0;
    for (p, token) in candidates.iter() {
        running += f64::from(*p);
        if running > target {
            return Ok(*token);
        }
    }
    // Rounding of the running sum only: the last candidate owns the end of the interval.
    candidates
        .last()
        .map(|(_, token)| *token)
        .ok_or_else(|| "min_p leaves no token".into())
}

fn total(candidates: &[(f32, u32)]) -> f64 {
    candidates.iter().map(|(p, _)| f64::from(*p)).sum()
}

/// Leaves the fewest of the largest candidates whose sum reaches `mass`, in order, one at least; returns their sum.
fn keep_mass(candidates: &mut Vec<(f32, u32)>, mass: f64) -> f64 {
    let mut sorted = 0;
    let mut running = 0.0;
    let mut window = FIRST_SORTED;
    while sorted < candidates.len() {
        let end = candidates.len().min(sorted + window);
        let rest = &mut candidates[sorted..];
        if end - sorted < rest.len() {
            rest.select_nth_unstable_by(end - sorted, order);
        }
        rest[..end - sorted].sort_unstable_by(order);
        for at in sorted..end {
            running += f64::from(candidates[at].0);
            if running >= mass {
                candidates.truncate(at + 1);
                return running;
            }
        }
        sorted = end;
        window *= 8;
    }
    running
}

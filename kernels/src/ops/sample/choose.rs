//! Steps 4 to 6 of sampling: from adjusted logits to a token. Allocates nothing: candidates have the vocabulary's
//! capacity.

use std::cmp::Ordering;

use super::Exp;
use super::philox::uniform;
use crate::backend::{SampleError, SampleRow};
use crate::simd::{Isa, Kernel, LANES, Simd, run};

/// So many candidates are sorted first for top-p; eight times more whenever they do not reach it.
const FIRST_SORTED: usize = 256;
/// Up to so many best ones are collected in one pass over the logits; more are selected from all.
const FEW: usize = 256;

/// Why a row has no token; the device's sampler says the same.
pub(super) const SPOILT: &str = "a penalty or bias made a logit infinite or NaN";
pub(super) const NONE_LIKELY: &str = "min_p leaves no token";

/// A value and its token.
pub(super) type Candidate = (f32, u32);

/// Larger first, then the lower index.
fn order(a: &Candidate, b: &Candidate) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// The `count` largest values above -infinity, in order.
pub(super) fn largest(isa: Isa, values: &[f32], count: usize, candidates: &mut Vec<Candidate>) {
    candidates.clear();
    if count <= FEW {
        run(
            isa,
            Few {
                values,
                count,
                candidates,
            },
        );
        return;
    }
    let all = values.iter().zip(0..).map(|(x, token)| (*x, token));
    candidates.extend(all.filter(|(x, _)| *x > f32::NEG_INFINITY));
    if count < candidates.len() {
        candidates.select_nth_unstable_by(count, order);
        candidates.truncate(count);
    }
    candidates.sort_unstable_by(order);
}

/// One pass; the candidates so far are kept in order.
struct Few<'a> {
    values: &'a [f32],
    count: usize,
    candidates: &'a mut Vec<Candidate>,
}

impl Kernel for Few<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Few {
            values,
            count,
            candidates,
        } = self;
        if count == 0 {
            return;
        }
        let mut least = f32::NEG_INFINITY;
        for (i, chunk) in values.chunks(LANES).enumerate() {
            if let Some(chunk) = chunk.first_chunk()
                && s.largest(s.load(chunk)) <= least
            {
                continue;
            }
            for (x, token) in chunk.iter().zip((i * LANES) as u32..) {
                // An equal value stays behind the earlier token.
                if *x > least {
                    if candidates.len() == count {
                        candidates.pop();
                    }
                    let before = candidates.iter().rposition(|(other, _)| other >= x);
                    candidates.insert(before.map_or(0, |before| before + 1), (*x, token));
                    if candidates.len() == count {
                        least = candidates[count - 1].0;
                    }
                }
            }
        }
    }
}

/// The largest value, and whether all are below +infinity and no NaN.
struct Survey<'a>(&'a [f32]);

impl Kernel for Survey<'_> {
    type Output = (f32, bool);

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> (f32, bool) {
        let (mut largest, mut good) = ([f32::NEG_INFINITY; LANES], [true; LANES]);
        for chunk in self.0.chunks(LANES) {
            for (i, x) in chunk.iter().enumerate() {
                largest[i] = if *x > largest[i] { *x } else { largest[i] };
                good[i] &= *x <= f32::MAX;
            }
        }
        let largest = largest
            .into_iter()
            .fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
        (largest, good.into_iter().all(|good| good))
    }
}

/// The largest value; `None` if there is a NaN or +infinity.
pub(super) fn survey(isa: Isa, values: &[f32]) -> Option<f32> {
    let (largest, good) = run(isa, Survey(values));
    good.then_some(largest)
}

/// Picks a token; `values` are the adjusted logits and are overwritten.
pub(super) fn choose(
    isa: Isa,
    values: &mut [f32],
    row: &SampleRow<'_>,
    candidates: &mut Vec<Candidate>,
) -> Result<u32, SampleError> {
    let params = row.params;
    let best = survey(isa, values).ok_or(SPOILT)?;
    if best == f32::NEG_INFINITY {
        return Err(SampleError::Unsatisfiable);
    }
    if params.temperature.is_nan() || params.temperature < 0.0 {
        return Err(format!("temperature is {}, must be 0 or more", params.temperature).into());
    }
    if params.temperature == 0.0 {
        let first = values.iter().position(|x| *x == best);
        return Ok(first.unwrap_or(0) as u32);
    }
    if params.top_k > 0 && (params.top_k as usize) < values.len() {
        largest(isa, values, params.top_k as usize, candidates);
    } else {
        candidates.clear();
        let all = values.iter().zip(0..).map(|(x, token)| (*x, token));
        candidates.extend(all.filter(|(x, _)| *x > f32::NEG_INFINITY));
    }
    let p = &mut values[..candidates.len()];
    p.iter_mut().zip(&*candidates).for_each(|(p, (x, _))| *p = *x);
    run(
        isa,
        Exp {
            values: p,
            largest: best,
            divisor: params.temperature,
        },
    );
    candidates.iter_mut().zip(p).for_each(|((x, _), p)| *x = *p);
    if params.min_p > 0.0 {
        candidates.retain(|(p, _)| *p >= params.min_p);
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
    let last = candidates.last().map(|(_, token)| *token);
    last.ok_or_else(|| NONE_LIKELY.into())
}

fn total(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|(p, _)| f64::from(*p)).sum()
}

/// Leaves the fewest of the largest candidates whose sum reaches `mass`, in order, one at least; returns their sum.
fn keep_mass(candidates: &mut Vec<Candidate>, mass: f64) -> f64 {
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

//! Which router gets a request: the one where it makes the least work, given what each has to do already.
//!
//! Work is counted in bytes of prompt. What a router computed lately and what runs there now count as load, so
//! that a prefix everybody shares does not bring everybody to one router: once that one has done more than the
//! prefix is worth, another one computes it too.

use std::time::{Duration, Instant};

/// What a request costs besides its prompt: the tokens it generates.
pub(super) const REQUEST_BYTES: f64 = 4096.0;
/// Work done is forgotten by halves over this time.
const HALF_LIFE: Duration = Duration::from_secs(60);

/// How much load counts beside new work. Below one, so that a conversation moves only away from a router that
/// did clearly more than the others, and not at every small difference.
const LOAD_WEIGHT: f64 = 0.25;

/// How likely a router is to serve at once; lower is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Tier {
    /// Answers probes and serves.
    Serving,
    /// Was not asked yet.
    Unknown,
    /// Starts, or waits for its workers: requests wait with it.
    Waiting,
    /// Draining, or does not answer.
    Away,
}

/// A router as the choice sees it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) tier: Tier,
    /// Work done lately and work at hand, in bytes.
    pub(super) load: f64,
    /// Bytes of this prompt that it has seen.
    pub(super) matched: u64,
}

/// Candidates from best to worst. `turn` decides between equals, so that they take turns.
pub(super) fn order(candidates: &[Candidate], prompt_bytes: u64, turn: usize) -> Vec<usize> {
    let least = candidates
        .iter()
        .map(|candidate| candidate.load)
        .fold(f64::INFINITY, f64::min);
    let cost = |candidate: &Candidate| {
        LOAD_WEIGHT * (candidate.load - least) + prompt_bytes.saturating_sub(candidate.matched) as f64
    };
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    order.rotate_left(turn % candidates.len().max(1));
    order.sort_by(|a, b| {
        let (a, b) = (&candidates[*a], &candidates[*b]);
        a.tier.cmp(&b.tier).then(cost(a).total_cmp(&cost(b)))
    });
    order
}

/// A sum that fades.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fading {
    sum: f64,
    at: Instant,
}

impl Fading {
    pub(super) fn new(now: Instant) -> Self {
        Self { sum: 0.0, at: now }
    }

    pub(super) fn value(&self, now: Instant) -> f64 {
        let age = now.saturating_duration_since(self.at);
        self.sum * (-age.as_secs_f64() / HALF_LIFE.as_secs_f64()).exp2()
    }

    pub(super) fn add(&mut self, now: Instant, amount: f64) {
        *self = Self {
            sum: self.value(now) + amount,
            at: now,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(tier: Tier, load: f64, matched: u64) -> Candidate {
        Candidate { tier, load, matched }
    }

    #[test]
    fn the_prefix_wins_until_load_outweighs_it() {
        let of = |load: f64| {
            [
                candidate(Tier::Serving, load, 8000),
                candidate(Tier::Serving, 100.0, 0),
            ]
        };
        assert_eq!(order(&of(100.0), 9000, 0), [0, 1]);
        assert_eq!(order(&of(8000.0 / LOAD_WEIGHT), 9000, 0), [0, 1]);
        assert_eq!(order(&of(8200.0 / LOAD_WEIGHT), 9000, 0), [1, 0]);
    }

    #[test]
    fn a_router_that_is_away_comes_last_whatever_it_has() {
        let routers = [
            candidate(Tier::Away, 0.0, 9000),
            candidate(Tier::Waiting, 0.0, 9000),
            candidate(Tier::Serving, 1e9, 0),
            candidate(Tier::Unknown, 0.0, 9000),
        ];
        assert_eq!(order(&routers, 9000, 0), [2, 3, 1, 0]);
    }

    #[test]
    fn equals_take_turns() {
        let routers = [candidate(Tier::Serving, 0.0, 0); 3];
        let firsts: Vec<_> = (0..4).map(|turn| order(&routers, 10, turn)[0]).collect();
        assert_eq!(firsts, [0, 1, 2, 0]);
        assert!(order(&[], 10, 5).is_empty());
    }

    #[test]
    fn work_fades_by_halves() {
        let start = Instant::now();
        let mut fading = Fading::new(start);
        fading.add(start, 100.0);
        fading.add(start + HALF_LIFE, 50.0);
        assert!((fading.value(start + HALF_LIFE) - 100.0).abs() < 1e-9);
        assert!((fading.value(start + 2 * HALF_LIFE) - 50.0).abs() < 1e-9);
    }
}

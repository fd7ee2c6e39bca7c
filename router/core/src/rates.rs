//! Two running estimates: how fast sequences end (for the retry hint of a full queue) and how long steps take (for
//! the collective deadline of the next epoch).

use std::collections::VecDeque;

use crate::api::Micros;
use crate::limits::{
    DEADLINE_OVER_P99, DEADLINE_US_MAX, RETRY_AFTER_MS_MAX, RETRY_AFTER_MS_MIN, RETRY_QUEUE_DIVISOR,
    STEP_TIMES_KEPT,
};

/// Time between the ends of sequences, smoothed over about eight of them.
#[derive(Debug, Default)]
pub(crate) struct ServiceRate {
    last: Option<Micros>,
    interval_us: Option<u64>,
}

impl ServiceRate {
    pub(crate) fn ended(&mut self, now: Micros) {
        if let Some(last) = self.last {
            let interval = now.0 - last.0;
            self.interval_us = Some(match self.interval_us {
                Some(mean) => mean - mean / 8 + interval / 8,
                None => interval,
            });
        }
        self.last = Some(now);
    }

    /// After how long a part of `waiting` sequences will have been served.
    pub(crate) fn retry_after_ms(&self, waiting: usize) -> u64 {
        let served = (waiting as u64 / RETRY_QUEUE_DIVISOR).max(1);
        let us = self.interval_us.unwrap_or(0).saturating_mul(served);
        (us / 1_000).clamp(RETRY_AFTER_MS_MIN, RETRY_AFTER_MS_MAX)
    }
}

/// The latest step times.
#[derive(Debug, Default)]
pub(crate) struct StepTimes {
    latest: VecDeque<u64>,
}

impl StepTimes {
    pub(crate) fn add(&mut self, us: u64) {
        if self.latest.len() == STEP_TIMES_KEPT {
            self.latest.pop_front();
        }
        self.latest.push_back(us);
    }

    pub(crate) fn deadline(&self, floor: Micros) -> Micros {
        let mut sorted: Vec<u64> = self.latest.iter().copied().collect();
        sorted.sort_unstable();
        let p99 = sorted.get(sorted.len() * 99 / 100).copied().unwrap_or(0);
        floor.max(Micros(p99.saturating_mul(DEADLINE_OVER_P99).min(DEADLINE_US_MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_retry_hint_follows_the_rate_within_its_bounds() {
        let mut rate = ServiceRate::default();
        assert_eq!(rate.retry_after_ms(100), RETRY_AFTER_MS_MIN);
        for second in 0..50 {
            rate.ended(Micros(second * 1_000_000));
        }
        assert_eq!(rate.retry_after_ms(40), 10_000);
        assert_eq!(rate.retry_after_ms(1_000_000), RETRY_AFTER_MS_MAX);
    }

    #[test]
    fn the_deadline_is_twenty_times_the_99th_percentile_of_the_latest_steps() {
        let floor = Micros(500_000);
        let mut times = StepTimes::default();
        assert_eq!(times.deadline(floor), floor);
        for _ in 0..STEP_TIMES_KEPT {
            times.add(900_000);
        }
        for _ in 0..STEP_TIMES_KEPT {
            times.add(100_000);
        }
        assert_eq!(times.deadline(floor), Micros(2_000_000));
        for _ in 0..STEP_TIMES_KEPT {
            times.add(60_000_000);
        }
        assert_eq!(times.deadline(floor), Micros(DEADLINE_US_MAX));
    }
}

//! Running estimates: how fast sequences end (for the retry hint of a full queue), how long steps take (for the
//! collective deadline of the next epoch) and how long their tokens do (for that of a step of many tokens).

use std::collections::VecDeque;

use crate::api::Micros;
use crate::limits::{
    DEADLINE_OVER_P99, DEADLINE_US_MAX, FIRST_NS_PER_TOKEN, MEASURED_TOKENS_MIN, RETRY_AFTER_MS_MAX,
    RETRY_AFTER_MS_MIN, RETRY_QUEUE_DIVISOR, STALL_DEADLINES, STALL_US_MAX, STALL_US_MIN, STEP_TIMES_KEPT,
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

/// The latest step times, and the latest times per token of steps that had some.
#[derive(Debug, Default)]
pub(crate) struct StepTimes {
    us: Latest,
    ns_per_token: Latest,
}

impl StepTimes {
    /// `tokens`: the most that a rank had.
    pub(crate) fn add(&mut self, us: u64, tokens: u32) {
        self.us.add(us);
        if tokens >= MEASURED_TOKENS_MIN {
            self.ns_per_token
                .add(us.saturating_mul(1_000) / u64::from(tokens));
        }
    }

    /// Of the next epoch.
    pub(crate) fn deadline(&self, floor: Micros) -> Micros {
        floor.max(over(self.us.p99().unwrap_or(0)))
    }

    /// Of a step in which a rank has so many tokens: whatever the steps before were like, it may compute a layer of them
    /// while the others wait.
    pub(crate) fn deadline_of(&self, tokens: u32) -> Micros {
        over(self.expected_us(tokens))
    }

    /// How long a step of so many tokens may be away, where its ranks wait for each other for `deadline`.
    pub(crate) fn stall_of(&self, tokens: u32, deadline: Micros) -> Micros {
        let stall = |us: u64| us.saturating_mul(STALL_DEADLINES);
        let by_tokens = stall(self.expected_us(tokens).saturating_mul(DEADLINE_OVER_P99));
        let least = stall(deadline.0).max(STALL_US_MIN);
        Micros(least.max(by_tokens.min(STALL_US_MAX)))
    }

    /// By its tokens, if they are some.
    fn expected_us(&self, tokens: u32) -> u64 {
        if tokens < MEASURED_TOKENS_MIN {
            return 0;
        }
        let ns_per_token = self.ns_per_token.p99().unwrap_or(FIRST_NS_PER_TOKEN);
        ns_per_token.saturating_mul(u64::from(tokens)) / 1_000
    }
}

fn over(us: u64) -> Micros {
    Micros(us.saturating_mul(DEADLINE_OVER_P99).min(DEADLINE_US_MAX))
}

#[derive(Debug, Default)]
struct Latest(VecDeque<u64>);

impl Latest {
    fn add(&mut self, value: u64) {
        if self.0.len() == STEP_TIMES_KEPT {
            self.0.pop_front();
        }
        self.0.push_back(value);
    }

    fn p99(&self) -> Option<u64> {
        let mut values: Vec<u64> = self.0.iter().copied().collect();
        let at = values.len() * 99 / 100;
        (at < values.len()).then(|| *values.select_nth_unstable(at).1)
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
            times.add(900_000, 1);
        }
        for _ in 0..STEP_TIMES_KEPT {
            times.add(100_000, 1);
        }
        assert_eq!(times.deadline(floor), Micros(2_000_000));
        for _ in 0..STEP_TIMES_KEPT {
            times.add(60_000_000, 1);
        }
        assert_eq!(times.deadline(floor), Micros(DEADLINE_US_MAX));
    }

    #[test]
    fn a_step_of_many_tokens_has_a_deadline_by_their_measured_time() {
        let mut times = StepTimes::default();
        assert_eq!(times.deadline_of(MEASURED_TOKENS_MIN - 1), Micros(0));
        // Not measured yet: a millisecond each.
        assert_eq!(times.deadline_of(100), Micros(2_000_000));
        assert_eq!(times.deadline_of(u32::MAX), Micros(DEADLINE_US_MAX));
        // However many single tokens come between.
        times.add(50_000, 500);
        for _ in 0..2 * STEP_TIMES_KEPT {
            times.add(90_000, 1);
        }
        assert_eq!(times.deadline_of(100), Micros(200_000));
        // All of the step's layers together may take longer than a wait for one of them.
        assert_eq!(times.stall_of(1, Micros(0)), Micros(STALL_US_MIN));
        assert_eq!(times.stall_of(1, Micros(20_000_000)), Micros(80_000_000));
        assert_eq!(times.stall_of(8192, Micros(0)), Micros(65_536_000));
        assert_eq!(times.stall_of(1 << 20, Micros(0)), Micros(STALL_US_MAX));
        times.add(u64::MAX, 500);
        assert_eq!(times.deadline_of(500), Micros(DEADLINE_US_MAX));
        for _ in 0..STEP_TIMES_KEPT {
            times.add(5_000, 500);
        }
        assert_eq!(times.deadline_of(100), Micros(20_000));
    }
}

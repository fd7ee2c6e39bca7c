//! When a choice got its slot and its tokens, for metrics and spans. Taken where the sequencer hands them over, so
//! that the text pool's time does not count.

use std::time::Instant;

use crate::metrics::Metrics;

/// The times of one choice.
pub struct Timing {
    arrived: Instant,
    slot: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

impl Timing {
    pub fn new(arrived: Instant) -> Timing {
        Timing {
            arrived,
            slot: None,
            first_token: None,
            last_token: None,
        }
    }

    /// The sequence has a slot.
    pub fn running(&mut self, at: Instant, metrics: &Metrics) {
        if self.slot.is_none() {
            self.slot = Some(at);
            metrics.queue_time.observe(seconds(self.arrived, at));
        }
    }

    /// Tokens came; gives the time to first token, in seconds, when these are the first.
    pub fn tokens(&mut self, at: Instant, metrics: &Metrics) -> Option<f64> {
        if let Some(last) = self.last_token.replace(at) {
            metrics.inter_token_latency.observe(seconds(last, at));
            return None;
        }
        self.first_token = Some(at);
        if let Some(slot) = self.slot {
            metrics.prefill_time.observe(seconds(slot, at));
        }
        let first = seconds(self.arrived, at);
        metrics.time_to_first_token.observe(first);
        Some(first)
    }

    /// The sequence has ended after so many tokens.
    pub fn finished(&self, tokens: u32, metrics: &Metrics) {
        metrics.request_generation_tokens.observe(tokens.into());
        if let (Some(first), Some(last)) = (self.first_token, self.last_token) {
            let decode = seconds(first, last);
            metrics.decode_time.observe(decode);
            if tokens > 1 {
                metrics
                    .time_per_output_token
                    .observe(decode / f64::from(tokens - 1));
            }
        }
    }
}

fn seconds(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64()
}

//! How often and how long a worker looks for its router.

use std::time::{Duration, Instant};

use crate::config::WorkerConfig;
use crate::error::{Result, WorkerError};

/// First pause; doubles up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// A router that restarts finds its workers back within a few of these.
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// Between two lines in the log while there is no router.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// Counts pauses since the router was last there.
#[derive(Debug)]
pub(super) struct Reconnect {
    router: String,
    limit: Duration,
    since: Instant,
    pause: Duration,
    /// When it was last said that there is no router.
    told: Option<Instant>,
}

impl Reconnect {
    pub(super) fn new(config: &WorkerConfig) -> Reconnect {
        Reconnect {
            router: config.router_addr.clone(),
            limit: config.reconnect_for,
            since: Instant::now(),
            pause: FIRST_PAUSE,
            told: None,
        }
    }

    /// How long to wait before the next attempt; an error once the time is over.
    pub(super) fn after(&mut self, was_attached: bool, reason: String) -> Result<Duration> {
        if was_attached {
            tracing::warn!(router = self.router, reason, "the router is gone; looking for it");
            (self.since, self.pause) = (Instant::now(), FIRST_PAUSE);
        } else if self.told.is_none_or(|told| told.elapsed() >= TELL_EVERY) {
            self.told = Some(Instant::now());
            let (router, seconds) = (&self.router, self.limit.as_secs());
            tracing::info!(
                router,
                reason,
                "no router yet, looking for it for {seconds} s; --router is the port that it prints for workers"
            );
        }
        if self.since.elapsed() >= self.limit {
            return Err(WorkerError::NoRouter {
                router: self.router.clone(),
                seconds: self.limit.as_secs(),
                reason,
            });
        }
        let pause = self.pause;
        self.pause = (pause * 2).min(LAST_PAUSE);
        Ok(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_start_over_after_success() {
        let mut reconnect = Reconnect::new(&WorkerConfig::new("router", ""));
        let pauses: Vec<_> = (0..8)
            .map(|_| reconnect.after(false, String::new()).unwrap())
            .collect();
        assert_eq!(pauses[0], FIRST_PAUSE);
        assert_eq!(pauses[7], LAST_PAUSE);
        assert_eq!(reconnect.after(true, String::new()).unwrap(), FIRST_PAUSE);
    }

    #[test]
    fn the_search_ends() {
        let mut config = WorkerConfig::new("router", "");
        config.reconnect_for = Duration::ZERO;
        let error = Reconnect::new(&config)
            .after(false, "refused".into())
            .unwrap_err();
        assert!(error.to_string().contains("no router at router"), "{error}");
    }
}

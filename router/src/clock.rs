//! The one clock of the router: monotonic time as the core's `Micros`.

use std::time::{Duration, Instant};

use conclave_router_core::api::Micros;

/// Microseconds since the clock was made.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Instant,
}

impl Clock {
    pub fn start() -> Clock {
        Clock {
            start: Instant::now(),
        }
    }

    pub fn now(&self) -> Micros {
        micros(self.start.elapsed())
    }

    /// The time `after` from now.
    pub fn deadline(&self, after: Duration) -> Micros {
        Micros(self.now().0.saturating_add(micros(after).0))
    }
}

/// A duration in microseconds, saturating.
pub fn micros(duration: Duration) -> Micros {
    Micros(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX))
}

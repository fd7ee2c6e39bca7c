//! A deadline of which only time counts that this process ran: after a pause of the whole machine a peer is not to blame
//! for what it could not send.

use std::time::{Duration, Instant};

/// Parts of the deadline. A part counts once, however late this process finds it over.
const PARTS: u32 = 10;

pub(super) struct Patience {
    part: Duration,
    part_end: Instant,
    parts_left: u32,
}

impl Patience {
    pub(super) fn new(deadline: Duration, now: Instant) -> Patience {
        let part = deadline / PARTS;
        Patience {
            part,
            part_end: now + part,
            parts_left: PARTS,
        }
    }

    /// How long to wait before asking again; `None`: the deadline has passed.
    pub(super) fn left(&mut self, now: Instant) -> Option<Duration> {
        if now >= self.part_end {
            self.parts_left = self.parts_left.saturating_sub(1);
            self.part_end = now + self.part;
        }
        (self.parts_left > 0).then(|| self.part_end - now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_millis(500);

    #[test]
    fn the_deadline_passes_for_a_process_that_runs() {
        let begin = Instant::now();
        let mut patience = Patience::new(DEADLINE, begin);
        let mut now = begin;
        while let Some(left) = patience.left(now) {
            assert!(left <= DEADLINE / PARTS);
            now += left;
        }
        assert_eq!(now - begin, DEADLINE);
    }

    #[test]
    fn a_pause_counts_as_one_part() {
        let begin = Instant::now();
        let mut patience = Patience::new(DEADLINE, begin);
        assert!(patience.left(begin).is_some());
        let mut now = begin + 100 * DEADLINE;
        let resumed = now;
        while let Some(left) = patience.left(now) {
            now += left;
        }
        assert_eq!(now - resumed, DEADLINE - DEADLINE / PARTS);
    }
}

//! Fuzzing without tools beside the compiler: a test draws its cases from seeds. Half a second on every test run;
//! `CONCLAVE_FUZZ_SECONDS=60` for more. A case that fails prints its seed; `CONCLAVE_FUZZ_SEED` replays it.

use std::time::{Duration, Instant};

use conclave_plan::random;

/// What one case is drawn from.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub fn word(&mut self) -> u64 {
        random::next(&mut self.0)
    }

    /// Below `end`; 0 if there is nothing below it.
    pub fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.word() % end.max(1) as u64).unwrap_or(0)
    }

    /// One of these, of which there must be one.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    /// A place between two characters.
    pub fn place(&mut self, text: &str) -> usize {
        let mut at = self.below(text.len() + 1);
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        at
    }
}

fn environment(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// The one case that is asked for.
fn replayed() -> Option<u64> {
    environment("CONCLAVE_FUZZ_SEED")
}

/// Whether one case alone runs, to be looked at.
pub fn is_replay() -> bool {
    replayed().is_some()
}

/// Runs `case` with one seed after the other until the time is over, and at least with `least` of them; `test` is the
/// test's name.
pub fn run(test: &str, least: u64, mut case: impl FnMut(&mut Random)) {
    let time = environment("CONCLAVE_FUZZ_SECONDS").map_or(Duration::from_millis(500), Duration::from_secs);
    if let Some(seed) = replayed() {
        return case(&mut Random(seed));
    }
    let began = Instant::now();
    let mut seed = 0;
    while began.elapsed() < time || seed < least {
        let replay = Replay { test, seed };
        case(&mut Random(seed));
        std::mem::forget(replay);
        seed += 1;
    }
    println!("{test}: {seed} cases");
}

/// Says how to repeat a case that panics.
struct Replay<'a> {
    test: &'a str,
    seed: u64,
}

impl Drop for Replay<'_> {
    fn drop(&mut self) {
        eprintln!(
            "replay with CONCLAVE_FUZZ_SEED={} and the test {}",
            self.seed, self.test
        );
    }
}

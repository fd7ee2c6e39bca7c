//! Many seeds. `CONCLAVE_SIM_SEEDS` is how many to run (300 if unset), `CONCLAVE_SIM_SEED` runs that one alone.

use crate::sim::scenario::{Seen, run_seed};

fn setting(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name}={value}: give a number")),
    )
}

/// One in so many seeds runs twice.
const RERUN_EVERY: u64 = 20;

#[test]
fn every_seed_delivers_the_tokens_of_a_run_without_faults() {
    if let Some(seed) = setting("CONCLAVE_SIM_SEED") {
        println!("{:?}", run_seed(seed, None).unwrap());
        return;
    }
    let seeds = setting("CONCLAVE_SIM_SEEDS").unwrap_or(300);
    let first = setting("CONCLAVE_SIM_FIRST").unwrap_or(0);
    let mut total = Seen::default();
    let mut failed = Vec::new();
    for seed in first..first + seeds {
        match run_seed(seed, None) {
            Ok(seen) => {
                if seed % RERUN_EVERY == 0 {
                    assert_eq!(
                        run_seed(seed, None).as_ref(),
                        Ok(&seen),
                        "seed {seed} runs differently again"
                    );
                }
                total.add(&seen);
            }
            Err(problem) => failed.push((seed, problem)),
        }
    }
    println!("{seeds} seeds: {total:?}");
    for (seed, problem) in failed.iter().take(5) {
        println!("seed {seed}: {problem}");
        println!(
            "  CONCLAVE_SIM_SEED={seed} cargo test --release -p conclave-router-core every_seed -- --nocapture"
        );
    }
    assert!(
        failed.is_empty(),
        "{} of {seeds} seeds failed, the first is {}",
        failed.len(),
        failed[0].0
    );
    // A run that meets no trouble proves nothing.
    if seeds >= 300 {
        let rare = [
            total.failed_epochs,
            total.preemptions,
            total.prefix_hits,
            total.cancelled,
            total.rejections,
        ];
        assert!(
            rare.iter().all(|count| *count > seeds / 10),
            "too calm: {total:?}"
        );
        assert!(total.finished > 10 * seeds, "too little load: {total:?}");
    }
}

impl Seen {
    fn add(&mut self, other: &Seen) {
        self.trace ^= other.trace;
        self.finished += other.finished;
        self.epochs += other.epochs;
        self.failed_epochs += other.failed_epochs;
        self.preemptions += other.preemptions;
        self.prefix_hits += other.prefix_hits;
        self.rejections += other.rejections;
        self.cancelled += other.cancelled;
    }
}

//! The core's own bounds, each with its reason. What an operator may set is in `CoreConfig`.
//!
//! Keeps invariant B1 of ARCHITECTURE.md.

/// How long a sequence must wait to pass one that came later with a priority one higher.
pub const AGING_US_PER_LEVEL: i64 = 30_000_000;

/// Priorities beyond this count as this. With the aging above it bounds overtaking: nobody is passed by a sequence
/// that came more than `2 * PRIORITY_LEVELS_MAX * AGING_US_PER_LEVEL` later.
pub const PRIORITY_LEVELS_MAX: i32 = 32;

/// Waiting sequences looked at per step: those that wait for a prefix in the making are passed over, up to here.
pub const ADMISSION_SCAN_MAX: usize = 64;

/// Prompt tokens of one step and worker whose log-probabilities are told: they come back in one message, and their
/// logits are computed, which other prompt tokens need not.
pub const PROMPT_LOGPROBS_PER_STEP_MAX: u32 = 1 << 14;

/// Load of one running sequence, in prompt tokens: a shorter shared prefix is computed again rather than followed
/// to a busier worker.
pub const SEQUENCE_LOAD_TOKENS: u64 = 256;

/// Attention over so many tokens of context costs a decode step about as much as one prompt token.
pub const CONTEXT_LOAD_DIVISOR: u64 = 16;

/// Free pages kept per running sequence when another is admitted, so that it does not push out at its next page
/// those that run.
pub const HEADROOM_PAGES_PER_SEQUENCE: u64 = 1;

/// A worker that broke so many epochs (named by its peers, or failing steps itself) is dismissed.
pub const SUSPICIONS_MAX: u32 = 3;

/// Each suspicion until then multiplies the collective deadline by this: a CPU worker may compute a layer of a long
/// prompt alone for seconds, where the steps before were short.
pub const PATIENCE_PER_SUSPICION: u64 = 4;

/// So many steps completed in a row clear a worker of suspicion.
pub const SUSPICION_CLEARED_STEPS: u64 = 1_000;

/// An epoch must be ready within this (a full-size checkpoint read from a slow disk takes minutes).
pub const FORMING_LIMIT_US: u64 = 900_000_000;

/// A worker's own deadlines should have ended a step long before this many collective deadlines, and before this time
/// (a CPU worker alone may take long over a large chunk).
pub const STALL_DEADLINES: u64 = 4;
pub const STALL_US_MIN: u64 = 60_000_000;

/// The longest that a step's tokens may make it, all layers together.
pub const STALL_US_MAX: u64 = 600_000_000;

/// An epoch serves at least so long before a newcomer changes it, so that a flapping worker cannot stop the others.
pub const JOIN_SPACING_US: u64 = 500_000;

/// Step times kept for the 99th percentile.
pub const STEP_TIMES_KEPT: usize = 256;

/// Collective deadline over the 99th percentile of step times.
pub const DEADLINE_OVER_P99: u64 = 20;

/// Steps of fewer tokens say little about the time of one, and have the epoch's deadline.
pub const MEASURED_TOKENS_MIN: u32 = 16;

/// A token's time until a step was measured: a layer of a small model takes about that on two busy cores.
pub const FIRST_NS_PER_TOKEN: u64 = 1_000_000;

/// The deadline that step times, tokens and suspicions may lead to: a few steps that hung must not make the next epoch wait for minutes.
pub const DEADLINE_US_MAX: u64 = 30_000_000;

/// Range of the retry hint.
pub const RETRY_AFTER_MS_MIN: u64 = 100;
pub const RETRY_AFTER_MS_MAX: u64 = 60_000;

/// The retry hint is the time in which this fraction of the queue is served.
pub const RETRY_QUEUE_DIVISOR: u64 = 4;

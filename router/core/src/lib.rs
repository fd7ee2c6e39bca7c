//! The sequencer: `handle(now, Event) -> commands`. A pure state machine with no I/O, no clock, no randomness
//! and no async, so that the whole cluster logic runs in a seeded simulator with virtual time.
//!
//! It may name nothing but `conclave-plan` and the parts of the standard library that only compute (a test reads the
//! source for that). Nothing in it depends on the order of a hash table or on an address.
//!
//! Way of a request: `requests` checks it and puts it into the `queue`; `admission` places it on a worker by what the
//! `cache` has of it and by load; `schedule` gives its tokens to steps; `results` delivers what comes back and ends it.
//! `epochs` changes the group underneath. One file per state machine: `sequence` (a sequence), `epochs` (the group),
//! `pages` (a page).
//!
//! Operating errors are values: a rejection, a `Finish` with an error, a dismissed worker. Mistakes of this crate or
//! of its caller are assertions, which stay on in release; [`Core::audit`] checks all invariants at once.
//!
//! Keeps invariant D2 of ARCHITECTURE.md.

mod admission;
pub mod api;
mod audit;
mod cache;
mod epochs;
mod limits;
mod member;
mod pages;
mod planted;
mod queue;
mod radix;
mod ranks;
mod rates;
mod requests;
mod results;
mod schedule;
mod sequence;
mod sequencer;
#[cfg(test)]
mod sim;
mod snapshot;

pub use crate::limits::PROMPT_LOGPROBS_PER_STEP_MAX;
pub use crate::sequencer::Core;
pub use crate::snapshot::{Snapshot, WorkerSnapshot};

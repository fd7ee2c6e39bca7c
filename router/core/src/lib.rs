//! The sequencer: `handle(now, Event) -> commands`. A pure state machine with no I/O, no clock, no randomness
//! and no async, so that the whole cluster logic runs in a seeded simulator with virtual time.

pub mod api;

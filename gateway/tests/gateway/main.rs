//! The gateway over real sockets, before a router that speaks the true protocol and says what a test wants.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod anthropic;
mod auth;
mod bad_input;
mod chat;
mod client;
mod completions;
mod errors;
mod lifecycle;
mod ops;
mod responses;
mod router;
mod routers;
mod tls;
mod wire;

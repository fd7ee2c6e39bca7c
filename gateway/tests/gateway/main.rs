//! The gateway over real sockets, before a router that speaks the true protocol and says what a test wants.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod anthropic;
mod anthropic_errors;
mod auth;
mod bad_input;
mod bodies;
mod chat;
mod chat_request;
mod client;
mod completions;
mod errors;
mod http2;
mod lifecycle;
mod not_json;
mod ops;
mod patience;
mod responses;
mod responses_stored;
mod responses_tools;
mod router;
mod routers;
mod tls;
mod wire;

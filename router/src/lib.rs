//! The router process around the core: gRPC for clients and for workers, text work, metrics, spans.
//!
//! One request's way: `api::generate` checks it, `api::prompt` turns it into tokens on the `pool`, `sequencer` feeds
//! it to the core and sends the steps that the core asks for to the workers of `cluster`; their tokens go to the
//! request's inbox in `stream`, become text on the `pool`, and are read by the client.
//!
//! Must stay true: the sequencer never waits and does no text work; every queue has a bound; a bad request disturbs
//! nobody else; a client that is gone frees its slots and pages within a step.

mod api;
mod clock;
mod cluster;
mod config;
mod error;
mod metrics;
mod model;
mod net;
mod pool;
mod random;
mod router;
mod sequencer;
mod server;
mod strangers;
mod stream;
mod trace;

pub use api::chat::from_wire as chat_from_wire;
pub use config::RouterConfig;
pub use error::{Result, RouterError};
pub use router::{Router, run};
pub use sequencer::View;

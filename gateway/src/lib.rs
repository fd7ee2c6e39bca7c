//! HTTP sidecar: OpenAI and Anthropic JSON to gRPC `conclave.v1` and back.
//!
//! What it is: a translator. It holds no conversation, no tokenizer and no template; whatever needs to know
//! text lives in the router, so that gRPC clients get the same. Any number of gateways may run.
//! What it may touch: HTTP, JSON and `conclave-proto`. Nothing else of this workspace.
//! What must stay true: every buffer, wait and list has a bound from [`Limits`] or a named constant; input
//! never panics, it is refused with the field's name; a stream that cannot go on ends with an error event,
//! never with a silent cut; a client that goes away cancels its call to the router at once.

mod anthropic;
mod app;
mod config;
mod docs;
#[cfg(test)]
mod fuzz;
mod generate;
mod http;
mod metrics;
mod metrics_merge;
mod net;
mod openai;
mod ops;
mod responses;
mod routes;
mod server;
mod upstream;

pub use config::{GatewayConfig, Limits, TlsFiles};
pub use http::quota::KeyLimits;
pub use openai::chat_of_request;
pub use routes::{Access, RouteInfo, routes};
pub use server::{Gateway, run};

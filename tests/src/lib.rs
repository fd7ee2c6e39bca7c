//! The harness of the end-to-end tests: real `conclave` processes, real sockets, real checkpoints.
//!
//! A test starts what a user would start, over the public command line, and speaks to it as a client would. Nothing
//! here reaches into a crate of the product. What must stay true: a process that a test started is gone when the test
//! ends, also when it panics; every wait has a bound and says what it waited for.

pub mod client;
pub mod data;
pub mod grpc;
pub mod healthy;
pub mod metrics;
pub mod server;

pub use client::Client;
pub use grpc::Grpc;
pub use healthy::Healthy;
pub use server::Server;

//! The two gRPC servers, with every limit set: the defaults of tonic, hyper and h2 are unlimited or too generous.
//!
//! Keeps invariant B1 of ARCHITECTURE.md.

use std::time::Duration;

use tonic::transport::Server;

/// Connections of clients at once; each costs a descriptor and its windows.
pub const MAX_CLIENT_CONNECTIONS: usize = 16 << 10;
/// Connections of workers at once.
pub const MAX_WORKER_CONNECTIONS: usize = 4 << 10;
/// Connections to the workers' port at once that have not shown the cluster's token.
pub const MAX_STRANGERS: usize = 256;
/// Streams of one connection at once.
pub const MAX_STREAMS_PER_CONNECTION: u32 = 1024;
/// Calls of one connection that have not begun to answer.
pub const MAX_PENDING_CALLS_PER_CONNECTION: usize = 1024;
/// A call that has not begun to answer by then fails. Streams may go on for longer: they begin when admitted.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// A request: more than the largest body that a gateway takes unless told otherwise, so that what is too long is refused
/// by its field.
pub const MAX_REQUEST_BYTES: usize = 16 << 20;
/// A response: prompt log-probabilities of a long prompt are the largest.
pub const MAX_RESPONSE_BYTES: usize = 128 << 20;
/// A worker's message: log-probabilities of a whole batch.
pub const MAX_WORKER_MESSAGE_BYTES: usize = 16 << 20;
/// A message to a worker: a step with masks for all slots.
pub const MAX_STEP_BYTES: usize = 128 << 20;
/// Headers of one call: a traceparent and a few of the client's own.
pub const MAX_HEADER_BYTES: u32 = 16 << 10;
/// Streams that a client may open and reset before they are served (rapid reset); then GOAWAY.
pub const MAX_PENDING_RESETS: usize = 64;
/// Streams that this side may reset because of the client's errors (MadeYouReset); then GOAWAY.
pub const MAX_LOCAL_RESETS: usize = 256;
const FRAME_BYTES: u32 = 16 << 10;
const STREAM_WINDOW_BYTES: u32 = 256 << 10;
const CONNECTION_WINDOW_BYTES: u32 = 1 << 20;
/// A peer that answers no ping is gone, even if its TCP connection is not.
const PING_INTERVAL: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// Streams of an aged connection may finish for so long.
const AGE_GRACE: Duration = Duration::from_secs(600);

/// A server with the limits of both ports.
fn limited() -> Server {
    Server::builder()
        .timeout(CALL_TIMEOUT)
        .max_frame_size(FRAME_BYTES)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keepalive_interval(Some(PING_INTERVAL))
        .http2_keepalive_timeout(Some(PING_TIMEOUT))
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESETS))
        .http2_max_local_error_reset_streams(Some(MAX_LOCAL_RESETS))
        .accept_http1(false)
}

/// For clients.
pub fn for_clients(max_connection_age: Option<Duration>) -> Server {
    let server = limited()
        .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
        .concurrency_limit_per_connection(MAX_PENDING_CALLS_PER_CONNECTION);
    match max_connection_age {
        Some(age) => server.max_connection_age(age).max_connection_age_grace(AGE_GRACE),
        None => server,
    }
}

/// For workers: one stream each.
pub fn for_workers() -> Server {
    limited()
        .max_concurrent_streams(4)
        .concurrency_limit_per_connection(4)
        .initial_stream_window_size(CONNECTION_WINDOW_BYTES)
}

//! The accept loop. One task per connection; a bounded number of them; each ends on its own timers.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use hyper::server::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::guarded::Guarded;
use super::tls::Tls;
use crate::config::Limits;

/// What every HTTP/2 connection with prior knowledge begins with.
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// hyper's floor for an HTTP/1 read buffer.
const HTTP1_BUFFER_MIN: usize = 8 << 10;
/// Streams that a peer reset before they were accepted: more than so many is the rapid-reset attack.
const HTTP2_PENDING_RESETS: usize = 20;
/// Streams that we had to reset because of the peer's errors (MadeYouReset).
const HTTP2_LOCAL_RESETS: usize = 128;
const HTTP2_WINDOW: u32 = 1 << 20;
const HTTP2_SEND_BUFFER: usize = 256 << 10;
const HTTP2_PING_INTERVAL: Duration = Duration::from_secs(20);
/// Pause after the system refused a connection (out of descriptors), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
const BUSY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\ncontent-type: application/json\r\ncontent-length: 109\r\n\r\n{\"error\":{\"message\":\"too many connections\",\"type\":\"server_error\",\"param\":null,\"code\":\"too_many_connections\"}}";

/// What all connections share.
pub(crate) struct Connections {
    pub(crate) service: axum::Router,
    pub(crate) limits: Limits,
    pub(crate) tls: Option<Arc<Tls>>,
    pub(crate) metrics: Arc<crate::metrics::Metrics>,
}

/// Accepts until `shutdown` resolves, then lets running requests end. The caller bounds how long that takes.
pub(crate) async fn accept_loop(
    listener: TcpListener,
    shared: Arc<Connections>,
    shutdown: impl Future<Output = ()>,
) {
    let slots = Arc::new(Semaphore::new(shared.limits.connections));
    let graceful = GracefulShutdown::new();
    let mut shutdown = pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            () = &mut shutdown => break,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "could not accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(slot) = slots.clone().try_acquire_owned() else {
            shared.metrics.connections_refused.inc();
            refuse(stream);
            continue;
        };
        tokio::spawn(serve(stream, shared.clone(), graceful.watcher(), slot));
    }
    drop(listener);
    graceful.shutdown().await;
}

/// Says 503 in as much as the socket takes at once; a refused client is not waited for.
fn refuse(stream: TcpStream) {
    if let Err(error) = stream.try_write(BUSY) {
        tracing::debug!(%error, "a refused connection took no answer");
    }
}

async fn serve(stream: TcpStream, shared: Arc<Connections>, watcher: Watcher, slot: OwnedSemaphorePermit) {
    shared.metrics.connections.inc();
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "no TCP_NODELAY");
    }
    let served = match &shared.tls {
        None => serve_http(stream, &shared, watcher).await,
        Some(tls) => serve_tls(stream, tls, &shared, watcher).await,
    };
    if let Err(error) = served {
        tracing::debug!(error = error.as_ref(), "connection ended");
    }
    shared.metrics.connections.dec();
    drop(slot);
}

type Ended = Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// The handshake has the time that headers have.
async fn serve_tls(stream: TcpStream, tls: &Tls, shared: &Connections, watcher: Watcher) -> Ended {
    let handshake = tls.acceptor().accept(stream);
    let stream = tokio::time::timeout(shared.limits.header_read_timeout, handshake).await??;
    serve_http(stream, shared, watcher).await
}

async fn serve_http<T>(mut stream: T, shared: &Connections, watcher: Watcher) -> Ended
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let limits = &shared.limits;
    let (is_http2, first) =
        tokio::time::timeout(limits.header_read_timeout, read_protocol(&mut stream)).await??;
    if first.is_empty() {
        return Ok(());
    }
    let io = TokioIo::new(Guarded::new(stream, first, !is_http2, limits.write_timeout));
    let service = TowerToHyperService::new(shared.service.clone());
    if is_http2 {
        let connection = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .max_concurrent_streams(limits.streams_per_connection)
            .max_header_list_size(u32::try_from(limits.header_bytes).unwrap_or(u32::MAX))
            .max_pending_accept_reset_streams(HTTP2_PENDING_RESETS)
            .max_local_error_reset_streams(HTTP2_LOCAL_RESETS)
            .initial_stream_window_size(HTTP2_WINDOW)
            .initial_connection_window_size(HTTP2_WINDOW)
            .max_send_buf_size(HTTP2_SEND_BUFFER)
            .keep_alive_interval(HTTP2_PING_INTERVAL)
            .keep_alive_timeout(limits.write_timeout)
            .serve_connection(io, service);
        watcher.watch(connection).await?;
    } else {
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.header_read_timeout)
            .max_headers(limits.header_count)
            .max_header_size(limits.header_bytes)
            .max_buf_size(limits.header_bytes.saturating_mul(2).max(HTTP1_BUFFER_MIN))
            .half_close(false)
            .serve_connection(io, service);
        watcher.watch(connection).await?;
    }
    Ok(())
}

/// Reads just enough to tell HTTP/2 from HTTP/1. Returns what was read; nothing means the peer left.
async fn read_protocol<T: AsyncRead + Unpin>(stream: &mut T) -> io::Result<(bool, Bytes)> {
    let mut first = BytesMut::with_capacity(HTTP2_PREFACE.len());
    loop {
        let common = first.len().min(HTTP2_PREFACE.len());
        if first[..common] != HTTP2_PREFACE[..common] {
            return Ok((false, first.freeze()));
        }
        if common == HTTP2_PREFACE.len() {
            return Ok((true, first.freeze()));
        }
        if stream.read_buf(&mut first).await? == 0 {
            return Ok((false, first.freeze()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_busy_answer_declares_its_length() {
        let text = std::str::from_utf8(BUSY).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(
            head.contains(&format!("content-length: {}", body.len())),
            "{}",
            body.len()
        );
    }
}

//! Accepted connections, bounded: so many at once, and each must begin to speak HTTP/2 soon, or show that it belongs
//! here (see `strangers`).
//!
//! h2 pings find peers that are gone, but only after the handshake; a connection that sends nothing would be kept
//! for ever.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep};
use tokio_stream::{Stream, StreamExt};
use tonic::transport::server::{Connected, TcpIncoming};

use crate::error::{Result, RouterError};
use crate::strangers::{Badge, Stranger, Strangers};

/// The HTTP/2 preface must have come by then, or the proof.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// `PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n`
const PREFACE_BYTES: usize = 24;
/// Finds peers that vanished before the h2 handshake was over.
const TCP_KEEPALIVE: Duration = Duration::from_secs(60);

/// A bound port, as an error names it.
pub fn bind(purpose: &'static str, address: SocketAddr) -> Result<(TcpListener, SocketAddr)> {
    let failed = |source| RouterError::Bind {
        purpose,
        address,
        source,
    };
    let listener = TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

/// What a connection must do to stay.
#[derive(Clone)]
pub enum Demand {
    /// Begin to speak HTTP/2 within this time.
    Preface(Duration),
    /// Prove that it belongs here.
    Proof(Arc<Strangers>),
}

/// The connections of a listener. Above `most` at once, new ones are closed. Must be called within the runtime that
/// is to serve them.
pub fn incoming(
    listener: TcpListener,
    most: usize,
    demand: Demand,
) -> Result<impl Stream<Item = io::Result<Connection>> + Send + use<>> {
    let listener = tokio::net::TcpListener::from_std(listener).map_err(|source| RouterError::Start {
        what: "a listener",
        source,
    })?;
    let places = Arc::new(Semaphore::new(most));
    let accepted = TcpIncoming::from(listener)
        .with_nodelay(Some(true))
        .with_keepalive(Some(TCP_KEEPALIVE));
    Ok(accepted.filter_map(move |accepted| {
        let stream = match accepted {
            Ok(stream) => stream,
            // Out of descriptors, or a peer that hung up already: the listener goes on.
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                return None;
            }
        };
        match Arc::clone(&places).try_acquire_owned() {
            Ok(place) => Some(Ok(Connection::new(stream, place, &demand))),
            Err(_) => {
                tracing::warn!(most, "too many connections; a new one was closed");
                None
            }
        }
    }))
}

/// A connection that holds its place until it is dropped.
pub struct Connection {
    stream: TcpStream,
    probation: Option<Probation>,
    caller: Caller,
    _place: OwnedSemaphorePermit,
}

/// What is asked of a connection before it may stay.
enum Probation {
    /// What is missing of the preface, and the time left.
    Preface(usize, Pin<Box<Sleep>>),
    Stranger(Stranger),
}

/// Who is at the other end of a call's connection.
#[derive(Clone)]
pub struct Caller {
    pub address: Option<SocketAddr>,
    /// Where proof is demanded.
    pub badge: Option<Arc<Badge>>,
}

impl Connection {
    fn new(stream: TcpStream, place: OwnedSemaphorePermit, demand: &Demand) -> Connection {
        let (probation, badge) = match demand {
            Demand::Preface(within) => {
                let probation = Probation::Preface(PREFACE_BYTES, Box::pin(sleep(*within)));
                (probation, None)
            }
            Demand::Proof(strangers) => {
                let (stranger, badge) = strangers.enter();
                (Probation::Stranger(stranger), Some(badge))
            }
        };
        Connection {
            caller: Caller {
                address: stream.peer_addr().ok(),
                badge,
            },
            stream,
            probation: Some(probation),
            _place: place,
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        // What has come counts before the time does: a peer is not to blame for a router that reads late.
        let read = Pin::new(&mut this.stream).poll_read(cx, buffer);
        let count = buffer.filled().len() - before;
        let is_over = match &mut this.probation {
            None => true,
            Some(Probation::Preface(missing, deadline)) => {
                *missing = missing.saturating_sub(count);
                if *missing > 0 && deadline.as_mut().poll(cx).is_ready() {
                    let problem = "no HTTP/2 preface in time";
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, problem)));
                }
                *missing == 0
            }
            Some(Probation::Stranger(stranger)) => stranger.poll_known(count, cx)?,
        };
        if is_over {
            this.probation = None;
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn accept(most: usize) -> (impl Stream<Item = io::Result<Connection>> + Unpin, SocketAddr) {
        let (listener, address) = bind("tests", (Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let incoming = incoming(listener, most, Demand::Preface(Duration::from_millis(100))).unwrap();
        (Box::pin(incoming), address)
    }

    #[tokio::test]
    async fn one_connection_more_than_allowed_is_closed_until_a_place_is_free() {
        let (mut incoming, address) = accept(2).await;
        let mut clients = Vec::new();
        let mut served = Vec::new();
        for _ in 0..2 {
            clients.push(TcpStream::connect(address).await.unwrap());
            served.push(incoming.next().await.unwrap().unwrap());
        }
        let mut refused = TcpStream::connect(address).await.unwrap();
        let accepting = tokio::spawn(async move { incoming.next().await.unwrap().unwrap() });
        assert_eq!(refused.read(&mut [0]).await.unwrap(), 0, "closed");
        served.pop();
        let _third = TcpStream::connect(address).await.unwrap();
        accepting.await.unwrap();
    }

    #[tokio::test]
    async fn a_connection_that_says_nothing_or_too_little_times_out() {
        let (mut incoming, address) = accept(2).await;
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"PRI * HTTP/2.0\r\n").await.unwrap();
        let mut served = incoming.next().await.unwrap().unwrap();
        let mut buffer = [0; 64];
        let error = loop {
            match served.read(&mut buffer).await {
                Ok(count) => assert_eq!(count, 16),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);

        let mut client = TcpStream::connect(address).await.unwrap();
        client
            .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            .await
            .unwrap();
        let mut served = incoming.next().await.unwrap().unwrap();
        // A router that stood still meanwhile.
        tokio::time::sleep(Duration::from_millis(150)).await;
        assert_eq!(served.read(&mut buffer).await.unwrap(), 24);
        let idle = tokio::time::timeout(Duration::from_millis(300), served.read(&mut buffer)).await;
        assert!(idle.is_err(), "after the preface a connection may be idle");
    }
}

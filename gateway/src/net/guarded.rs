//! A connection's bytes with two guards: ambiguous HTTP/1 heads are spoiled on the way in, and a peer that
//! takes nothing for too long ends the connection on the way out.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use super::head_scan::HeadScanner;

/// `T` behind the guards. `first` are bytes that were read while telling the protocol.
pub(super) struct Guarded<T> {
    inner: T,
    first: Bytes,
    scanner: Option<HeadScanner>,
    write_timeout: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<T> Guarded<T> {
    /// `scan` is for HTTP/1 only: HTTP/2 frames its heads itself.
    pub(super) fn new(inner: T, first: Bytes, scan: bool, write_timeout: Duration) -> Self {
        let scanner = scan.then(HeadScanner::default);
        Self {
            inner,
            first,
            scanner,
            write_timeout,
            stalled: None,
        }
    }

    /// Lets `result` pass, and starts, checks or stops the clock of the stalled writer.
    fn watch<R>(&mut self, cx: &mut Context<'_>, result: Poll<io::Result<R>>) -> Poll<io::Result<R>> {
        if result.is_ready() {
            self.stalled = None;
            return result;
        }
        let timeout = self.write_timeout;
        let stalled = self
            .stalled
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(Instant::now() + timeout)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the client does not read",
        )))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Guarded<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = out.filled().len();
        if this.first.has_remaining() {
            let take = this.first.remaining().min(out.remaining());
            out.put_slice(&this.first.split_to(take));
        } else {
            ready!(Pin::new(&mut this.inner).poll_read(cx, out))?;
        }
        if let Some(scanner) = &mut this.scanner {
            scanner.scan(&mut out.filled_mut()[before..]);
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Guarded<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write(cx, bytes);
        self.watch(cx, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write_vectored(cx, slices);
        self.watch(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.inner).poll_flush(cx);
        self.watch(cx, result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.inner).poll_shutdown(cx);
        self.watch(cx, result)
    }
}

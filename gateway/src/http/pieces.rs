//! Bodies that are produced piece by piece by a task of their own, through a bounded channel.
//!
//! A body whose task gave up ends with an error, never like a whole one: HTTP/1 then closes without the last
//! chunk and HTTP/2 resets the stream.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::body::Body;
use bytes::Bytes;
use futures::{StreamExt, stream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// Set by the producer once everything was sent.
pub(super) struct Whole(Arc<AtomicBool>);

impl Whole {
    pub(super) fn set(self) {
        self.0.store(true, Ordering::Release);
    }
}

/// A channel of `capacity` pieces and the body at its other end.
pub(super) fn channel(capacity: usize) -> (mpsc::Sender<Bytes>, Whole, Body) {
    let (sender, receiver) = mpsc::channel(capacity.max(1));
    let flag = Arc::new(AtomicBool::new(false));
    let whole = Whole(flag.clone());
    let verdict = stream::once(async move {
        // The sender is dropped after the flag was set: whoever sees the channel's end sees the flag.
        (!flag.load(Ordering::Acquire)).then(|| Err(io::Error::other("the answer was cut short")))
    });
    let pieces = ReceiverStream::new(receiver)
        .map(Ok)
        .chain(verdict.filter_map(std::future::ready));
    (sender, whole, Body::from_stream(pieces))
}

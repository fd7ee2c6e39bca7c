//! Connections to the workers' port that have not shown the cluster's token yet.
//!
//! Must stay true: they never keep a worker out. There is always room for one more, because the oldest makes way; none
//! stays for longer than a worker needs to say who it is, and none may say more than that needs.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Sleep, sleep};

/// What a stranger may say: a Hello is below 4 KiB, HTTP/2 and headers around it are below 32.
const MAX_BYTES: usize = 64 << 10;

/// All strangers of one port, oldest first.
pub struct Strangers {
    most: usize,
    within: Duration,
    all: Mutex<All>,
}

#[derive(Default)]
struct All {
    next: u64,
    /// A message shows the stranger out; a dropped sender says that it is none any more.
    list: BTreeMap<u64, oneshot::Sender<()>>,
}

/// Says for its connection that it belongs here.
pub struct Badge {
    number: u64,
    strangers: Arc<Strangers>,
}

/// A connection's side.
pub struct Stranger {
    /// Gone with the connection.
    _entry: Entry,
    shown_out: oneshot::Receiver<()>,
    deadline: Pin<Box<Sleep>>,
    said: usize,
}

/// Takes its line off the list.
struct Entry(Arc<Badge>);

impl Strangers {
    /// At most `most` at once, each for at most `within`.
    pub fn new(most: usize, within: Duration) -> Arc<Strangers> {
        Arc::new(Strangers {
            most,
            within,
            all: Mutex::default(),
        })
    }

    /// Lets one in; the oldest goes if there are too many.
    pub fn enter(self: &Arc<Strangers>) -> (Stranger, Arc<Badge>) {
        let (show_out, shown_out) = oneshot::channel();
        let mut all = self.lock();
        if all.list.len() >= self.most
            && let Some((_, oldest)) = all.list.pop_first()
        {
            // It may have hung up already.
            let _ = oldest.send(());
        }
        let number = all.next;
        all.next += 1;
        all.list.insert(number, show_out);
        drop(all);
        let badge = Arc::new(Badge {
            number,
            strangers: Arc::clone(self),
        });
        let stranger = Stranger {
            _entry: Entry(Arc::clone(&badge)),
            shown_out,
            deadline: Box::pin(sleep(self.within)),
            said: 0,
        };
        (stranger, badge)
    }

    fn lock(&self) -> MutexGuard<'_, All> {
        // Every change is a single insert or remove, so a panic elsewhere leaves nothing half done.
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Badge {
    /// The connection has shown the token: nothing is asked of it any more.
    pub fn is_known(&self) {
        self.strangers.lock().list.remove(&self.number);
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.0.is_known();
    }
}

impl Stranger {
    /// Whether it is none any more. `said`: bytes that it said just now.
    ///
    /// # Errors
    /// It has to go.
    pub fn poll_known(&mut self, said: usize, cx: &mut Context<'_>) -> io::Result<bool> {
        match Pin::new(&mut self.shown_out).poll(cx) {
            Poll::Ready(Ok(())) => {
                let problem = "too many connections without the cluster's token; the oldest was closed";
                return Err(io::Error::new(io::ErrorKind::ConnectionAborted, problem));
            }
            Poll::Ready(Err(_)) => return Ok(true),
            Poll::Pending => {}
        }
        self.said += said;
        if self.said > MAX_BYTES {
            let problem = format!("more than {MAX_BYTES} bytes before a Hello with the cluster's token");
            return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
        }
        if said == 0 && self.deadline.as_mut().poll(cx).is_ready() {
            let problem = "no Hello with the cluster's token in time";
            return Err(io::Error::new(io::ErrorKind::TimedOut, problem));
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    fn is_known(stranger: &mut Stranger) -> Result<bool, io::ErrorKind> {
        says(stranger, 0)
    }

    fn says(stranger: &mut Stranger, bytes: usize) -> Result<bool, io::ErrorKind> {
        let known = stranger.poll_known(bytes, &mut Context::from_waker(Waker::noop()));
        known.map_err(|error| error.kind())
    }

    #[tokio::test]
    async fn the_oldest_makes_room_and_who_is_known_or_gone_takes_none() {
        let strangers = Strangers::new(2, Duration::from_secs(60));
        let (mut first, badge) = strangers.enter();
        let (mut second, _) = strangers.enter();
        badge.is_known();
        let (third, _) = strangers.enter();
        assert_eq!(
            (is_known(&mut first), is_known(&mut second)),
            (Ok(true), Ok(false))
        );
        drop(third);
        let (mut fourth, _) = strangers.enter();
        assert_eq!(is_known(&mut second), Ok(false));
        let (mut fifth, _) = strangers.enter();
        assert_eq!(is_known(&mut second), Err(io::ErrorKind::ConnectionAborted));
        assert_eq!(
            (is_known(&mut fourth), is_known(&mut fifth)),
            (Ok(false), Ok(false))
        );
        drop((first, second, fourth, fifth));
        assert!(strangers.lock().list.is_empty());
    }

    #[tokio::test]
    async fn none_stays_long_or_says_much() {
        let strangers = Strangers::new(2, Duration::from_millis(20));
        let (mut silent, _badge) = strangers.enter();
        let (mut known, badge) = strangers.enter();
        badge.is_known();
        sleep(Duration::from_millis(50)).await;
        assert_eq!(is_known(&mut silent), Err(io::ErrorKind::TimedOut));
        assert_eq!(is_known(&mut known), Ok(true));
        let (mut loud, _badge) = strangers.enter();
        assert_eq!(says(&mut loud, MAX_BYTES), Ok(false));
        assert_eq!(says(&mut loud, 1), Err(io::ErrorKind::InvalidData));
    }
}

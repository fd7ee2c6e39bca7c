//! Ends an epoch from another thread: a flag, and a way to wake whoever waits.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use mio::Waker;

/// Shared by the device thread, which waits, and the shell, which hears that the epoch is over.
#[derive(Clone, Debug, Default)]
pub struct Abort {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    aborted: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

impl Abort {
    pub fn new() -> Abort {
        Abort::default()
    }

    /// Every wait of the epoch ends now, and every later one at once.
    pub fn abort(&self) {
        self.inner.aborted.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// The waiter looks around.
    pub(super) fn wake(&self) {
        let waker = self.inner.waker.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(waker) = &*waker {
            // The waiter looks at the flag again at its deadline if this fails.
            let _ = waker.wake();
        }
    }

    pub fn is_aborted(&self) -> bool {
        self.inner.aborted.load(Ordering::SeqCst)
    }

    /// Who is to be woken.
    pub(super) fn set_waker(&self, waker: Waker) {
        *self.inner.waker.lock().unwrap_or_else(PoisonError::into_inner) = Some(waker);
    }
}

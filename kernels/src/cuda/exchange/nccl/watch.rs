//! Ends an epoch whose exchanges do not come to an end. NCCL's kernels wait for peers without a bound, so the host looks
//! at what the stream has passed, and ends the communicator when that does not change for the epoch's timeout.
//!
//! Must stay true: its thread makes no call to the device and waits for nobody.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::backend::Result;
use crate::cuda::Gpu;
use crate::cuda::exchange::control::Control;

/// How often the thread looks while something is queued.
const LOOK_EVERY: Duration = Duration::from_millis(2);

pub(super) struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    control: Control,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Marks queued so far.
    queued: u64,
    /// Since when the stream owes the next one.
    since: Instant,
    timeout: Duration,
    stop: bool,
}

impl Watch {
    /// `control` was cleared: its count of marks begins at zero.
    pub(super) fn new(control: Control, timeout: Duration) -> Result<Watch> {
        let shared = Arc::new(Shared {
            control,
            state: Mutex::new(State {
                queued: 0,
                since: Instant::now(),
                timeout,
                stop: false,
            }),
            changed: Condvar::new(),
        });
        let watched = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("nccl-watch".into())
            .spawn(move || watched.run())
            .map_err(|error| crate::backend::KernelError::Unsupported(format!("no thread: {error}")))?;
        Ok(Watch {
            shared,
            thread: Some(thread),
        })
    }

    pub(super) fn set_timeout(&self, timeout: Duration) {
        self.shared.lock().timeout = timeout;
    }

    /// Whether somebody has ended the epoch.
    pub(super) fn is_over(&self) -> bool {
        self.shared.control.is_aborted()
    }

    /// The stream says so when it has passed this point. Which number it will say.
    pub(super) fn mark(&self, gpu: &Gpu) -> Result<u64> {
        let mut state = self.shared.lock();
        if self.shared.control.done() >= state.queued {
            state.since = Instant::now();
        }
        gpu.stream
            .write_word(&gpu.device, self.shared.control.done_address(), state.queued + 1)?;
        state.queued += 1;
        self.shared.changed.notify_one();
        Ok(state.queued)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut seen = 0;
        let mut state = self.lock();
        while !state.stop {
            let done = self.control.done();
            if done >= state.queued || self.control.is_aborted() {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            if done > seen {
                (seen, state.since) = (done, Instant::now());
            }
            if state.since.elapsed() >= state.timeout {
                self.control.expire();
                continue;
            }
            let waited = self.changed.wait_timeout(state, LOOK_EVERY);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // It cannot panic on anything but a poisoned lock, which it takes as it is.
            let _ = thread.join();
        }
    }
}

//! One epoch's communicator: made within a deadline, used under a lock, ended at any moment from any thread.
//!
//! It is non-blocking: a call that has to wait for peers comes back, and is then asked after until its deadline. Must
//! stay true: no call of the library is made with a communicator whose end has begun; nothing here waits without a
//! bound. NCCL frees a communicator when the last graph that was recorded with it is gone: until then its kernels
//! may be launched (they return at once) and the call that ends it waits, on a thread of its own.

use std::ffi::c_void;
use std::sync::mpsc;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::library::{BYTES, Comm, Config, IN_PROGRESS, Nccl, SUCCESS, UniqueId};
use crate::backend::{KernelError, Result};
use crate::cuda::{Device, Stream};

/// How long the end of a communicator is waited for. It took under 2 ms with a stream that hung on an absent peer.
pub const ABORT_WAIT: Duration = Duration::from_secs(1);
/// A call that is under way is asked after without a pause for so long, then every so often.
const BUSY: Duration = Duration::from_micros(300);
const PAUSE: Duration = Duration::from_micros(50);
/// How long a call that was given up may still go on: it takes 0.1 ms where it waits for no peer.
const FINISH_WITHIN: Duration = Duration::from_millis(50);

/// Bounds a wait for peers.
#[derive(Clone, Copy)]
pub struct Until<'a> {
    pub deadline: Instant,
    /// True once the epoch is over.
    pub cancelled: &'a dyn Fn() -> bool,
}

/// A set of ranks that exchange rows.
pub struct Communicator {
    nccl: &'static Nccl,
    raw: Mutex<Option<Handle>>,
    /// Told when the library has freed it, once its end has begun.
    freed: Mutex<Option<mpsc::Receiver<i32>>>,
    pub rank: u32,
    pub ranks: u32,
}

struct Handle(Comm);

// SAFETY: a communicator may be used from any thread, one at a time: the mutex sees to that.
unsafe impl Send for Handle {}

impl Communicator {
    /// Joins the communicator of `id` as `rank` of `ranks`, which are all of its ranks, each on a device of its own.
    /// `blocking` makes later calls wait for peers themselves: for measuring what asking costs.
    pub(crate) fn connect(
        nccl: &'static Nccl,
        device: &Device,
        id: UniqueId,
        (rank, ranks): (u32, u32),
        blocking: bool,
        until: Until<'_>,
    ) -> Result<Communicator> {
        device.enter()?;
        let mut raw: Comm = std::ptr::null_mut();
        let mut config = Config::new(blocking);
        // SAFETY: pointers to locals; the config is read before the call returns.
        let code = unsafe { (nccl.init)(&mut raw, ranks as i32, id, rank as i32, &mut config) };
        if !matches!(code, SUCCESS | IN_PROGRESS) || raw.is_null() {
            return Err(nccl.error("new communicator", code));
        }
        let communicator = Communicator {
            nccl,
            raw: Mutex::new(Some(Handle(raw))),
            freed: Mutex::new(None),
            rank,
            ranks,
        };
        let joined = settle(nccl, raw, "joining the communicator", until);
        if joined.is_err() {
            communicator.abort();
        }
        joined.map(|()| communicator)
    }

    /// Queues what `body` asks for as one operation, so that sends and receives do not wait for each other.
    pub(crate) fn group(&self, until: Until<'_>, body: impl FnOnce(&Group<'_>) -> Result<()>) -> Result<()> {
        let handle = self.lock();
        let Some(Handle(raw)) = *handle else {
            return Err(self.ended());
        };
        let group = Group { nccl: self.nccl, raw };
        // SAFETY: ended below, whatever `body` says.
        self.nccl.check("group", unsafe { (self.nccl.group_start)() })?;
        let queued = body(&group);
        // SAFETY: begun above.
        let code = unsafe { (self.nccl.group_end)() };
        queued?;
        match code {
            SUCCESS | IN_PROGRESS => {
                let settled = settle(self.nccl, raw, "queueing an exchange", until);
                settled.inspect_err(|_| finish(self.nccl, raw))
            }
            code => Err(self.nccl.error("queueing an exchange", code)),
        }
    }

    /// Ends it here: kernels that wait for peers return, what is queued does nothing. Any thread, any number of times.
    /// Returns after [`ABORT_WAIT`] at the latest; `false`: graphs are still alive, and it will be freed after them.
    pub fn abort(&self) -> bool {
        self.end();
        self.is_freed_within(ABORT_WAIT)
    }

    /// The same without waiting for it.
    pub fn end(&self) {
        let Some(Handle(raw)) = self.lock().take() else {
            return;
        };
        let (abort, handle, (done, freed)) = (self.nccl.abort, Handle(raw), mpsc::channel());
        let run = move || {
            let Handle(raw) = { handle };
            // SAFETY: taken out of its place above, so that nobody else uses it or ends it twice.
            let code = unsafe { abort(raw) };
            // Nobody may be waiting any more.
            let _ = done.send(code);
        };
        *self.freed.lock().unwrap_or_else(PoisonError::into_inner) = Some(freed);
        // Without a thread nothing is received, ever, and the communicator stays.
        let _ = std::thread::Builder::new().name("nccl-abort".into()).spawn(run);
    }

    /// After its end has begun. `false`: it was not freed in this time, or nobody began.
    pub fn is_freed_within(&self, wait: Duration) -> bool {
        let mut freed = self.freed.lock().unwrap_or_else(PoisonError::into_inner);
        let came = freed
            .as_ref()
            .is_some_and(|freed| freed.recv_timeout(wait).is_ok());
        if came {
            *freed = None;
        }
        came
    }

    fn ended(&self) -> KernelError {
        KernelError::Device {
            device: format!("nccl {}", self.nccl.version),
            what: "the communicator was ended".into(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Handle>> {
        self.raw.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Communicator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Communicator(rank {} of {})", self.rank, self.ranks)
    }
}

impl Drop for Communicator {
    /// What the library's thread still frees while the process ends, it frees in ruins: it is waited for.
    fn drop(&mut self) {
        self.abort();
    }
}

/// Sends and receives of one operation.
pub(crate) struct Group<'a> {
    nccl: &'a Nccl,
    raw: Comm,
}

impl Group<'_> {
    /// `bytes` from device memory at `address` to `rank`; nothing for none: the other side does the same.
    ///
    /// # Safety
    /// The memory stays as it is until the stream has passed the operation.
    pub(crate) unsafe fn send(&self, address: u64, bytes: usize, rank: u32, stream: &Stream) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: by the caller's word.
        let code = unsafe {
            (self.nccl.send)(
                address as *const c_void,
                bytes,
                BYTES,
                rank as i32,
                self.raw,
                stream.raw,
            )
        };
        self.queued("send", code)
    }

    /// The other side of [`Group::send`].
    ///
    /// # Safety
    /// The memory has room for `bytes` and is not touched until the stream has passed the operation.
    pub(crate) unsafe fn recv(&self, address: u64, bytes: usize, rank: u32, stream: &Stream) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: by the caller's word.
        let code = unsafe {
            (self.nccl.recv)(
                address as *mut c_void,
                bytes,
                BYTES,
                rank as i32,
                self.raw,
                stream.raw,
            )
        };
        self.queued("receive", code)
    }

    fn queued(&self, what: &str, code: i32) -> Result<()> {
        match code {
            IN_PROGRESS => Ok(()),
            code => self.nccl.check(what, code),
        }
    }
}

fn async_error(nccl: &Nccl, raw: Comm) -> Result<i32> {
    let mut code = SUCCESS;
    // SAFETY: the communicator has not been ended: the caller holds its lock; pointer to a local.
    let asked = unsafe { (nccl.async_error)(raw, &mut code) };
    nccl.check("state of the communicator", asked)?;
    Ok(code)
}

/// Lets a call come to its end that nobody waits for any more, unless it waits for peers: it runs on a thread of the library, which may be
/// recording into a graph, and the caller is about to give that up.
fn finish(nccl: &Nccl, raw: Comm) {
    let until = Instant::now() + FINISH_WITHIN;
    while matches!(async_error(nccl, raw), Ok(IN_PROGRESS)) && Instant::now() < until {
        std::thread::sleep(PAUSE);
    }
}

/// Asks until the call under way has ended.
fn settle(nccl: &Nccl, raw: Comm, what: &str, until: Until<'_>) -> Result<()> {
    let begin = Instant::now();
    loop {
        match async_error(nccl, raw)? {
            SUCCESS => return Ok(()),
            IN_PROGRESS => {}
            code => return Err(nccl.error(what, code)),
        }
        let problem = match Instant::now() {
            _ if (until.cancelled)() => "the epoch is over".to_owned(),
            now if now >= until.deadline => format!("no end within {} ms", begin.elapsed().as_millis()),
            now => {
                match now - begin {
                    waited if waited < BUSY => std::hint::spin_loop(),
                    _ => std::thread::sleep(PAUSE),
                }
                continue;
            }
        };
        return Err(KernelError::Device {
            device: format!("nccl {}", nccl.version),
            what: format!("{what}: {problem}"),
        });
    }
}

//! What happens when a mapped file loses bytes that are in use, because it was cut short or its disk fails: the system
//! sends SIGBUS, and this process alone ends, with one line that names the file. The cluster sees a lost worker.
//!
//! May touch: the process's SIGBUS handler. Must stay true: the handler calls nothing that a signal handler may not
//! (no allocation, no lock); a fault that is not in a mapped file goes to the handler that was there before.

use std::path::Path;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

/// Maps that are watched at once: the files of two of the largest checkpoints. Further ones end the process without
/// their name.
const MAX_MAPS: usize = 8192;
const EXIT_STATUS: libc::c_int = 1;

/// One map; free while `start` is 0, being filled while it is 1.
struct Slot {
    start: AtomicUsize,
    len: AtomicUsize,
    text: AtomicPtr<u8>,
    text_len: AtomicUsize,
}

static MAPS: [Slot; MAX_MAPS] = [const {
    Slot {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        text: AtomicPtr::new(ptr::null_mut()),
        text_len: AtomicUsize::new(0),
    }
}; MAX_MAPS];

/// A map that is watched, until this is dropped.
#[derive(Debug)]
pub(super) struct Watch(Option<usize>);

impl Watch {
    /// Watches `map`, the content of `path`.
    pub(super) fn new(path: &Path, map: &[u8]) -> Watch {
        install();
        let slot = MAPS.iter().position(|slot| {
            slot.start
                .compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        });
        if let Some(slot) = slot.map(|slot| &MAPS[slot]) {
            // Never freed: the handler may be reading it. A path for each file that is opened.
            let text = Box::leak(message(path).into_boxed_str());
            slot.text.store(text.as_mut_ptr(), Ordering::Relaxed);
            slot.text_len.store(text.len(), Ordering::Relaxed);
            slot.len.store(map.len(), Ordering::Relaxed);
            slot.start.store(map.as_ptr() as usize, Ordering::Release);
        }
        Watch(slot)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(slot) = self.0 {
            MAPS[slot].start.store(0, Ordering::Release);
        }
    }
}

fn message(path: &Path) -> String {
    format!(
        "conclave: {}: bytes of the file that are in use are gone (it was cut short, or its disk failed), so this \
         process ends; restore the file, compare its checksum, and start again\n",
        path.display()
    )
}

static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Installs the handler, once.
fn install() {
    BEFORE.get_or_init(|| {
        // SAFETY: all-zero bytes are a valid sigaction.
        let (mut action, mut before): (libc::sigaction, libc::sigaction) = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_bus_error as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: both point at valid structures; the handler has the signature that SA_SIGINFO asks for. A refusal
        // leaves things as they were: the process then ends without the line.
        unsafe { libc::sigaction(libc::SIGBUS, &action, &mut before) };
        before
    });
}

extern "C" fn on_bus_error(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the system passes a valid structure, and an address with this signal.
    let address = unsafe { (*info).si_addr() } as usize;
    for slot in &MAPS {
        let start = slot.start.load(Ordering::Acquire);
        if start > 1 && address.wrapping_sub(start) < slot.len.load(Ordering::Relaxed) {
            let text = slot.text.load(Ordering::Relaxed);
            // SAFETY: the text is never freed; write and _exit may be called from a handler.
            unsafe {
                libc::write(2, text.cast(), slot.text_len.load(Ordering::Relaxed));
                libc::_exit(EXIT_STATUS);
            }
        }
    }
    if let Some(before) = BEFORE.get() {
        // The instruction faults again when this returns, and meets the handler that was there before.
        // SAFETY: a structure that the system filled in.
        unsafe { libc::sigaction(libc::SIGBUS, before, ptr::null_mut()) };
    }
}

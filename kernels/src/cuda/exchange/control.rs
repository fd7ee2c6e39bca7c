//! The host's side of a running exchange: its status, and the word that ends all waiting. Any thread may use it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::nccl::Communicator;
use super::peer::Mapped;
use super::{Fault, FaultReason};
use crate::backend::Result;
use crate::cuda::Device;

/// Words of `HostWords`.
const FAULT: usize = 0;
const EXCHANGE: usize = 1;
const ABORT: usize = 2;
/// Written by the stream itself: what it has passed.
const DONE: usize = 3;
/// A wait of this rank has failed; written and read by kernels.
const STOPPED: usize = 4;
pub(super) const BYTES: usize = 64;

/// Shared by the thread that owns the device and whoever may end the epoch.
#[derive(Clone, Debug)]
pub struct Control {
    words: Arc<Mapped>,
    /// Of an exchange in which it is the library that waits.
    communicator: Arc<Mutex<Option<Arc<Communicator>>>>,
    /// Aborted because time had run out.
    late: Arc<AtomicBool>,
}

impl Control {
    pub(super) fn new(device: &Device) -> Result<Control> {
        Ok(Control {
            words: Arc::new(Mapped::new(device, BYTES)?),
            communicator: Arc::default(),
            late: Arc::default(),
        })
    }

    /// Where kernels find the words.
    pub(super) fn address(&self) -> u64 {
        self.words.device_address
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        self.words.word(index)
    }

    /// Before the first exchange of an epoch, with no kernel running.
    pub(super) fn clear(&self) {
        for index in [FAULT, EXCHANGE, ABORT, DONE, STOPPED] {
            self.word(index).store(0, Ordering::SeqCst);
        }
        self.late.store(false, Ordering::SeqCst);
    }

    /// Every wait of the device ends within microseconds, and later exchanges of the epoch pass.
    pub fn abort(&self) {
        self.word(ABORT).store(1, Ordering::SeqCst);
        let communicator = self.communicator.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(communicator) = &*communicator {
            communicator.end();
        }
    }

    /// The same because a peer has not come in time.
    pub(super) fn expire(&self) {
        self.late.store(true, Ordering::SeqCst);
        self.abort();
    }

    pub(super) fn set_communicator(&self, communicator: Option<Arc<Communicator>>) {
        *self.communicator.lock().unwrap_or_else(PoisonError::into_inner) = communicator;
    }

    /// What the stream has passed.
    pub(super) fn done(&self) -> u64 {
        self.word(DONE).load(Ordering::Acquire)
    }

    pub(super) fn done_address(&self) -> u64 {
        self.words.device_address + DONE as u64 * 8
    }

    pub fn is_aborted(&self) -> bool {
        self.word(ABORT).load(Ordering::SeqCst) != 0
    }

    /// The first fault of the epoch. Reads host memory only, whatever the device does.
    pub fn fault(&self) -> Option<Fault> {
        let fault = self.word(FAULT).load(Ordering::Acquire);
        let reason = match fault >> 32 {
            0 => return None,
            1 => FaultReason::DispatchDeadline,
            2 => FaultReason::CombineDeadline,
            3 if self.late.load(Ordering::SeqCst) => FaultReason::Deadline,
            3 => FaultReason::Aborted,
            _ => FaultReason::Count,
        };
        Some(Fault {
            reason,
            peer: fault as u32,
            exchange: self.word(EXCHANGE).load(Ordering::Acquire) & 0xffff_ffff,
        })
    }
}

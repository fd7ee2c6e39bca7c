//! What other threads may see of the device thread.

use std::sync::atomic::{AtomicU64, Ordering};

/// Read by the heartbeat, written by the device thread.
#[derive(Debug, Default)]
pub struct Status {
    epoch: AtomicU64,
    last_step: AtomicU64,
}

impl Status {
    pub(super) fn set(&self, epoch: u64, last_step: u64) {
        self.last_step.store(last_step, Ordering::Relaxed);
        self.epoch.store(epoch, Ordering::Relaxed);
    }

    /// Live epoch (0: none yet) and the last step that ran in it.
    pub fn get(&self) -> (u64, u64) {
        (
            self.epoch.load(Ordering::Relaxed),
            self.last_step.load(Ordering::Relaxed),
        )
    }
}

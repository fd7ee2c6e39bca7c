//! Processor time of the calling thread: what bounds on work are measured in, so that a busy machine does not fail
//! good work.

use std::time::Duration;

/// Processor time that the calling thread has used since it began.
pub fn processor_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(
        u64::try_from(now.tv_sec).unwrap_or(0),
        u32::try_from(now.tv_nsec).unwrap_or(0),
    )
}

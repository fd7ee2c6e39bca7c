//! Tells the router that this process lives, from a thread of its own: whatever the device or the async shell is busy
//! with, heartbeats go out on time.

use std::sync::Arc;
use std::time::Duration;

use conclave_proto::cluster::v1 as wire;
use conclave_proto::cluster::v1::from_worker::Message;

use crate::device::{Outbox, Status};

/// What a router may ask for; anything else is taken as the nearest of these.
const SHORTEST: Duration = Duration::from_millis(10);
const LONGEST: Duration = Duration::from_secs(10);

/// Beats until the outbox is closed.
pub(super) fn start(outbox: Outbox, status: Arc<Status>, interval_ms: u64) -> std::io::Result<()> {
    let interval = Duration::from_millis(interval_ms).clamp(SHORTEST, LONGEST);
    std::thread::Builder::new()
        .name("heartbeat".into())
        .spawn(move || {
            while !outbox.is_closed() {
                let (epoch, last_step) = status.get();
                // A full outbox means that messages are on their way, which is as good as a heartbeat.
                outbox.send(Message::Heartbeat(wire::Heartbeat { epoch, last_step }));
                std::thread::sleep(interval);
            }
        })?;
    Ok(())
}

//! The driver's calls that the backend needs, with errors as values: context, memory, streams, events, graphs. Handles end
//! with their owner.

mod device;
mod memory;
mod queue;

pub(crate) use device::Device;
pub(super) use device::{CAPABILITY, text};
pub(super) use memory::allocated_bytes;
pub(crate) use memory::{Memory, Pinned};
pub(crate) use queue::{Event, Graph, Stream};

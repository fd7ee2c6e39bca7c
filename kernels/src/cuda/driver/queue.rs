//! Streams of work, what is recorded of them, and points in them.

use cudarc::driver::sys;

use super::Device;
use crate::backend::Result;

/// A queue of work, in order.
pub(crate) struct Stream {
    pub(crate) raw: sys::CUstream,
}

// SAFETY: as for `Device`.
unsafe impl Send for Stream {}

impl Stream {
    pub(crate) fn new(device: &Device) -> Result<Stream> {
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: pointer to a local.
        device.check("stream", unsafe { sys::cuStreamCreate(&mut raw, flags) })?;
        Ok(Stream { raw })
    }

    /// One whose blocks the device takes before those of other streams.
    pub(crate) fn first(device: &Device) -> Result<Stream> {
        let (mut raw, mut greatest) = (std::ptr::null_mut(), 0);
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: pointers to locals; null is allowed for what is not asked for.
        device.check("priorities", unsafe {
            sys::cuCtxGetStreamPriorityRange(std::ptr::null_mut(), &mut greatest)
        })?;
        // SAFETY: pointer to a local.
        device.check("stream", unsafe {
            sys::cuStreamCreateWithPriority(&mut raw, flags, greatest)
        })?;
        Ok(Stream { raw })
    }

    pub(crate) fn wait(&self, device: &Device) -> Result<()> {
        // SAFETY: the stream lives.
        device.check("a kernel or copy failed", unsafe {
            sys::cuStreamSynchronize(self.raw)
        })
    }

    /// What is queued here from now on waits for what `event` was recorded behind; for nothing if it never was.
    pub(crate) fn wait_for(&self, device: &Device, event: &Event) -> Result<()> {
        // SAFETY: both live; the driver keeps what it needs of the event.
        device.check("wait for an event", unsafe {
            sys::cuStreamWaitEvent(self.raw, event.raw, 0)
        })
    }

    /// Whether all work has ended.
    pub(crate) fn is_idle(&self, device: &Device) -> Result<bool> {
        // SAFETY: the stream lives.
        match unsafe { sys::cuStreamQuery(self.raw) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => device.check("a kernel or copy failed", code).map(|()| true),
        }
    }

    pub(crate) fn is_capturing(&self, device: &Device) -> Result<bool> {
        let mut status = sys::CUstreamCaptureStatus_enum::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: the stream lives; pointer to a local.
        device.check("graph capture", unsafe {
            sys::cuStreamIsCapturing(self.raw, &mut status)
        })?;
        Ok(status != sys::CUstreamCaptureStatus_enum::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Writes `value` to pinned host memory when all work before has ended.
    pub(crate) fn write_word(&self, device: &Device, address: u64, value: u64) -> Result<()> {
        // SAFETY: the stream lives; the caller owns the word.
        device.check("word of the stream", unsafe {
            sys::cuStreamWriteValue64_v2(self.raw, address, value, 0)
        })
    }

    /// Records what `work` queues and makes it one launch.
    pub(crate) fn capture(&self, device: &Device, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives; capture is ended below whatever `work` says.
        device.check("graph capture", unsafe {
            sys::cuStreamBeginCapture_v2(self.raw, mode)
        })?;
        let result = work();
        let mut graph = std::ptr::null_mut();
        // SAFETY: pointer to a local; this stream is capturing.
        let ended = unsafe { sys::cuStreamEndCapture(self.raw, &mut graph) };
        if let Err(error) = result.and_then(|()| device.check("end of graph capture", ended)) {
            if !graph.is_null() {
                // SAFETY: what the driver gave of work that was queued in part; it holds what that work belongs to.
                unsafe { sys::cuGraphDestroy(graph) };
            }
            return Err(error);
        }
        let mut raw = std::ptr::null_mut();
        let made = drop_event_nodes(device, graph).and_then(|()| {
            // SAFETY: a graph that the driver just gave.
            let made = unsafe { sys::cuGraphInstantiateWithFlags(&mut raw, graph, 0) };
            device.check("graph instance", made)
        });
        // SAFETY: the instance does not need it any more.
        unsafe { sys::cuGraphDestroy(graph) };
        made.map(|()| Graph { raw })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: no work of ours is queued after the owner's end; the driver finishes what is.
        unsafe { sys::cuStreamDestroy_v2(self.raw) };
    }
}

/// Takes out of a recorded graph the nodes that record events or wait for them. All are NCCL's: each of its kernels waits for the
/// one before by such a node, across graphs, should a communicator's run side by side. Ours follow one another on a stream
/// anyway, and a chain of kernels alone runs faster. Where the library does work on the host as well, which its events
/// order too, they stay.
fn drop_event_nodes(device: &Device, graph: sys::CUgraph) -> Result<()> {
    const WHAT: &str = "nodes of a recorded graph";
    let mut count = 0;
    // SAFETY: a graph that the driver just gave; null asks for the number alone.
    device.check(WHAT, unsafe {
        sys::cuGraphGetNodes(graph, std::ptr::null_mut(), &mut count)
    })?;
    if count == 0 {
        // The driver refuses a list of no nodes.
        return Ok(());
    }
    let mut nodes = vec![std::ptr::null_mut(); count];
    // SAFETY: room for as many.
    device.check(WHAT, unsafe {
        sys::cuGraphGetNodes(graph, nodes.as_mut_ptr(), &mut count)
    })?;
    let mut of_events = Vec::new();
    for node in nodes {
        let mut kind = sys::CUgraphNodeType_enum::CU_GRAPH_NODE_TYPE_EMPTY;
        // SAFETY: a node of the graph; pointer to a local.
        device.check(WHAT, unsafe { sys::cuGraphNodeGetType(node, &mut kind) })?;
        match kind {
            sys::CUgraphNodeType_enum::CU_GRAPH_NODE_TYPE_HOST => return Ok(()),
            sys::CUgraphNodeType_enum::CU_GRAPH_NODE_TYPE_EVENT_RECORD
            | sys::CUgraphNodeType_enum::CU_GRAPH_NODE_TYPE_WAIT_EVENT => of_events.push(node),
            _ => {}
        }
    }
    for node in of_events {
        // SAFETY: a node of the graph, once; nobody else knows it.
        device.check(WHAT, unsafe { sys::cuGraphDestroyNode(node) })?;
    }
    Ok(())
}

/// Recorded work.
pub(crate) struct Graph {
    raw: sys::CUgraphExec,
}

// SAFETY: as for `Device`.
unsafe impl Send for Graph {}

impl Graph {
    /// Puts it on the device, so that its first launch is like any other.
    pub(crate) fn upload(&self, device: &Device, stream: &Stream) -> Result<()> {
        // SAFETY: both live.
        device.check("graph upload", unsafe {
            sys::cuGraphUpload(self.raw, stream.raw)
        })
    }

    pub(crate) fn launch(&self, device: &Device, stream: &Stream) -> Result<()> {
        // SAFETY: both live.
        device.check("graph launch", unsafe {
            sys::cuGraphLaunch(self.raw, stream.raw)
        })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `capture`, destroyed once.
        unsafe { sys::cuGraphExecDestroy(self.raw) };
    }
}

/// A point in a stream, with its time.
pub(crate) struct Event {
    raw: sys::CUevent,
}

// SAFETY: as for `Device`.
unsafe impl Send for Event {}

impl Event {
    pub(crate) fn new(device: &Device) -> Result<Event> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: pointer to a local.
        device.check("event", unsafe { sys::cuEventCreate(&mut raw, 0) })?;
        Ok(Event { raw })
    }

    pub(crate) fn record(&self, device: &Device, stream: &Stream) -> Result<()> {
        // SAFETY: both live.
        device.check("event", unsafe { sys::cuEventRecord(self.raw, stream.raw) })
    }

    pub(crate) fn wait(&self, device: &Device) -> Result<()> {
        // SAFETY: the event lives.
        device.check("a kernel or copy failed", unsafe {
            sys::cuEventSynchronize(self.raw)
        })
    }

    /// Whether everything before it has ended.
    pub(crate) fn happened(&self, device: &Device) -> Result<bool> {
        // SAFETY: the event lives.
        match unsafe { sys::cuEventQuery(self.raw) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => device.check("a kernel or copy failed", code).map(|()| true),
        }
    }

    /// Milliseconds from `earlier` to this; both have happened.
    pub(crate) fn since(&self, device: &Device, earlier: &Event) -> Result<f32> {
        let mut milliseconds = 0.0;
        // SAFETY: pointer to a local; both events live.
        device.check("event", unsafe {
            sys::cuEventElapsedTime_v2(&mut milliseconds, earlier.raw, self.raw)
        })?;
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        unsafe { sys::cuEventDestroy_v2(self.raw) };
    }
}

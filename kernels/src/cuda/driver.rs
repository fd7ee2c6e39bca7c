//! The driver's calls that the backend needs, with errors as values: context, memory, streams, events, graphs.
//!
//! Opens libcuda at run time; without it, or without a device that can run the kernels, creation says what is
//! missing. Handles end with their owner.

use std::ffi::{CStr, c_void};
use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::sys;

use crate::backend::{KernelError, Result};

/// sm_90a code runs on exactly this compute capability.
pub(super) const CAPABILITY: (i32, i32) = (9, 0);
/// Fatbins of a CUDA 13 compiler need a driver of CUDA 13; those of 12.8 run on older ones.
const DRIVER: i32 = 13_000;

/// A device and its primary context, current on the thread that uses it.
pub(crate) struct Device {
    context: sys::CUcontext,
    device: sys::CUdevice,
    pub(crate) name: String,
    pub(crate) multiprocessors: u32,
    /// Shared memory that one block may have, dynamic and static.
    pub(crate) shared_bytes: u32,
    pub(crate) driver_version: i32,
}

// SAFETY: the driver's handles may be used from any thread; `enter` makes the context current where it is used.
unsafe impl Send for Device {}

pub(super) fn text(code: sys::CUresult) -> String {
    let mut message = std::ptr::null();
    // SAFETY: the driver sets `message` to a static string or leaves it null.
    let known = unsafe { sys::cuGetErrorString(code, &mut message) } == sys::CUresult::CUDA_SUCCESS;
    if !known || message.is_null() {
        return format!("{code:?}");
    }
    // SAFETY: not null, so a string of the driver.
    let message = unsafe { CStr::from_ptr(message) };
    format!("{} ({code:?})", message.to_string_lossy())
}

impl Device {
    /// Opens device `ordinal`. `Unsupported` says what is missing.
    pub(crate) fn open(ordinal: i32) -> Result<Device> {
        // SAFETY: only tries to open the library.
        if !unsafe { sys::is_culib_present() } {
            return Err(KernelError::Unsupported(
                "no CUDA driver: libcuda.so.1 cannot be opened; install the NVIDIA driver or run with --device cpu".into(),
            ));
        }
        let unsupported = |what: &str, code| {
            KernelError::Unsupported(format!("CUDA device {ordinal}: {what}: {}", text(code)))
        };
        let check = |what: &str, code| match code {
            sys::CUresult::CUDA_SUCCESS => Ok(()),
            code => Err(unsupported(what, code)),
        };
        let (mut device, mut context, mut driver_version) = (0, std::ptr::null_mut(), 0);
        // SAFETY: every pointer is to a local of the type the call fills.
        unsafe {
            check("the driver does not start", sys::cuInit(0))?;
            check("no version", sys::cuDriverGetVersion(&mut driver_version))?;
            check("no such device", sys::cuDeviceGet(&mut device, ordinal))?;
            check("no context", sys::cuDevicePrimaryCtxRetain(&mut context, device))?;
            check("no context", sys::cuCtxSetCurrent(context))?;
        }
        let attribute = |which| {
            let mut value = 0;
            // SAFETY: as above.
            check("no attribute", unsafe {
                sys::cuDeviceGetAttribute(&mut value, which, device)
            })?;
            Ok(value)
        };
        use sys::CUdevice_attribute_enum as Attribute;
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let mut name = [0; 128];
        // SAFETY: the length is the array's, less the terminating zero that is there already.
        check("no name", unsafe {
            sys::cuDeviceGetName(name.as_mut_ptr(), 127, device)
        })?;
        // SAFETY: terminated: the array was zeros and its last byte was not given away.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }
            .to_string_lossy()
            .into_owned();
        if capability != CAPABILITY {
            return Err(KernelError::Unsupported(format!(
                "CUDA device {ordinal} ({name}) has compute capability {}.{}; the kernels are compiled for 9.0 (H100, H200)",
                capability.0, capability.1
            )));
        }
        Ok(Device {
            context,
            device,
            name,
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
            shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32,
            driver_version,
        })
    }

    /// The driver's number of the device.
    pub(crate) fn raw(&self) -> sys::CUdevice {
        self.device
    }

    /// Makes the context current on this thread.
    pub(crate) fn enter(&self) -> Result<()> {
        // SAFETY: the context lives as long as `self`.
        self.check("use of the context", unsafe {
            sys::cuCtxSetCurrent(self.context)
        })
    }

    pub(crate) fn check(&self, what: &str, code: sys::CUresult) -> Result<()> {
        match code {
            sys::CUresult::CUDA_SUCCESS => Ok(()),
            code => Err(self.error(format!("{what}: {}", text(code)))),
        }
    }

    pub(crate) fn error(&self, what: String) -> KernelError {
        KernelError::Device {
            device: format!("cuda ({})", self.name),
            what,
        }
    }

    /// Why the code cannot be loaded, if the reason is the driver's age.
    pub(crate) fn too_old(&self) -> Option<String> {
        (self.driver_version < DRIVER).then(|| {
            format!(
                "the driver is of CUDA {}.{}; kernels compiled by CUDA 13 need driver 580 or newer",
                self.driver_version / 1000,
                self.driver_version % 1000 / 10
            )
        })
    }

    /// Free and total bytes of device memory.
    pub(crate) fn memory(&self) -> Result<(u64, u64)> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: pointers to locals.
        self.check("memory", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok((free as u64, total as u64))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: retained once in `open`. An error here has nobody to go to.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

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

    pub(crate) fn wait(&self, device: &Device) -> Result<()> {
        // SAFETY: the stream lives.
        device.check("a kernel or copy failed", unsafe {
            sys::cuStreamSynchronize(self.raw)
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
        result?;
        device.check("end of graph capture", ended)?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: a graph that the driver just gave.
        let made = unsafe { sys::cuGraphInstantiateWithFlags(&mut raw, graph, 0) };
        // SAFETY: the instance does not need it any more.
        unsafe { sys::cuGraphDestroy(graph) };
        device.check("graph instance", made)?;
        Ok(Graph { raw })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: no work of ours is queued after the owner's end; the driver finishes what is.
        unsafe { sys::cuStreamDestroy_v2(self.raw) };
    }
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

/// Device memory that this process holds.
static ALLOCATED: AtomicU64 = AtomicU64::new(0);

pub(super) fn allocated_bytes() -> u64 {
    ALLOCATED.load(Ordering::Relaxed)
}

/// Device memory, freed with its owner.
pub(crate) struct Memory {
    pub(crate) address: u64,
    pub(crate) bytes: usize,
}

impl Memory {
    /// At least `bytes`, zeros. `OutOfMemory` names `what` did not fit.
    pub(crate) fn new(device: &Device, stream: &Stream, bytes: usize, what: &str) -> Result<Memory> {
        let memory = Memory::raw(device, bytes, what)?;
        // SAFETY: the memory was just allocated with this size.
        device.check("memset", unsafe {
            sys::cuMemsetD8Async(memory.address, 0, memory.bytes, stream.raw)
        })?;
        Ok(memory)
    }

    /// The same with what was there before: for weights, which are written whole.
    pub(crate) fn raw(device: &Device, bytes: usize, what: &str) -> Result<Memory> {
        let bytes = bytes.max(16).next_multiple_of(16);
        let mut address = 0;
        // SAFETY: pointer to a local.
        match unsafe { sys::cuMemAlloc_v2(&mut address, bytes) } {
            sys::CUresult::CUDA_SUCCESS => {
                ALLOCATED.fetch_add(bytes as u64, Ordering::Relaxed);
                Ok(Memory { address, bytes })
            }
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(KernelError::OutOfMemory {
                device: device.name.clone(),
                what: what.into(),
                needed: bytes as u64,
                free: device.memory().map_or(0, |(free, _)| free),
            }),
            code => Err(device.error(format!("{what}: {}", text(code)))),
        }
    }

    pub(crate) fn write(&self, device: &Device, stream: &Stream, offset: usize, from: &[u8]) -> Result<()> {
        self.bounds(device, offset, from.len())?;
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: bounds checked; the driver has taken pageable memory over when the call returns.
        device.check("copy to the device", unsafe {
            sys::cuMemcpyHtoDAsync_v2(
                self.address + offset as u64,
                from.as_ptr().cast::<c_void>(),
                from.len(),
                stream.raw,
            )
        })
    }

    /// Waits for the stream, before the copy too: a copy that waits in the device's queue holds up those of other threads.
    pub(crate) fn read(&self, device: &Device, stream: &Stream, offset: usize, to: &mut [u8]) -> Result<()> {
        self.bounds(device, offset, to.len())?;
        stream.wait(device)?;
        // SAFETY: bounds checked, and `to` is not touched until the stream has been waited for.
        device.check("copy from the device", unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                to.as_mut_ptr().cast::<c_void>(),
                self.address + offset as u64,
                to.len(),
                stream.raw,
            )
        })?;
        stream.wait(device)
    }

    /// Zeros in the first bytes.
    pub(crate) fn clear(&self, device: &Device, stream: &Stream, bytes: usize) -> Result<()> {
        self.bounds(device, 0, bytes)?;
        // SAFETY: bounds checked.
        device.check("memset", unsafe {
            sys::cuMemsetD8Async(self.address, 0, bytes, stream.raw)
        })
    }

    /// Starts a copy of the first bytes to page-locked memory, which must not be touched before an event after it.
    pub(crate) fn start_read(&self, device: &Device, stream: &Stream, to: &mut [u8]) -> Result<()> {
        self.bounds(device, 0, to.len())?;
        // SAFETY: bounds checked; the caller keeps `to` until the copy has ended.
        device.check("copy from the device", unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                to.as_mut_ptr().cast::<c_void>(),
                self.address,
                to.len(),
                stream.raw,
            )
        })
    }

    pub(crate) fn bounds(&self, device: &Device, offset: usize, bytes: usize) -> Result<()> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.bytes => Ok(()),
            _ => Err(device.error(format!("{bytes} bytes at {offset} of a buffer of {}", self.bytes))),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.address != 0 {
            // SAFETY: allocated by `raw`, freed once; the driver waits for work that uses it.
            unsafe { sys::cuMemFree_v2(self.address) };
            ALLOCATED.fetch_sub(self.bytes as u64, Ordering::Relaxed);
        }
    }
}

/// Page-locked host memory: copies from and to it run beside the host.
pub(crate) struct Pinned {
    address: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for Pinned {}

impl Pinned {
    pub(crate) fn new(device: &Device, bytes: usize) -> Result<Pinned> {
        let mut address = std::ptr::null_mut();
        // SAFETY: pointer to a local.
        device.check("pinned host memory", unsafe {
            sys::cuMemAllocHost_v2(&mut address, bytes)
        })?;
        // SAFETY: just allocated with this size.
        unsafe { std::ptr::write_bytes(address.cast::<u8>(), 0, bytes) };
        Ok(Pinned {
            address: address.cast(),
            bytes,
        })
    }

    pub(crate) fn slice(&self) -> &[u8] {
        // SAFETY: allocated with this size and initialised.
        unsafe { std::slice::from_raw_parts(self.address, self.bytes) }
    }

    pub(crate) fn slice_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed uniquely.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`, freed once.
        unsafe { sys::cuMemFreeHost(self.address.cast()) };
    }
}

//! Memory that several processes or devices reach: a rank's area, its handle for peers, peers' areas mapped here, and
//! pinned host words that kernels write. With `driver` and `kernels` the only file that calls the driver.
//!
//! Must stay true: a mapping ends before the context does; an area outlives every kernel of a live peer that may write to
//! it (the sequencer starts an epoch only after all its ranks have left the one before; of those that were left behind: `OwnArea`).

use std::ffi::c_void;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::sys;

use crate::backend::{KernelError, Result};
use crate::cuda::{Device, Gpu, Memory, Stream};

/// Allocations below this share their block with others, which a handle would open too.
pub(super) const OWN_BLOCK: usize = 2 << 20;

/// What a rank tells its peers about its area, to be sent only to authenticated peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerHandle {
    ipc: [u8; 64],
    /// Names the process: within it areas are reached by address.
    process: u64,
    address: u64,
    ordinal: u64,
    /// Of one side.
    pub area_bytes: u64,
    /// Where the side of the next epoch begins.
    side: u64,
    /// Counts allocations of the process: one that lies where another did is another.
    made: u64,
    /// The device's UUID.
    pub device: [u8; 16],
}

impl PeerHandle {
    pub const BYTES: usize = 128;

    /// Whether two areas lie on one device.
    pub fn shares_device(&self, other: &PeerHandle) -> bool {
        self.device == other.device
    }

    /// Whether two ranks are threads of one process.
    pub fn shares_process(&self, other: &PeerHandle) -> bool {
        self.process == other.process
    }

    /// Whether both are of one allocation, which is mapped once.
    pub(super) fn same_memory(&self, other: &PeerHandle) -> bool {
        let side = self.side;
        *self == PeerHandle { side, ..*other }
    }

    /// Whether it names one of the two sides.
    pub(super) fn names_a_side(&self) -> bool {
        self.side == 0 || self.side == self.area_bytes
    }

    /// The side that it names, where the allocation is mapped at `address`.
    pub(super) fn side_at(&self, address: u64) -> u64 {
        address + self.side
    }

    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..64].copy_from_slice(&self.ipc);
        for (i, word) in [self.process, self.address, self.ordinal, self.area_bytes]
            .iter()
            .enumerate()
        {
            bytes[64 + 8 * i..][..8].copy_from_slice(&word.to_le_bytes());
        }
        bytes[96..112].copy_from_slice(&self.device);
        bytes[112..120].copy_from_slice(&self.side.to_le_bytes());
        bytes[120..].copy_from_slice(&self.made.to_le_bytes());
        bytes
    }

    /// `None`: not so many bytes.
    pub fn from_bytes(bytes: &[u8]) -> Option<PeerHandle> {
        let bytes: &[u8; Self::BYTES] = bytes.try_into().ok()?;
        let word = |i: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[64 + 8 * i..][..8]);
            u64::from_le_bytes(word)
        };
        let (mut ipc, mut device) = ([0; 64], [0; 16]);
        ipc.copy_from_slice(&bytes[..64]);
        device.copy_from_slice(&bytes[96..112]);
        Some(PeerHandle {
            ipc,
            process: word(0),
            address: word(1),
            ordinal: word(2),
            area_bytes: word(3),
            device,
            side: word(6),
            made: word(7),
        })
    }
}

/// A number that this process alone has.
pub(super) fn process_id() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    static ID: OnceLock<u64> = OnceLock::new();
    *ID.get_or_init(|| {
        let mut hasher = std::hash::RandomState::new().build_hasher();
        hasher.write_u32(std::process::id());
        hasher.finish()
    })
}

/// A number of this host, as far as handles reach: CUDA IPC crosses neither hosts nor namespaces of processes or of IPC. 0: unknown.
pub(super) fn host() -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    static HOST: OnceLock<u64> = OnceLock::new();
    *HOST.get_or_init(|| {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let space = |name: &str| std::fs::read_link(format!("/proc/self/ns/{name}"));
        let (Ok(ipc), Ok(pid), false) = (space("ipc"), space("pid"), boot.is_empty()) else {
            return 0;
        };
        let mut hasher = DefaultHasher::new();
        (boot, ipc, pid).hash(&mut hasher);
        hasher.finish().max(1)
    })
}

/// This rank's area: two sides, of which epochs take turns, so that what a rank stores late that was left behind in one meets no row of the
/// next.
pub(super) struct OwnArea {
    memory: Memory,
    /// Names the side of the epoch.
    pub(super) handle: PeerHandle,
}

impl OwnArea {
    /// `bytes`: of a side.
    pub(super) fn new(gpu: &Gpu, bytes: usize) -> Result<OwnArea> {
        let side = bytes.next_multiple_of(OWN_BLOCK);
        let memory = gpu.alloc(2 * side, "receive buffers of the exchange")?;
        let handle = PeerHandle {
            area_bytes: side as u64,
            ..handle_of(gpu, &memory)?
        };
        Ok(OwnArea { memory, handle })
    }

    /// From now on the other side is meant.
    pub(super) fn turn(&mut self) {
        self.handle.side = self.handle.area_bytes - self.handle.side;
    }

    pub(super) fn address(&self) -> u64 {
        self.handle.side_at(self.memory.address)
    }

    /// Zeros in the first bytes of the side.
    pub(super) fn clear(&self, gpu: &Gpu, bytes: usize) -> Result<()> {
        let side = self.handle.side as usize;
        self.memory.clear_from(&gpu.device, &gpu.stream, side, bytes)
    }
}

/// Of memory of its own blocks.
pub(super) fn handle_of(gpu: &Gpu, memory: &Memory) -> Result<PeerHandle> {
    static MADE: AtomicU64 = AtomicU64::new(0);
    let mut ipc = sys::CUipcMemHandle_st { reserved: [0; 64] };
    // SAFETY: pointer to a local; the address is an allocation's beginning.
    let code = unsafe { sys::cuIpcGetMemHandle(&mut ipc, memory.address) };
    gpu.device.check("handle of the exchange's buffers", code)?;
    Ok(PeerHandle {
        ipc: ipc.reserved.map(|byte| byte.cast_unsigned()),
        process: process_id(),
        address: memory.address,
        ordinal: gpu.device.raw() as u64,
        area_bytes: memory.bytes as u64,
        device: uuid(&gpu.device)?,
        side: 0,
        made: MADE.fetch_add(1, Ordering::Relaxed),
    })
}

/// A peer's area as mapped here, both sides.
pub(super) struct PeerArea {
    pub(super) handle: PeerHandle,
    pub(super) address: u64,
    opened: bool,
}

impl PeerArea {
    pub(super) fn open(gpu: &Gpu, handle: &PeerHandle) -> Result<PeerArea> {
        if handle.process == process_id() {
            if handle.ordinal != gpu.device.raw() as u64 {
                reach(&gpu.device, handle.ordinal as i32)?;
            }
            return Ok(PeerArea {
                handle: *handle,
                address: handle.address,
                opened: false,
            });
        }
        let ipc = sys::CUipcMemHandle_st {
            reserved: handle.ipc.map(|byte| byte.cast_signed()),
        };
        let flags = sys::CUipcMem_flags_enum::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut address = 0;
        // SAFETY: pointer to a local; a handle that is not one is refused by the driver.
        let code = unsafe { sys::cuIpcOpenMemHandle_v2(&mut address, ipc, flags) };
        gpu.device.check("mapping a peer's buffers", code)?;
        Ok(PeerArea {
            handle: *handle,
            address,
            opened: true,
        })
    }
}

impl Drop for PeerArea {
    fn drop(&mut self) {
        if self.opened {
            // SAFETY: opened once, closed once, with no kernel of ours running.
            unsafe { sys::cuIpcCloseMemHandle(self.address) };
        }
    }
}

/// Queues a copy between memory of any devices that are mapped here; the caller knows both ranges.
pub(super) fn copy(gpu: &Gpu, stream: &Stream, to: u64, from: u64, bytes: usize) -> Result<()> {
    // SAFETY: both ranges are inside allocations that the caller holds or has mapped.
    let code = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, stream.raw) };
    gpu.device.check("copy to a peer", code)
}

/// Writes into a peer's area and waits; the caller knows the range.
pub(super) fn poke(gpu: &Gpu, to: u64, bytes: &[u8]) -> Result<()> {
    // SAFETY: inside an area that the caller has mapped; `bytes` has been read when the call returns.
    let code = unsafe {
        sys::cuMemcpyHtoDAsync_v2(to, bytes.as_ptr().cast::<c_void>(), bytes.len(), gpu.stream.raw)
    };
    gpu.device.check("copy to a peer", code)?;
    gpu.stream.wait(&gpu.device)
}

fn uuid(device: &Device) -> Result<[u8; 16]> {
    let mut uuid = sys::CUuuid_st { bytes: [0; 16] };
    // SAFETY: pointer to a local.
    let code = unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, device.raw()) };
    device.check("the device's UUID", code)?;
    Ok(uuid.bytes.map(|byte| byte.cast_unsigned()))
}

/// Whether contexts of several processes run on the device at once, by the multi-process service.
pub(super) fn multi_process(device: &Device) -> Result<bool> {
    use sys::CUdevice_attribute_enum as Attribute;
    let mut on = 0;
    // SAFETY: pointer to a local.
    let code = unsafe {
        sys::cuDeviceGetAttribute(&mut on, Attribute::CU_DEVICE_ATTRIBUTE_MPS_ENABLED, device.raw())
    };
    device.check("attribute of the device", code)?;
    Ok(on != 0)
}

/// Lets kernels of `device` reach the memory of device `ordinal` of this process.
fn reach(device: &Device, ordinal: i32) -> Result<()> {
    let (mut other, mut able, mut context) = (0, 0, std::ptr::null_mut());
    // SAFETY: pointers to locals. The other context is retained for the rest of the process, as its rank does.
    unsafe {
        device.check("a peer's device", sys::cuDeviceGet(&mut other, ordinal))?;
        let code = sys::cuDeviceCanAccessPeer(&mut able, device.raw(), other);
        device.check("access to a peer", code)?;
        if able == 0 {
            return Err(KernelError::Unsupported(format!(
                "device {} cannot reach the memory of device {ordinal}",
                device.raw()
            )));
        }
        let code = sys::cuDevicePrimaryCtxRetain(&mut context, other);
        device.check("a peer's context", code)?;
        match sys::cuCtxEnablePeerAccess(context, 0) {
            sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(()),
            code => device.check("access to a peer", code),
        }
    }
}

/// Pinned host memory that kernels address.
#[derive(Debug)]
pub(super) struct Mapped {
    host: *mut u8,
    bytes: usize,
    pub(super) device_address: u64,
}

// SAFETY: words are only reached as atomics; the memory has one owner and outlives every reference to it.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    pub(super) fn new(device: &Device, bytes: usize) -> Result<Mapped> {
        let mut host = std::ptr::null_mut::<c_void>();
        let flags = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
        // SAFETY: pointers to locals; the memory is zeroed before anyone reads it.
        unsafe {
            device.check("pinned host memory", sys::cuMemHostAlloc(&mut host, bytes, flags))?;
            std::ptr::write_bytes(host.cast::<u8>(), 0, bytes);
        }
        let mut mapped = Mapped {
            host: host.cast(),
            bytes,
            device_address: 0,
        };
        // SAFETY: pointer to a local; allocated as mapped above.
        let code = unsafe { sys::cuMemHostGetDevicePointer_v2(&mut mapped.device_address, host, 0) };
        device.check("address of pinned host memory", code)?;
        Ok(mapped)
    }

    pub(super) fn word(&self, index: usize) -> &AtomicU64 {
        assert!((index + 1) * 8 <= self.bytes);
        // SAFETY: inside, aligned (pages), initialised, and only reached as atomics.
        unsafe { AtomicU64::from_ptr(self.host.cast::<u64>().add(index)) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`, freed once.
        unsafe { sys::cuMemFreeHost(self.host.cast()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_survives_its_bytes() {
        let handle = PeerHandle {
            ipc: std::array::from_fn(|i| i as u8 ^ 0xa5),
            process: 0x0123_4567_89ab_cdef,
            address: u64::MAX - 7,
            ordinal: 3,
            area_bytes: 1 << 33,
            device: std::array::from_fn(|i| 200 + i as u8),
            side: 1 << 34,
            made: 5,
        };
        let other = PeerHandle { side: 0, ..handle };
        assert!(handle.same_memory(&other) && handle != other);
        assert!(!handle.same_memory(&PeerHandle { made: 6, ..handle }));
        assert_eq!(PeerHandle::from_bytes(&handle.to_bytes()), Some(handle));
        assert_eq!(PeerHandle::from_bytes(&handle.to_bytes()[1..]), None);
    }
}

//! Memory of the device, and page-locked memory of the host.

use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::sys;

use super::device::text;
use super::{Device, Stream};
use crate::backend::{KernelError, Result};

/// Device memory that this process holds.
static ALLOCATED: AtomicU64 = AtomicU64::new(0);

pub(in crate::cuda) fn allocated_bytes() -> u64 {
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
        self.clear_from(device, stream, 0, bytes)
    }

    /// Zeros in `bytes` bytes from `offset` on.
    pub(crate) fn clear_from(
        &self,
        device: &Device,
        stream: &Stream,
        offset: usize,
        bytes: usize,
    ) -> Result<()> {
        self.bounds(device, offset, bytes)?;
        // SAFETY: bounds checked.
        device.check("memset", unsafe {
            sys::cuMemsetD8Async(self.address + offset as u64, 0, bytes, stream.raw)
        })
    }

    /// Starts a copy of page-locked memory to the first bytes; `from` must not be touched before an event after it.
    pub(crate) fn start_write(&self, device: &Device, stream: &Stream, from: &[u8]) -> Result<()> {
        self.bounds(device, 0, from.len())?;
        // SAFETY: bounds checked; the caller keeps `from` as it is until the copy has ended.
        device.check("copy to the device", unsafe {
            sys::cuMemcpyHtoDAsync_v2(
                self.address,
                from.as_ptr().cast::<c_void>(),
                from.len(),
                stream.raw,
            )
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

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn slice(&self) -> &[u8] {
        // SAFETY: allocated with this size and initialised.
        unsafe { std::slice::from_raw_parts(self.address, self.bytes) }
    }

    /// The same as words.
    pub(crate) fn words_mut(&mut self) -> &mut [u32] {
        // SAFETY: as above; the driver aligns to pages, and any bits are a word.
        unsafe { std::slice::from_raw_parts_mut(self.address.cast::<u32>(), self.bytes / 4) }
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

//! Memory of the CPU backend: zeroed, aligned to a cache line, of fixed size.
//!
//! May touch: the allocator. Must stay true: a [`Memory`] never moves or grows, so that pointers into it stay
//! valid while it lives; what does not fit into the machine is refused with the figures, before it is touched.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use crate::backend::{KernelError, Result};

/// Cache line, and the width of the widest vector.
const ALIGNMENT: usize = 64;
/// From this size on the kernel is asked for huge pages: fewer TLB misses in streaming reads.
const HUGE_PAGE_BYTES: usize = 4 << 20;

/// Zeroed bytes aligned to 64.
#[derive(Debug)]
pub(crate) struct Memory {
    ptr: NonNull<u8>,
    layout: Layout,
    bytes: usize,
}

// SAFETY: `Memory` owns its bytes like a `Box<[u8]>` does; access goes through `&self` and `&mut self`.
unsafe impl Send for Memory {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Memory {}

impl Memory {
    /// `bytes` zeroed bytes; `what` names them in the error.
    pub(crate) fn new(bytes: usize, what: &str) -> Result<Memory> {
        let free = available_bytes();
        let too_much = |free: u64| KernelError::OutOfMemory {
            device: "cpu".into(),
            what: what.into(),
            needed: bytes as u64,
            free,
        };
        if bytes as u64 > free {
            return Err(too_much(free));
        }
        let layout = Layout::from_size_align(bytes.max(ALIGNMENT), ALIGNMENT).map_err(|_| too_much(free))?;
        // SAFETY: the size is not zero.
        let ptr = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(|| too_much(free))?;
        advise_huge_pages(ptr, layout.size());
        Ok(Memory { ptr, layout, bytes })
    }

    /// Room for `count` values of four bytes.
    pub(crate) fn words(count: usize, what: &str) -> Result<Memory> {
        let bytes = count.checked_mul(4).ok_or_else(|| KernelError::OutOfMemory {
            device: "cpu".into(),
            what: what.into(),
            needed: u64::MAX,
            free: available_bytes(),
        })?;
        Memory::new(bytes, what)
    }

    /// Bytes, as asked for.
    pub(crate) fn len(&self) -> usize {
        self.bytes
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: allocated and zeroed with this size.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len()) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: allocated and zeroed with this size, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len()) }
    }

    pub(crate) fn f32(&self) -> &[f32] {
        // SAFETY: aligned to 64; every bit pattern is an f32.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr().cast(), self.len() / 4) }
    }

    pub(crate) fn f32_mut(&mut self) -> &mut [f32] {
        // SAFETY: aligned to 64; every bit pattern is an f32.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr().cast(), self.len() / 4) }
    }
}

impl AsRef<[u8]> for Memory {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout by `new`.
        unsafe { dealloc(self.ptr.as_ptr(), self.layout) }
    }
}

#[cfg(target_os = "linux")]
fn advise_huge_pages(ptr: NonNull<u8>, bytes: usize) {
    const PAGE: usize = 4096;
    let start = (ptr.as_ptr() as usize).next_multiple_of(PAGE);
    let end = (ptr.as_ptr() as usize + bytes) / PAGE * PAGE;
    if bytes >= HUGE_PAGE_BYTES && end > start {
        // SAFETY: whole pages inside our own allocation; the advice does not change their contents, and a
        // refusal only costs speed.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn advise_huge_pages(_: NonNull<u8>, _: usize) {}

/// Memory that can still be had without swapping; `u64::MAX` where the system does not say.
pub(crate) fn available_bytes() -> u64 {
    let Ok(text) = std::fs::read_to_string("/proc/meminfo") else {
        return u64::MAX;
    };
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.map_or(u64::MAX, |kib| kib.saturating_mul(1024))
}

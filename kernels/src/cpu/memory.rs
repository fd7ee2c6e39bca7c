//! Memory of the CPU backend: zeroed, aligned to a cache line, of fixed size.
//!
//! May touch: the allocator; anonymous maps for what is large. Must stay true: a [`Memory`] never moves or grows, so
//! that pointers into it stay valid while it lives; what does not fit into the machine beside what was promised is
//! refused with the figures, before it is touched; no step waits for pages of what [`Memory::new`] gave.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::MmapMut;

use crate::backend::{KernelError, Result};

/// Cache line, and the width of the widest vector.
const ALIGNMENT: usize = 64;
/// From this size on memory is mapped, in huge pages where the system has them: they are zeroed several times as fast
/// as small ones, and reading them in a stream misses the TLB less.
const MAPPED_BYTES: usize = 4 << 20;
/// Systems align a map to huge pages only if its length is a multiple of them.
const HUGE_PAGE: usize = 2 << 20;

/// Bytes of this process that [`Memory::lazy`] gave and that may not be there yet.
static PROMISED: AtomicU64 = AtomicU64::new(0);

/// Zeroed bytes aligned to 64.
#[derive(Debug)]
pub(crate) struct Memory {
    ptr: NonNull<u8>,
    bytes: usize,
    held: Held,
}

/// What the bytes are given back to.
#[derive(Debug)]
enum Held {
    Allocator(Layout),
    Map(#[expect(dead_code, reason = "unmapped when it is dropped")] MmapMut),
    Promise(#[expect(dead_code, reason = "unmapped when it is dropped")] MmapMut),
}

// SAFETY: `Memory` owns its bytes like a `Box<[u8]>` does; access goes through `&self` and `&mut self`.
unsafe impl Send for Memory {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Memory {}

impl Memory {
    /// `bytes` zeroed bytes, all of them there; `what` names them in the error.
    pub(crate) fn new(bytes: usize, what: &str) -> Result<Memory> {
        let too_much = fitting(bytes, what)?;
        if bytes >= MAPPED_BYTES {
            let map = map(bytes).filter(|map| fill(map).is_ok());
            return Memory::of_map(map, bytes, Held::Map).ok_or_else(too_much);
        }
        let layout = Layout::from_size_align(bytes.max(ALIGNMENT), ALIGNMENT).map_err(|_| too_much())?;
        // SAFETY: the size is not zero.
        let ptr = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(too_much)?;
        let held = Held::Allocator(layout);
        Ok(Memory { ptr, bytes, held })
    }

    /// The same for what is used bit by bit and perhaps never whole: each page, a small one, comes and is zeroed when it is
    /// first touched.
    pub(crate) fn lazy(bytes: usize, what: &str) -> Result<Memory> {
        if bytes < MAPPED_BYTES {
            return Memory::new(bytes, what);
        }
        let too_much = fitting(bytes, what)?;
        let memory = Memory::of_map(map(bytes), bytes, Held::Promise).ok_or_else(too_much)?;
        PROMISED.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(memory)
    }

    fn of_map(map: Option<MmapMut>, bytes: usize, held: fn(MmapMut) -> Held) -> Option<Memory> {
        let mut map = map?;
        let ptr = NonNull::new(map.as_mut_ptr())?;
        let held = held(map);
        Some(Memory { ptr, bytes, held })
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

impl crate::weight::Stored for Memory {}

impl AsRef<[u8]> for Memory {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        match self.held {
            // SAFETY: allocated with this layout by `new`.
            Held::Allocator(layout) => unsafe { dealloc(self.ptr.as_ptr(), layout) },
            Held::Map(_) => {}
            Held::Promise(_) => _ = PROMISED.fetch_sub(self.bytes as u64, Ordering::Relaxed),
        }
    }
}

/// The error for `bytes` that cannot be had after all; or at once, if they do not fit beside what was promised.
fn fitting(bytes: usize, what: &str) -> Result<impl Fn() -> KernelError + use<'_>> {
    let free = available_bytes().saturating_sub(PROMISED.load(Ordering::Relaxed));
    let too_much = move || KernelError::OutOfMemory {
        device: "cpu".into(),
        what: what.into(),
        needed: bytes as u64,
        free,
    };
    if bytes as u64 > free {
        return Err(too_much());
    }
    Ok(too_much)
}

/// An anonymous map of `bytes` or a little more. `None`: the system has no room.
fn map(bytes: usize) -> Option<MmapMut> {
    MmapMut::map_anon(bytes.checked_next_multiple_of(HUGE_PAGE)?).ok()
}

/// Brings in all pages. A refusal of huge ones, or by a system that does not know the second call (Linux before 5.14), only
/// costs speed: pages come when they are touched. Being out of memory does not.
#[cfg(target_os = "linux")]
fn fill(map: &MmapMut) -> std::io::Result<()> {
    use memmap2::Advice;
    use std::io::ErrorKind;

    let _ = map.advise(Advice::HugePage);
    match map.advise(Advice::PopulateWrite) {
        Err(error) if error.kind() != ErrorKind::InvalidInput => Err(error),
        _ => Ok(()),
    }
}

#[cfg(not(target_os = "linux"))]
fn fill(_: &MmapMut) -> std::io::Result<()> {
    Ok(())
}

/// Memory that can still be had without swapping; `u64::MAX` where the system does not say.
pub(crate) fn available_bytes() -> u64 {
    let Ok(text) = std::fs::read_to_string("/proc/meminfo") else {
        return u64::MAX;
    };
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.map_or(u64::MAX, |kib| kib.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zeroed_aligned_and_of_the_size_asked_for() {
        for bytes in [0, 1, 64, MAPPED_BYTES - 1, MAPPED_BYTES, MAPPED_BYTES + 1] {
            let mut memory = Memory::new(bytes, "test").unwrap();
            assert_eq!(memory.len(), bytes);
            assert_eq!(memory.bytes().as_ptr() as usize % ALIGNMENT, 0);
            assert!(memory.bytes().iter().all(|&byte| byte == 0));
            memory.bytes_mut().fill(7);
            assert_eq!(memory.bytes().iter().filter(|&&byte| byte == 7).count(), bytes);
        }
    }

    /// Pages of the system that are there.
    #[cfg(target_os = "linux")]
    fn present(memory: &Memory) -> usize {
        let mut present = vec![0_u8; memory.len() / 4096];
        let start = memory.bytes().as_ptr().cast_mut().cast();
        // SAFETY: whole pages of our own map, and a byte of `present` for each.
        let result = unsafe { libc::mincore(start, memory.len(), present.as_mut_ptr()) };
        assert_eq!(result, 0);
        present.iter().filter(|&page| page & 1 == 1).count()
    }

    /// Else steps would wait for the pages of the workspace.
    #[test]
    #[cfg(target_os = "linux")]
    fn large_memory_is_there_before_it_is_touched() {
        let memory = Memory::new(3 * MAPPED_BYTES, "test").unwrap();
        assert_eq!(present(&memory), memory.len() / 4096);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn lazy_memory_comes_page_by_page_and_counts_as_taken() {
        let before = PROMISED.load(Ordering::Relaxed);
        let mut memory = Memory::lazy(3 * MAPPED_BYTES, "test").unwrap();
        assert_eq!(present(&memory), 0);
        memory.bytes_mut()[5 << 20] = 1;
        assert_eq!(present(&memory), 1);
        assert_eq!(memory.bytes().iter().filter(|&&byte| byte != 0).count(), 1);
        // No other test of this file promises anything; those of other files promise less than a map.
        assert_eq!(PROMISED.load(Ordering::Relaxed), before + memory.len() as u64);
        let half = (available_bytes() / 2) as usize + (1 << 30);
        let large = Memory::lazy(half, "half of it").unwrap();
        let refused = Memory::lazy(half, "the other half").unwrap_err().to_string();
        assert!(refused.contains("the other half"), "{refused}");
        drop((memory, large));
        assert_eq!(PROMISED.load(Ordering::Relaxed), before);
    }

    #[test]
    fn more_than_the_machine_has_is_refused_with_the_figures() {
        let error = Memory::new(1 << 50, "a large cache").unwrap_err().to_string();
        assert!(error.contains("a large cache"), "{error}");
        assert!(Memory::words(usize::MAX, "a larger one").is_err());
    }
}

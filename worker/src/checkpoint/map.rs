//! Memory maps of checkpoint files, and slices of them that keep the map alive.
//!
//! May touch: the files, read-only. Must stay true: a slice lies inside its map. Loading populates pages with a call
//! that reports errors of the disk; a file that another process cuts short after that ends this process with one line
//! that names it (`bus.rs`).

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use conclave_kernels::weight::{Bytes, Stored};
use memmap2::{Advice, Mmap};

use super::bus::Watch;
use super::error::{CheckpointError, DOWNLOAD_AGAIN, Result};

/// One mapped file.
#[derive(Debug)]
pub struct MappedFile {
    pub path: PathBuf,
    /// Before the map, so that it ends first.
    _watch: Watch,
    map: Mmap,
    file: File,
}

impl MappedFile {
    pub fn open(path: &Path) -> Result<MappedFile> {
        let failed = |error: std::io::Error| CheckpointError::file(path, error.to_string(), DOWNLOAD_AGAIN);
        let file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(CheckpointError::file(
                path,
                "it is not a regular file",
                DOWNLOAD_AGAIN,
            ));
        }
        if metadata.len() == 0 {
            return Err(CheckpointError::file(path, "it is empty", DOWNLOAD_AGAIN));
        }
        // SAFETY: the map is read-only; nothing of this program writes to the file. If another process does, values
        // change or the process ends, as the head of this file says.
        let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
        Ok(MappedFile {
            path: path.to_owned(),
            _watch: Watch::new(path, &map),
            map,
            file,
        })
    }

    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Asks for huge pages from now on, where the file system keeps files in them: such pages are mapped 512 at a time, and
    /// steps miss the TLB less. Not for the few bytes of a header: what is then read is megabytes. A refusal only costs
    /// speed.
    pub fn prefer_huge_pages(&self) {
        #[cfg(target_os = "linux")]
        let _ = self.map.advise(Advice::HugePage);
    }

    /// Asks the system to read `range` soon; a refusal only costs speed.
    pub fn will_need(&self, start: usize, len: usize) {
        let _ = self.map.advise_range(Advice::WillNeed, start, len);
    }

    /// Reads `range` into memory and maps its pages. Errors of the disk are reported here and not as SIGBUS.
    pub fn populate(&self, start: usize, len: usize) -> Result<()> {
        let Err(error) = self.populate_pages(start, len) else {
            return Ok(());
        };
        // Kernels before 5.14 and other systems do not know the call: touch each page instead.
        if matches!(
            error.kind(),
            std::io::ErrorKind::InvalidInput | std::io::ErrorKind::Unsupported
        ) {
            const PAGE_BYTES: usize = 4096;
            let touched = self.bytes()[start..start + len].iter().step_by(PAGE_BYTES);
            std::hint::black_box(touched.fold(0u8, |sum, byte| sum ^ byte));
            return Ok(());
        }
        let problem = format!("bytes {start} to {} cannot be read: {error}", start + len);
        Err(CheckpointError::file(
            &self.path,
            problem,
            "check the disk, and that nothing changes the file",
        ))
    }

    #[cfg(target_os = "linux")]
    fn populate_pages(&self, start: usize, len: usize) -> std::io::Result<()> {
        self.map.advise_range(Advice::PopulateRead, start, len)
    }

    #[cfg(not(target_os = "linux"))]
    fn populate_pages(&self, _: usize, _: usize) -> std::io::Result<()> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
}

/// Whether the system, by itself, reads ahead in huge pages where a map prefers them. What `will_need` reads is in small
/// ones.
pub fn reads_huge_pages() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease");
        cfg!(target_os = "linux") && release.is_ok_and(|release| is_since_5_18(&release))
    })
}

fn is_since_5_18(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= (5_u32, 18_u32),
        _ => false,
    }
}

/// A part of a mapped file.
#[derive(Clone, Debug)]
pub struct MappedSlice {
    file: Arc<MappedFile>,
    start: usize,
    len: usize,
}

impl MappedSlice {
    /// `None` if the range does not lie inside the file.
    pub fn new(file: &Arc<MappedFile>, start: usize, len: usize) -> Option<MappedSlice> {
        let end = start.checked_add(len)?;
        (end <= file.bytes().len()).then(|| MappedSlice {
            file: Arc::clone(file),
            start,
            len,
        })
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.file.bytes()[self.start..self.start + self.len]
    }

    /// As weights hold them.
    pub fn into_shared(self) -> Bytes {
        Arc::new(self)
    }
}

impl Stored for MappedSlice {
    /// Reads the file: a copy of the page cache's bytes at memory's speed, where each page of a map costs a fault.
    fn read_at(&self, offset: usize, to: &mut [u8]) -> std::io::Result<()> {
        let start = self.start + offset;
        self.file.file.read_exact_at(to, start as u64).map_err(|error| {
            let (path, end) = (self.file.path.display(), start + to.len());
            let problem = format!(
                "{path}: bytes {start} to {end}: {error}; check the disk, and that nothing changes the file"
            );
            std::io::Error::new(error.kind(), problem)
        })
    }
}

impl AsRef<[u8]> for MappedSlice {
    fn as_ref(&self) -> &[u8] {
        self.as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::is_since_5_18;

    #[test]
    fn releases_of_the_system_are_told_apart() {
        for old in ["", "unknown", "4.4.0", "5.15.0-91-generic", "5.17.12"] {
            assert!(!is_since_5_18(old), "{old}");
        }
        for new in ["5.18.0", "6.1.0-18-amd64", "6.18.44\n", "10.0-rc1"] {
            assert!(is_since_5_18(new), "{new}");
        }
    }
}

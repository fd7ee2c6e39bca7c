//! Brings the bytes of tensors into memory ahead of their use, and looks at them once: as fast as the disk or the
//! page cache gives them, on several threads, with progress.
//!
//! Must stay true: only the given tensors are touched; a value that is not finite is refused by the name of its
//! tensor, since it would spoil every token that meets it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use safetensors::Dtype;

use super::parallel;
use super::reader::Named;
use crate::checkpoint::{CheckpointError, Result, Tensor, reads_huge_pages};

/// Bytes that one thread handles at a time: a few milliseconds of work.
const CHUNK_BYTES: usize = 4 << 20;
/// How far ahead of the threads the system is asked to read, where it would read small pages anyway.
const READ_AHEAD_CHUNKS: usize = 8;
/// Where it reads huge ones, as threads touch them, at least so many wait for the disk at once.
const LEAST_READERS: usize = 8;

/// Bytes read in and to be read in. Shared with whoever shows it.
#[derive(Debug, Default)]
pub struct Progress {
    done: AtomicU64,
    total: AtomicU64,
}

impl Progress {
    pub fn new() -> Arc<Progress> {
        Arc::default()
    }

    /// Bytes done and bytes in total.
    pub fn get(&self) -> (u64, u64) {
        (
            self.done.load(Ordering::Relaxed),
            self.total.load(Ordering::Relaxed),
        )
    }

    pub fn expect(&self, bytes: u64) {
        self.total.fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn add(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Asked between two chunks; true ends the load with an error.
pub type Cancelled<'a> = &'a (dyn Fn() -> bool + Sync);

struct Chunk<'a> {
    tensor: Named<'a>,
    offset: usize,
    len: usize,
}

/// Reads all of `tensors`; `progress` expects their bytes.
pub(crate) fn read_in(
    tensors: &[(String, &Tensor)],
    threads: usize,
    progress: &Progress,
    cancelled: Cancelled<'_>,
) -> Result<()> {
    let mut sorted: Vec<Named<'_>> = tensors
        .iter()
        .map(|(name, tensor)| Named { name, tensor })
        .collect();
    sorted.sort_by_key(|named| (&named.tensor.file.path, named.tensor.start));
    let chunks: Vec<Chunk<'_>> = sorted
        .iter()
        .flat_map(|&tensor| {
            (0..tensor.tensor.len)
                .step_by(CHUNK_BYTES)
                .map(move |offset| Chunk {
                    tensor,
                    offset,
                    len: CHUNK_BYTES.min(tensor.tensor.len - offset),
                })
        })
        .collect();
    let (ahead, readers) = if reads_huge_pages() {
        (0, threads.max(LEAST_READERS))
    } else {
        (READ_AHEAD_CHUNKS, threads)
    };
    for chunk in chunks.iter().take(ahead) {
        chunk.will_need();
    }
    parallel::map(readers, &chunks, |index, chunk| {
        if cancelled() {
            let problem = "loading was cancelled";
            return Err(CheckpointError::file(
                &chunk.tensor.tensor.file.path,
                problem,
                "load again",
            ));
        }
        if ahead > 0
            && let Some(next) = chunks.get(index + ahead)
        {
            next.will_need();
        }
        chunk.read()?;
        progress.add(chunk.len as u64);
        Ok(())
    })?;
    Ok(())
}

impl Chunk<'_> {
    fn start(&self) -> usize {
        self.tensor.tensor.start + self.offset
    }

    fn will_need(&self) {
        self.tensor.tensor.file.will_need(self.start(), self.len);
    }

    fn read(&self) -> Result<()> {
        let tensor = self.tensor.tensor;
        tensor.file.populate(self.start(), self.len)?;
        let bytes = &tensor.bytes()[self.offset..self.offset + self.len];
        match not_finite(tensor.dtype, bytes) {
            None => Ok(()),
            Some(index) => {
                let value = self.offset * 8 / tensor.dtype.bitsize() + index;
                Err(self.tensor.error(format!("value {value} is NaN or infinite")))
            }
        }
    }
}

/// Index of a value that is NaN or infinite. One pass without branches, and a second one only if there is any.
fn not_finite(dtype: Dtype, bytes: &[u8]) -> Option<usize> {
    match dtype {
        Dtype::F8_E4M3 => find(bytes, |&code: &u8| code & 0x7f == 0x7f),
        Dtype::BF16 => find(bytes.as_chunks::<2>().0, |&value| {
            u16::from_le_bytes(value) & 0x7f80 == 0x7f80
        }),
        Dtype::F16 => find(bytes.as_chunks::<2>().0, |&value| {
            u16::from_le_bytes(value) & 0x7c00 == 0x7c00
        }),
        Dtype::F32 => find(bytes.as_chunks::<4>().0, |&value| {
            u32::from_le_bytes(value) & 0x7f80_0000 == 0x7f80_0000
        }),
        _ => None,
    }
}

fn find<T>(values: &[T], bad: impl Fn(&T) -> bool) -> Option<usize> {
    const BLOCK: usize = 4096;
    let block = values
        .chunks(BLOCK)
        .position(|block| block.iter().fold(false, |any, value| any | bad(value)))?;
    let start = block * BLOCK;
    values[start..].iter().position(bad).map(|index| start + index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_that_is_not_finite_is_found() {
        let mut codes = vec![0x7e_u8; 10_000];
        assert_eq!(not_finite(Dtype::F8_E4M3, &codes), None);
        codes[9_000] = 0xff;
        assert_eq!(not_finite(Dtype::F8_E4M3, &codes), Some(9_000));
        let bytes = |values: [f32; 3]| {
            values
                .map(|value| half::bf16::from_f32(value).to_le_bytes())
                .concat()
        };
        assert_eq!(not_finite(Dtype::BF16, &bytes([1.0, -2.0, 3e38])), None);
        assert_eq!(
            not_finite(Dtype::BF16, &bytes([1.0, f32::NEG_INFINITY, 0.0])),
            Some(1)
        );
        assert_eq!(not_finite(Dtype::F32, &f32::NAN.to_le_bytes()), Some(0));
        assert_eq!(
            not_finite(Dtype::F16, &half::f16::INFINITY.to_le_bytes()),
            Some(0)
        );
        assert_eq!(not_finite(Dtype::I32, &[0xff; 4]), None);
    }
}

//! Rows of a checkpoint onto the device: through two pinned halves, so that the copy of one overlaps the reading of
//! the next, and repacked there into a stream.

use super::format::TILE_ROWS;
use super::weights::Rows;
use super::{Event, Gpu, Memory, Pinned, shape};
use crate::backend::Result;

/// Bytes of one half: large enough that a copy runs at the bus's speed.
const HALF_BYTES: usize = 32 << 20;

pub(crate) struct Loader {
    halves: [Half; 2],
    next: usize,
}

struct Half {
    host: Pinned,
    device: Memory,
    /// The half's last repack has ended.
    free: Event,
}

/// Mirrors `RepackParams` of `repack.cu`.
#[repr(C)]
struct RepackParams {
    data: u64,
    scales: u64,
    zeros: u64,
    stream: u64,
    rows: i32,
    k: i32,
    tiles: i32,
    stages: i32,
    group: i32,
    bf16_scales: i32,
    row0: i32,
}

impl Loader {
    pub(crate) fn new(gpu: &Gpu) -> Result<Loader> {
        let half = || {
            Ok(Half {
                host: Pinned::new(&gpu.device, HALF_BYTES)?,
                device: Memory::raw(&gpu.device, HALF_BYTES, "loading buffer")?,
                free: Event::new(&gpu.device)?,
            })
        };
        Ok(Loader {
            halves: [half()?, half()?],
            next: 0,
        })
    }

    /// Repacks `rows` into `tiles` tiles at `stream` (an address of memory large enough).
    pub(crate) fn load(&mut self, gpu: &Gpu, rows: &Rows<'_>, tiles: usize, stream: u64) -> Result<()> {
        let row_bytes = rows.row_bytes();
        // FP8 scales belong to 128 rows; whole tiles otherwise.
        let fixed = rows.shared_scales().len() * 4;
        let step = (HALF_BYTES - fixed.min(HALF_BYTES) - 64) / (row_bytes + 64) / 128 * 128;
        if step == 0 {
            return Err(shape(
                "upload",
                "bytes of a row",
                row_bytes,
                format!("at most {}", HALF_BYTES / 256),
            ));
        }
        let stages = rows.format.stages(super::format::padded(rows.inputs));
        for first in (0..rows.outputs).step_by(step) {
            let count = step.min(rows.outputs - first);
            let half = &mut self.halves[self.next];
            self.next = 1 - self.next;
            half.free.wait(&gpu.device)?;
            let host = half.host.slice_mut();
            let mut used = 0;
            let mut put = |from: &[u8]| {
                let at = used;
                host[at..at + from.len()].copy_from_slice(from);
                used = (at + from.len()).next_multiple_of(16);
                at as u64
            };
            let data = put(rows.data(first, count));
            let scales = rows.scales(first, count);
            let scale_bytes: &[f32] = scales;
            let at_scales = put(as_bytes(scale_bytes));
            let zeros = rows.zeros(first, count);
            let at_zeros = zeros.map(&mut put);
            let address = half.device.address;
            half.device
                .write(&gpu.device, &gpu.stream, 0, &half.host.slice()[..used])?;
            let last = first + count == rows.outputs;
            let chunk_tiles = if last {
                tiles - first / TILE_ROWS
            } else {
                count / TILE_ROWS
            };
            let params = RepackParams {
                data: address + data,
                scales: address + at_scales,
                zeros: at_zeros.map_or(0, |at| address + at),
                stream: stream + (first / TILE_ROWS * stages * rows.format.stage_bytes()) as u64,
                rows: count as i32,
                k: rows.inputs as i32,
                tiles: chunk_tiles as i32,
                stages: stages as i32,
                group: rows.group as i32,
                bf16_scales: i32::from(rows.bf16_scales),
                row0: first as i32,
            };
            let warps = (chunk_tiles * stages) as u32;
            let launch = super::Launch {
                grid: (warps.div_ceil(8), 1),
                threads: 256,
                shared: 0,
                overlap: false,
            };
            gpu.launch(&format!("repack_{}", rows.format.name()), launch, &params)?;
            half.free.record(&gpu.device, &gpu.stream)?;
        }
        Ok(())
    }
}

/// The bytes of F32 values in this machine's order, which is the device's.
pub(crate) fn as_bytes<T: Copy>(values: &[T]) -> &[u8] {
    // SAFETY: plain numbers have no padding and any byte may be read.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

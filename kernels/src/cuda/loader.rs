//! Rows of a checkpoint onto the device: several threads fill pinned buffers of their own and copy them over on streams
//! of their own, so that neither a processor core's copying nor a gap between two copies is what the bus waits for; on the
//! device the rows are repacked into a stream.
//!
//! Must stay true: when `load` returns, what it loaded is on the device.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::format::TILE_ROWS;
use super::weights::Rows;
use super::{Device, Event, Gpu, Kernels, Launch, Memory, Pinned, Stream, shape};
use crate::backend::Result;

/// Bytes of one buffer: large enough that a copy runs at the bus's speed.
const BUFFER_BYTES: usize = 16 << 20;
/// A core copies 5 to 10 GB/s, the bus 55.
const LANES: usize = 8;

pub(crate) struct Loader {
    lanes: Vec<Lane>,
}

/// What one thread loads through.
struct Lane {
    host: Pinned,
    device: Memory,
    stream: Stream,
    /// The buffers' last repack has ended.
    free: Event,
}

/// Where a weight goes: `tiles` tiles at an address of memory large enough.
pub(crate) struct Placed<'a> {
    pub(crate) rows: Rows<'a>,
    pub(crate) tiles: usize,
    pub(crate) stream: u64,
}

/// Rows that fit into one buffer.
struct Piece<'a> {
    rows: &'a Rows<'a>,
    first: usize,
    count: usize,
    tiles: usize,
    stream: u64,
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
        let lane = |_| {
            Ok(Lane {
                host: Pinned::new(&gpu.device, BUFFER_BYTES)?,
                device: Memory::raw(&gpu.device, BUFFER_BYTES, "loading buffer")?,
                stream: Stream::new(&gpu.device)?,
                free: Event::new(&gpu.device)?,
            })
        };
        Ok(Loader {
            lanes: (0..LANES).map(lane).collect::<Result<_>>()?,
        })
    }

    /// Repacks every weight to its place.
    pub(crate) fn load(&mut self, gpu: &Gpu, weights: &[Placed<'_>]) -> Result<()> {
        let mut pieces = Vec::new();
        for weight in weights {
            cut(weight, &mut pieces)?;
        }
        let next = AtomicUsize::new(0);
        let (device, kernels) = (&gpu.device, &gpu.kernels);
        let used = self.lanes.len().min(pieces.len());
        let lanes = &mut self.lanes[..used];
        std::thread::scope(|scope| {
            let (pieces, next) = (&pieces, &next);
            let work = |lane: &mut Lane| lane.work(device, kernels, pieces, next);
            let threads: Vec<_> = lanes
                .iter_mut()
                .map(|lane| scope.spawn(move || work(lane)))
                .collect();
            let mut result = Ok(());
            for thread in threads {
                let ended = thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                result = result.and(ended);
            }
            result
        })
    }

    /// Bytes per second of copies from one pinned buffer.
    pub(crate) fn copy_rate(&mut self, gpu: &Gpu) -> Result<f64> {
        const COPIES: usize = 64;
        let lane = &self.lanes[0];
        let (start, end) = (Event::new(&gpu.device)?, Event::new(&gpu.device)?);
        start.record(&gpu.device, &lane.stream)?;
        for _ in 0..COPIES {
            lane.device
                .write(&gpu.device, &lane.stream, 0, lane.host.slice())?;
        }
        end.record(&gpu.device, &lane.stream)?;
        end.wait(&gpu.device)?;
        let seconds = f64::from(end.since(&gpu.device, &start)?) / 1e3;
        Ok((COPIES * BUFFER_BYTES) as f64 / seconds)
    }
}

/// Adds the pieces of one weight.
fn cut<'a>(weight: &'a Placed<'_>, pieces: &mut Vec<Piece<'a>>) -> Result<()> {
    let rows = &weight.rows;
    let row_bytes = rows.row_bytes();
    // FP8 scales belong to 128 rows; whole tiles otherwise.
    let fixed = rows.shared_scales().len() * 4;
    let step = (BUFFER_BYTES - fixed.min(BUFFER_BYTES) - 64) / (row_bytes + 64) / 128 * 128;
    if step == 0 {
        return Err(shape(
            "upload",
            "bytes of a row",
            row_bytes,
            format!("at most {}", BUFFER_BYTES / 256),
        ));
    }
    let tile_bytes = rows.format.stages(super::format::padded(rows.inputs)) * rows.format.stage_bytes();
    for first in (0..rows.outputs).step_by(step) {
        let count = step.min(rows.outputs - first);
        let before = first / TILE_ROWS;
        let last = first + count == rows.outputs;
        pieces.push(Piece {
            rows,
            first,
            count,
            tiles: if last {
                weight.tiles - before
            } else {
                count / TILE_ROWS
            },
            stream: weight.stream + (before * tile_bytes) as u64,
        });
    }
    Ok(())
}

impl Lane {
    /// Takes pieces until none is left, and waits for its own.
    fn work(
        &mut self,
        device: &Device,
        kernels: &Kernels,
        pieces: &[Piece<'_>],
        next: &AtomicUsize,
    ) -> Result<()> {
        device.enter()?;
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = self.load(device, kernels, piece) {
                // The others stop, too.
                next.store(pieces.len(), Ordering::Relaxed);
                return Err(error);
            }
        }
        self.stream.wait(device)
    }

    fn load(&mut self, device: &Device, kernels: &Kernels, piece: &Piece<'_>) -> Result<()> {
        let (rows, first, count) = (piece.rows, piece.first, piece.count);
        self.free.wait(device)?;
        let host = self.host.slice_mut();
        let mut used = 0;
        let mut put = |from: &[u8]| {
            let at = used;
            host[at..at + from.len()].copy_from_slice(from);
            used = (at + from.len()).next_multiple_of(16);
            at as u64
        };
        let data = put(rows.data(first, count));
        let scales = put(as_bytes(rows.scales(first, count)));
        let zeros = rows.zeros(first, count).map(&mut put);
        let address = self.device.address;
        self.device
            .write(device, &self.stream, 0, &self.host.slice()[..used])?;
        let stages = rows.format.stages(super::format::padded(rows.inputs));
        let params = RepackParams {
            data: address + data,
            scales: address + scales,
            zeros: zeros.map_or(0, |at| address + at),
            stream: piece.stream,
            rows: count as i32,
            k: rows.inputs as i32,
            tiles: piece.tiles as i32,
            stages: stages as i32,
            group: rows.group as i32,
            bf16_scales: i32::from(rows.bf16_scales),
            row0: first as i32,
        };
        let warps = (piece.tiles * stages) as u32;
        let launch = Launch {
            grid: (warps.div_ceil(8), 1),
            threads: 256,
            shared: 0,
            overlap: false,
        };
        let name = format!("repack_{}", rows.format.name());
        kernels.launch(device, &self.stream, &name, launch, &params)?;
        self.free.record(device, &self.stream)
    }
}

/// The bytes of F32 values in this machine's order, which is the device's.
pub(crate) fn as_bytes<T: Copy>(values: &[T]) -> &[u8] {
    // SAFETY: plain numbers have no padding and any byte may be read.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

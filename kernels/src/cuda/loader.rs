//! Rows of a checkpoint onto the device: several threads read them into rings of pinned buffers of their own and copy them
//! over on streams of their own, so that neither a core's copying nor a gap between two copies is what the bus waits for; on
//! the device the rows are repacked into a stream, and every value is looked at.
//!
//! Must stay true: when `load` returns, what it loaded is on the device, and all of it is finite.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::format::{TILE_ROWS, padded};
use super::rows::{Part, Rows};
use super::{Device, Event, Format, Gpu, Kernels, Launch, Memory, Pinned, Stream};
use crate::backend::{KernelError, Reading, Result};
use crate::weight::{PackedOrder, ScaleType};

/// Bytes of one buffer: a copy of so many runs at the bus's speed, and all buffers together stay near the cores.
const BUFFER_BYTES: usize = 4 << 20;
/// One is filled while the other is copied.
const BUFFERS: usize = 2;
/// A core reads 5 to 10 GB/s of files in memory, the bus takes 55.
const MOST_LANES: usize = 16;

pub(crate) struct Loader {
    lanes: Vec<Lane>,
}

/// What one thread loads through.
struct Lane {
    slots: [Slot; BUFFERS],
    /// The slot to fill next.
    turn: usize,
    stream: Stream,
    /// A word that is not 0 once a value was not finite.
    spoilt: Memory,
}

struct Slot {
    host: Pinned,
    device: Memory,
    /// The host's buffer has been copied; the device's is the stream's own matter.
    free: Event,
}

/// Where a weight goes: `tiles` tiles at an address of memory large enough.
pub(crate) struct Placed<'a> {
    pub(crate) rows: Rows<'a>,
    /// Of the stream.
    pub(crate) format: Format,
    pub(crate) tiles: usize,
    pub(crate) stream: u64,
}

/// Rows, or inputs, that fit into one buffer.
struct Piece<'a> {
    weight: &'a Placed<'a>,
    first: usize,
    count: usize,
}

/// Where lanes load to, and who is told.
#[derive(Clone, Copy)]
struct To<'a> {
    device: &'a Device,
    kernels: &'a Kernels,
    reading: Reading<'a>,
}

/// Mirrors `RepackParams` of `repack.cu`.
#[repr(C)]
struct RepackParams {
    data: u64,
    scales: u64,
    zeros: u64,
    stream: u64,
    spoilt: u64,
    rows: i32,
    k: i32,
    tiles: i32,
    stages: i32,
    group: i32,
    bf16_scales: i32,
    row0: i32,
    input0: i32,
    stage0: i32,
    stages_here: i32,
    order: i32,
    scale_type: i32,
    zeros_less: i32,
    unused: i32,
}

impl Loader {
    pub(crate) fn new(gpu: &Gpu) -> Result<Loader> {
        let slot = || {
            Ok(Slot {
                host: Pinned::new(&gpu.device, BUFFER_BYTES)?,
                device: Memory::raw(&gpu.device, BUFFER_BYTES, "loading buffer")?,
                free: Event::new(&gpu.device)?,
            })
        };
        let lane = |_| {
            let stream = Stream::new(&gpu.device)?;
            Ok(Lane {
                slots: [slot()?, slot()?],
                turn: 0,
                spoilt: Memory::new(&gpu.device, &stream, 16, "loading flag")?,
                stream,
            })
        };
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Ok(Loader {
            lanes: (0..cores.clamp(2, MOST_LANES)).map(lane).collect::<Result<_>>()?,
        })
    }

    /// Repacks every weight to its place; `reading` is told of every piece.
    pub(crate) fn load(&mut self, gpu: &Gpu, weights: &[Placed<'_>], reading: Reading<'_>) -> Result<()> {
        let mut pieces = Vec::new();
        for weight in weights {
            let step = weight.rows.piece(BUFFER_BYTES)?;
            let all = if weight.rows.by_inputs() {
                weight.rows.inputs
            } else {
                weight.rows.outputs
            };
            pieces.extend((0..all).step_by(step).map(|first| Piece {
                weight,
                first,
                count: step.min(all - first),
            }));
        }
        let next = AtomicUsize::new(0);
        let to = To {
            device: &gpu.device,
            kernels: &gpu.kernels,
            reading,
        };
        let used = self.lanes.len().min(pieces.len());
        let lanes = &mut self.lanes[..used];
        thread::scope(|scope| {
            let (pieces, next) = (&pieces, &next);
            let work = |lane: &mut Lane| lane.work(to, pieces, next);
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

    /// Bytes per second of copies from pinned buffers.
    pub(crate) fn copy_rate(&mut self, gpu: &Gpu) -> Result<f64> {
        const COPIES: usize = 256;
        let slot = &self.lanes[0].slots[0];
        let stream = &self.lanes[0].stream;
        let (start, end) = (Event::new(&gpu.device)?, Event::new(&gpu.device)?);
        start.record(&gpu.device, stream)?;
        for _ in 0..COPIES {
            slot.device.write(&gpu.device, stream, 0, slot.host.slice())?;
        }
        end.record(&gpu.device, stream)?;
        end.wait(&gpu.device)?;
        let seconds = f64::from(end.since(&gpu.device, &start)?) / 1e3;
        Ok((COPIES * BUFFER_BYTES) as f64 / seconds)
    }
}

impl Lane {
    /// Takes pieces until none is left, and waits for its own.
    fn work(&mut self, to: To<'_>, pieces: &[Piece<'_>], next: &AtomicUsize) -> Result<()> {
        let device = to.device;
        device.enter()?;
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = self.load(to, piece) {
                // The others stop, too.
                next.store(pieces.len(), Ordering::Relaxed);
                self.stream.wait(device)?;
                return Err(error);
            }
        }
        let mut spoilt = [0; 4];
        self.spoilt.read(device, &self.stream, 0, &mut spoilt)?;
        if spoilt != [0; 4] {
            self.spoilt.clear(device, &self.stream, 4)?;
            return Err(KernelError::NotFinite);
        }
        Ok(())
    }

    fn load(&mut self, to: To<'_>, piece: &Piece<'_>) -> Result<()> {
        let To {
            device,
            kernels,
            reading,
        } = to;
        let slot = &mut self.slots[self.turn];
        self.turn = (self.turn + 1) % BUFFERS;
        slot.free.wait(device)?;
        let parts = piece.weight.rows.parts(piece.first, piece.count);
        let host = slot.host.slice_mut();
        let mut used = 0;
        let mut put = |part: &Part<'_>| {
            let at = used;
            part.read(&mut host[at..at + part.len()])?;
            used = (at + part.len()).next_multiple_of(16);
            Ok(slot.device.address + at as u64)
        };
        let (data, scales) = (put(&parts.data)?, put(&parts.scales)?);
        let zeros = parts.zeros.as_ref().map(&mut put).transpose()?;
        if !reading(parts.stored()) {
            return Err(KernelError::Stopped);
        }
        slot.device
            .write(device, &self.stream, 0, &slot.host.slice()[..used])?;
        slot.free.record(device, &self.stream)?;
        let params = RepackParams {
            data,
            scales,
            zeros: zeros.unwrap_or(0),
            spoilt: self.spoilt.address,
            ..piece.params()
        };
        let launch = Launch {
            grid: (((params.tiles * params.stages_here) as u32).div_ceil(8), 1),
            threads: 256,
            shared: 0,
            overlap: false,
        };
        let name = piece.weight.format.repack_kernel();
        kernels.launch(device, &self.stream, &name, launch, &params)
    }
}

impl Piece<'_> {
    /// All but where its bytes are.
    fn params(&self) -> RepackParams {
        let (rows, format) = (&self.weight.rows, self.weight.format);
        let stages = format.stages(padded(rows.inputs));
        let by_inputs = rows.by_inputs();
        let last = self.first + self.count == if by_inputs { rows.inputs } else { rows.outputs };
        let here = |all: usize, each: usize| match last {
            true => all - self.first / each,
            false => self.count / each,
        };
        let (stage, tile) = (format.stage_inputs(), TILE_ROWS);
        let (first_tile, tiles, first_stage, stages_here) = match by_inputs {
            true => (0, self.weight.tiles, self.first / stage, here(stages, stage)),
            false => (self.first / tile, here(self.weight.tiles, tile), 0, stages),
        };
        let packed = rows.packed();
        RepackParams {
            data: 0,
            scales: 0,
            zeros: 0,
            spoilt: 0,
            stream: self.weight.stream + format.stream_bytes(first_tile, padded(rows.inputs)) as u64,
            rows: if by_inputs { rows.outputs } else { self.count } as i32,
            k: rows.inputs as i32,
            tiles: tiles as i32,
            stages: stages as i32,
            group: rows.group as i32,
            bf16_scales: i32::from(rows.bf16_scales),
            row0: if by_inputs { 0 } else { self.first } as i32,
            input0: if by_inputs { self.first } else { 0 } as i32,
            stage0: first_stage as i32,
            stages_here: stages_here as i32,
            order: packed.map_or(0, |packed| match packed.order {
                PackedOrder::Rows => 0,
                PackedOrder::Inputs => 1,
                PackedOrder::Outputs => 2,
            }),
            scale_type: packed.map_or(0, |packed| match packed.scale_type {
                ScaleType::F32 => 0,
                ScaleType::F16 => 1,
                ScaleType::Bf16 => 2,
            }),
            zeros_less: packed.map_or(0, |packed| i32::from(packed.zeros_less)),
            unused: 0,
        }
    }
}

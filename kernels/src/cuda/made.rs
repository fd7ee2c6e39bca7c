//! What a worker asks of the device beside the ops: sizes of weights, random weights, and a fault on purpose.

use super::dummy::WeightKind;
use super::format::{TILE_ROWS, padded};
use super::{CudaBackend, Format, Launch};
use crate::backend::{ExpertsId, Result};
use crate::dummy::DummyFormat;

/// Of the driver's allocations: larger ones take whole units.
const UNIT: u64 = 2 << 20;

impl Format {
    pub(crate) fn of(format: DummyFormat) -> Format {
        match format {
            DummyFormat::F32 => Format::F32,
            DummyFormat::F16 => Format::F16,
            DummyFormat::Bf16 => Format::Bf16,
            DummyFormat::Fp8Block => Format::Fp8,
            DummyFormat::Int4 { group } if group.is_multiple_of(128) => Format::Int4G128,
            DummyFormat::Int4 { .. } => Format::Int4G32,
        }
    }
}

impl WeightKind {
    /// `None`: dummy weights are not made in this format.
    pub(super) fn of(format: DummyFormat) -> Option<WeightKind> {
        match Format::of(format) {
            Format::Int4G128 => Some(WeightKind::Int4),
            Format::Int4G32 => Some(WeightKind::Int4G32),
            Format::Fp8 | Format::Fp8Experts => Some(WeightKind::Fp8),
            Format::Bf16 => Some(WeightKind::Bf16),
            Format::F32 => Some(WeightKind::F32),
            Format::F16 => None,
        }
    }
}

/// Bytes of a stream of its own in device memory.
pub(super) fn linear_bytes(format: DummyFormat, outputs: usize, inputs: usize) -> u64 {
    let bytes = Format::of(format).stream_bytes(outputs.div_ceil(TILE_ROWS), padded(inputs)) as u64;
    if bytes > UNIT / 4 {
        bytes.next_multiple_of(UNIT)
    } else {
        bytes
    }
}

/// Bytes of one expert of a layer's block.
pub(super) fn expert_bytes(format: DummyFormat, hidden: usize, inter: usize) -> u64 {
    let format = Format::of(format).of_experts();
    let up = format.stream_bytes(padded(inter) / TILE_ROWS, padded(hidden));
    let down = format.stream_bytes(hidden.div_ceil(TILE_ROWS), padded(inter));
    (2 * up + down) as u64
}

impl CudaBackend {
    pub(super) fn made_experts(
        &mut self,
        format: DummyFormat,
        hidden: usize,
        inter: usize,
        seeds: &[u64],
    ) -> Result<ExpertsId> {
        self.gpu.device.enter()?;
        let block = self.expert_memory(seeds.len(), hidden, inter, Format::of(format), false)?;
        let param = block.param();
        for (index, seed) in seeds.iter().enumerate() {
            let at = param.base + index as u64 * param.expert_bytes;
            self.fill(at, param.expert_bytes as usize, block.format, *seed, hidden)?;
        }
        Ok(self.keep_experts(block))
    }

    /// A kernel that writes where no memory is; the device is of no use afterwards.
    pub(super) fn write_nowhere(&mut self) -> Result<()> {
        self.gpu.device.enter()?;
        let (mut address, mut count, mut base, mut noise, mut seed) = (16u64, 1i32, 0f32, 0f32, 0u64);
        let mut params = [
            std::ptr::from_mut(&mut address).cast(),
            std::ptr::from_mut(&mut count).cast(),
            std::ptr::from_mut(&mut base).cast(),
            std::ptr::from_mut(&mut noise).cast(),
            std::ptr::from_mut(&mut seed).cast(),
        ];
        let launch = Launch {
            grid: (1, 1),
            threads: 32,
            shared: 0,
            overlap: false,
        };
        self.gpu.kernels.launch_raw(
            &self.gpu.device,
            &self.gpu.stream,
            "dummy_vector",
            launch,
            &mut params,
        )?;
        self.gpu.stream.wait(&self.gpu.device)
    }
}

//! Linear weights and vectors on the device: checked on the host, repacked by the loader.

use super::format::{TILE_ROWS, padded};
use super::loader::Placed;
use super::rows::Rows;
use super::{CudaBackend, Format, Memory, shape};
use crate::backend::{LinearId, Reading, Result, VectorId};
use crate::weight::HostLinear;

/// A linear weight as a stream.
pub(crate) struct Linear {
    pub(crate) memory: Memory,
    pub(crate) format: Format,
    pub(crate) rows: usize,
    pub(crate) inputs: usize,
    pub(crate) bf16_scales: bool,
}

/// Mirrors `Weight` of `stream.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct WeightParam {
    stream: u64,
    tiles: i32,
    stages: i32,
    rows: i32,
    bf16_scales: i32,
}

impl Linear {
    pub(crate) fn tiles(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    pub(crate) fn padded(&self) -> usize {
        padded(self.inputs)
    }

    pub(crate) fn param(&self) -> WeightParam {
        WeightParam {
            stream: self.memory.address,
            tiles: self.tiles() as i32,
            stages: self.format.stages(self.padded()) as i32,
            rows: self.rows as i32,
            bf16_scales: i32::from(self.bf16_scales),
        }
    }
}

impl CudaBackend {
    pub(super) fn add_linears(
        &mut self,
        weights: &[HostLinear],
        reading: Reading<'_>,
    ) -> Result<Vec<LinearId>> {
        self.gpu.device.enter()?;
        let (mut placed, mut linears) = (Vec::new(), Vec::new());
        for weight in weights {
            let rows = Rows::new(weight)?;
            let (tiles, inputs) = (rows.outputs.div_ceil(TILE_ROWS), padded(rows.inputs));
            let bytes = rows.format.stream_bytes(tiles, inputs);
            let memory = Memory::raw(&self.gpu.device, bytes, "a weight")?;
            let stream = memory.address;
            linears.push(Linear {
                memory,
                format: rows.format,
                rows: rows.outputs,
                inputs: rows.inputs,
                bf16_scales: rows.bf16_scales,
            });
            placed.push(Placed {
                format: rows.format,
                rows,
                tiles,
                stream,
            });
        }
        self.loader.load(&self.gpu, &placed, reading)?;
        let first = self.linears.len() as u32;
        self.linears.extend(linears);
        Ok((first..self.linears.len() as u32).map(LinearId).collect())
    }

    pub(super) fn add_vector(&mut self, values: &[f32]) -> Result<VectorId> {
        self.gpu.device.enter()?;
        let memory = Memory::raw(&self.gpu.device, values.len() * 4, "a vector")?;
        self.gpu.write(&memory, 0, super::rows::as_bytes(values))?;
        self.vectors.push((memory, values.len()));
        Ok(VectorId(self.vectors.len() as u32 - 1))
    }

    pub(super) fn linear(&self, op: &'static str, id: LinearId) -> Result<&Linear> {
        self.linears
            .get(id.0 as usize)
            .ok_or_else(|| shape(op, "weight", id.0, "an uploaded one"))
    }

    /// The vector's address, if it has `len` values.
    pub(super) fn vector(&self, op: &'static str, id: VectorId, len: usize) -> Result<u64> {
        match self.vectors.get(id.0 as usize) {
            Some((memory, found)) if *found == len => Ok(memory.address),
            Some((_, found)) => Err(shape(op, "vector length", found, len)),
            None => Err(shape(op, "vector", id.0, "an uploaded one")),
        }
    }
}

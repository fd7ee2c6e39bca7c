//! Linear weights and vectors on the device: checked on the host, repacked by the loader.

use super::format::{TILE_ROWS, padded};
use super::loader::Placed;
use super::{CudaBackend, Format, Memory, shape};
use crate::backend::{LinearId, Result, VectorId};
use crate::weight::{HostInt4, HostLinear, HostWeight};

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

/// A host weight whose sizes have been checked: what the loader reads.
pub(crate) struct Rows<'a> {
    weight: &'a HostWeight,
    pub(crate) format: Format,
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    pub(crate) group: usize,
    pub(crate) bf16_scales: bool,
}

impl<'a> Rows<'a> {
    /// Checks that the bytes, scales and zero points are those of the shape.
    pub(crate) fn new(linear: &'a HostLinear) -> Result<Rows<'a>> {
        const OP: &str = "upload";
        let (outputs, inputs) = (linear.out_features, linear.in_features);
        let values = outputs
            .checked_mul(inputs)
            .filter(|n| *n > 0 && *n <= 1 << 40 && inputs.is_multiple_of(2));
        let values = values.ok_or_else(|| {
            shape(
                OP,
                "shape",
                format!("[{outputs}, {inputs}]"),
                "non-empty, an even number of inputs",
            )
        })?;
        let (bytes, expected) = match &linear.data {
            HostWeight::F32(data) => (data.as_ref().as_ref().len(), values * 4),
            HostWeight::Bf16(data) | HostWeight::F16(data) => (data.as_ref().as_ref().len(), values * 2),
            HostWeight::Fp8Block { data, scales } => {
                let blocks = outputs.div_ceil(128) * inputs.div_ceil(128);
                if scales.len() != blocks {
                    return Err(shape(OP, "fp8 scales", scales.len(), blocks));
                }
                (data.as_ref().as_ref().len(), values)
            }
            HostWeight::Int4(int4) => {
                check_int4(int4, outputs, inputs)?;
                (int4.packed.as_ref().as_ref().len(), values / 2)
            }
        };
        if bytes != expected {
            return Err(shape(OP, "weight bytes", bytes, expected));
        }
        let (format, group) = match &linear.data {
            HostWeight::F32(_) => (Format::F32, 1),
            HostWeight::Bf16(_) => (Format::Bf16, 1),
            HostWeight::F16(_) => (Format::F16, 1),
            HostWeight::Fp8Block { .. } => (Format::Fp8, 128),
            HostWeight::Int4(int4) if int4.group.is_multiple_of(128) => (Format::Int4G128, int4.group),
            HostWeight::Int4(int4) => (Format::Int4G32, int4.group),
        };
        let bf16_scales = match &linear.data {
            HostWeight::Int4(int4) => needs_bf16(&int4.scales),
            _ => false,
        };
        Ok(Rows {
            weight: &linear.data,
            format,
            outputs,
            inputs,
            group,
            bf16_scales,
        })
    }

    pub(crate) fn row_bytes(&self) -> usize {
        match self.format {
            Format::Int4G128 | Format::Int4G32 => self.inputs / 2 + self.inputs / self.group * 5,
            Format::Fp8 => self.inputs,
            Format::Bf16 | Format::F16 => self.inputs * 2,
            Format::F32 => self.inputs * 4,
        }
    }

    pub(crate) fn data(&self, first: usize, count: usize) -> &'a [u8] {
        let (bytes, width) = match self.weight {
            HostWeight::F32(data) => (data, self.inputs * 4),
            HostWeight::Bf16(data) | HostWeight::F16(data) => (data, self.inputs * 2),
            HostWeight::Fp8Block { data, .. } => (data, self.inputs),
            HostWeight::Int4(int4) => (&int4.packed, self.inputs / 2),
        };
        &bytes.as_ref().as_ref()[first * width..(first + count) * width]
    }

    /// Scales that every part of the weight needs whole.
    pub(crate) fn shared_scales(&self) -> &'a [f32] {
        match self.weight {
            HostWeight::Fp8Block { scales, .. } => scales,
            _ => &[],
        }
    }

    pub(crate) fn scales(&self, first: usize, count: usize) -> &'a [f32] {
        match self.weight {
            HostWeight::Int4(int4) => {
                let groups = self.inputs / self.group;
                &int4.scales[first * groups..(first + count) * groups]
            }
            _ => self.shared_scales(),
        }
    }

    pub(crate) fn zeros(&self, first: usize, count: usize) -> Option<&'a [u8]> {
        let groups = self.inputs / self.group;
        match self.weight {
            HostWeight::Int4(int4) => int4
                .zeros
                .as_ref()
                .map(|zeros| &zeros[first * groups..(first + count) * groups]),
            _ => None,
        }
    }
}

fn check_int4(int4: &HostInt4, outputs: usize, inputs: usize) -> Result<()> {
    const OP: &str = "upload";
    let group = int4.group;
    if group == 0
        || !group.is_multiple_of(32)
        || (group > 32 && !group.is_multiple_of(64))
        || !inputs.is_multiple_of(group)
    {
        return Err(shape(
            OP,
            "int4 group",
            group,
            format!("32, 64 or a multiple of 128 that divides {inputs}"),
        ));
    }
    if group > 64 && !group.is_multiple_of(128) {
        return Err(shape(OP, "int4 group", group, "32, 64 or a multiple of 128"));
    }
    let groups = outputs * (inputs / group);
    if int4.scales.len() != groups {
        return Err(shape(OP, "int4 scales", int4.scales.len(), groups));
    }
    match &int4.zeros {
        Some(zeros) if zeros.len() != groups => Err(shape(OP, "int4 zero points", zeros.len(), groups)),
        _ => Ok(()),
    }
}

/// Whether some scale is no F16 number: then all are kept as BF16, of which they then are.
fn needs_bf16(scales: &[f32]) -> bool {
    scales
        .iter()
        .any(|scale| half::f16::from_f32(*scale).to_f32() != *scale)
}

impl CudaBackend {
    pub(super) fn add_linears(&mut self, weights: &[HostLinear]) -> Result<Vec<LinearId>> {
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
            placed.push(Placed { rows, tiles, stream });
        }
        self.loader.load(&self.gpu, &placed)?;
        let first = self.linears.len() as u32;
        self.linears.extend(linears);
        Ok((first..self.linears.len() as u32).map(LinearId).collect())
    }

    pub(super) fn add_vector(&mut self, values: &[f32]) -> Result<VectorId> {
        self.gpu.device.enter()?;
        let memory = Memory::raw(&self.gpu.device, values.len() * 4, "a vector")?;
        self.gpu.write(&memory, 0, super::loader::as_bytes(values))?;
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

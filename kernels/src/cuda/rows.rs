//! A host weight whose sizes have been checked, and which bytes of it a piece needs: what the loader reads.
//!
//! Must stay true: after [`Rows::new`] every part of a piece lies inside the weight.

use super::format::TILE_ROWS;
use super::{Format, shape};
use crate::backend::{KernelError, Result};
use crate::weight::{Bytes, HostInt4, HostLinear, HostWeight, PackedInt4, PackedOrder, ScaleType};

const OP: &str = "upload";
/// Inputs of a whole number of a stream's stages, and rows of an FP8 scale.
const STEP: usize = 128;

pub(crate) struct Rows<'a> {
    weight: &'a HostWeight,
    pub(crate) format: Format,
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    pub(crate) group: usize,
    pub(crate) bf16_scales: bool,
}

/// Some bytes of a weight.
pub(crate) enum Part<'a> {
    Here(&'a [u8]),
    Stored {
        bytes: &'a Bytes,
        offset: usize,
        len: usize,
    },
}

impl Part<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Part::Here(bytes) => bytes.len(),
            Part::Stored { len, .. } => *len,
        }
    }

    /// `to` is as long as this.
    pub(crate) fn read(&self, to: &mut [u8]) -> Result<()> {
        match self {
            Part::Here(bytes) => to.copy_from_slice(bytes),
            Part::Stored { bytes, offset, .. } => bytes
                .read_at(*offset, to)
                .map_err(|error| KernelError::Read(error.to_string()))?,
        }
        Ok(())
    }
}

/// Data, scales (perhaps none) and zero points of a piece.
pub(crate) struct Parts<'a> {
    pub(crate) data: Part<'a>,
    pub(crate) scales: Part<'a>,
    pub(crate) zeros: Option<Part<'a>>,
}

impl Parts<'_> {
    /// Bytes that are read from where they are stored.
    pub(crate) fn stored(&self) -> usize {
        let parts = [Some(&self.data), Some(&self.scales), self.zeros.as_ref()];
        let stored = parts
            .into_iter()
            .flatten()
            .filter(|part| matches!(part, Part::Stored { .. }));
        stored.map(Part::len).sum()
    }
}

impl<'a> Rows<'a> {
    /// Checks that the bytes, scales and zero points are those of the shape.
    pub(crate) fn new(linear: &'a HostLinear) -> Result<Rows<'a>> {
        let (outputs, inputs) = (linear.out_features, linear.in_features);
        let values = outputs
            .checked_mul(inputs)
            .filter(|n| *n > 0 && *n <= 1 << 40 && inputs.is_multiple_of(2));
        let values = values.ok_or_else(|| {
            let found = format!("[{outputs}, {inputs}]");
            shape(OP, "shape", found, "non-empty, an even number of inputs")
        })?;
        let len = |bytes: &Bytes| (**bytes).as_ref().len();
        let int4 = |group: usize| {
            if group.is_multiple_of(128) {
                Format::Int4G128
            } else {
                Format::Int4G32
            }
        };
        let (bytes, expected, format, group, bf16_scales) = match &linear.data {
            HostWeight::F32(data) => (len(data), values * 4, Format::F32, 1, false),
            HostWeight::Bf16(data) => (len(data), values * 2, Format::Bf16, 1, false),
            HostWeight::F16(data) => (len(data), values * 2, Format::F16, 1, false),
            HostWeight::Fp8Block { data, scales } => {
                let blocks = outputs.div_ceil(128) * inputs.div_ceil(128);
                if scales.len() != blocks {
                    return Err(shape(OP, "fp8 scales", scales.len(), blocks));
                }
                (len(data), values, Format::Fp8, 128, false)
            }
            HostWeight::Int4(host) => {
                check_int4(host, outputs, inputs)?;
                let bf16 = needs_bf16(host.scales.iter().copied());
                (len(&host.packed), values / 2, int4(host.group), host.group, bf16)
            }
            HostWeight::Packed(packed) => {
                check_packed(packed, outputs, inputs)?;
                let bf16 = match packed.scale_type {
                    ScaleType::F16 => false,
                    ScaleType::Bf16 => true,
                    ScaleType::F32 => {
                        let words = (*packed.scales).as_ref().as_chunks::<4>().0;
                        needs_bf16(words.iter().map(|word| f32::from_le_bytes(*word)))
                    }
                };
                (
                    len(&packed.words),
                    values / 2,
                    int4(packed.group),
                    packed.group,
                    bf16,
                )
            }
        };
        if bytes != expected {
            return Err(shape(OP, "weight bytes", bytes, expected));
        }
        Ok(Rows {
            weight: &linear.data,
            format,
            outputs,
            inputs,
            group,
            bf16_scales,
        })
    }

    /// Whether pieces are cut along the inputs: the bytes of an output do not lie together.
    pub(crate) fn by_inputs(&self) -> bool {
        self.packed()
            .is_some_and(|packed| packed.order != PackedOrder::Rows)
    }

    pub(crate) fn packed(&self) -> Option<&'a PackedInt4> {
        match self.weight {
            HostWeight::Packed(packed) => Some(packed),
            _ => None,
        }
    }

    /// Rows (or inputs) of the largest piece whose parts fit into `room` bytes, each padded to 16.
    pub(crate) fn piece(&self, room: usize) -> Result<usize> {
        const PADDING: usize = 3 * 16;
        let (all, step) = if self.by_inputs() {
            (self.inputs, STEP.max(self.group))
        } else {
            let step = if self.format == Format::Fp8 {
                STEP
            } else {
                TILE_ROWS
            };
            (self.outputs, step)
        };
        // Bytes grow with the count by steps.
        let bytes = |count: usize| {
            let parts = self.parts(0, count);
            parts.data.len() + parts.scales.len() + parts.zeros.map_or(0, |zeros| zeros.len()) + PADDING
        };
        if bytes(all) <= room {
            return Ok(all.next_multiple_of(step));
        }
        let (fixed, each) = (bytes(0), bytes(step.min(all)) - bytes(0));
        match room.saturating_sub(fixed) / each {
            0 => Err(shape(
                OP,
                "bytes of the fewest rows or inputs",
                each,
                format!("at most {room}"),
            )),
            steps => Ok(steps * step),
        }
    }

    /// Rows `first..first + count`, or as many inputs.
    pub(crate) fn parts(&self, first: usize, count: usize) -> Parts<'a> {
        let stored = |bytes: &'a Bytes, first: usize, count: usize, width: usize| Part::Stored {
            bytes,
            offset: first * width,
            len: count * width,
        };
        let dense = |data: &'a Bytes, width: usize| Parts {
            data: stored(data, first, count, width),
            scales: Part::Here(&[]),
            zeros: None,
        };
        let groups = self.inputs / self.group;
        let (from, to) = (first * groups, (first + count) * groups);
        match self.weight {
            HostWeight::F32(data) => dense(data, self.inputs * 4),
            HostWeight::Bf16(data) | HostWeight::F16(data) => dense(data, self.inputs * 2),
            HostWeight::Fp8Block { data, scales } => Parts {
                scales: Part::Here(as_bytes(scales)),
                ..dense(data, self.inputs)
            },
            HostWeight::Int4(int4) => Parts {
                scales: Part::Here(as_bytes(&int4.scales[from..to])),
                zeros: int4.zeros.as_ref().map(|zeros| Part::Here(&zeros[from..to])),
                ..dense(&int4.packed, self.inputs / 2)
            },
            HostWeight::Packed(packed) => {
                let scale = packed.scale_type.bytes();
                let (first_group, end) = (first / self.group, (first + count).div_ceil(self.group));
                let by_group = |bytes: &'a Bytes, width| stored(bytes, first_group, end - first_group, width);
                let data = match packed.order {
                    PackedOrder::Rows => {
                        return Parts {
                            scales: stored(&packed.scales, first, count, groups * scale),
                            ..dense(&packed.words, self.inputs / 2)
                        };
                    }
                    PackedOrder::Inputs => stored(&packed.words, first / 8, count / 8, self.outputs * 4),
                    PackedOrder::Outputs => stored(&packed.words, first, count, self.outputs / 2),
                };
                Parts {
                    data,
                    scales: by_group(&packed.scales, self.outputs * scale),
                    zeros: packed
                        .zeros
                        .as_ref()
                        .map(|zeros| by_group(zeros, self.outputs / 2)),
                }
            }
        }
    }
}

fn check_group(group: usize, inputs: usize) -> Result<()> {
    let known = matches!(group, 32 | 64) || (group > 0 && group.is_multiple_of(128));
    if !known || !inputs.is_multiple_of(group) {
        let expected = format!("32, 64 or a multiple of 128 that divides {inputs}");
        return Err(shape(OP, "int4 group", group, expected));
    }
    Ok(())
}

fn check_int4(int4: &HostInt4, outputs: usize, inputs: usize) -> Result<()> {
    check_group(int4.group, inputs)?;
    let groups = outputs * (inputs / int4.group);
    if int4.scales.len() != groups {
        return Err(shape(OP, "int4 scales", int4.scales.len(), groups));
    }
    match &int4.zeros {
        Some(zeros) if zeros.len() != groups => Err(shape(OP, "int4 zero points", zeros.len(), groups)),
        _ => Ok(()),
    }
}

fn check_packed(packed: &PackedInt4, outputs: usize, inputs: usize) -> Result<()> {
    check_group(packed.group, inputs)?;
    let rows = packed.order == PackedOrder::Rows;
    if !inputs.is_multiple_of(8) || !(rows || outputs.is_multiple_of(8)) {
        return Err(shape(
            OP,
            "packed int4",
            format!("[{outputs}, {inputs}]"),
            "multiples of 8",
        ));
    }
    let groups = outputs * (inputs / packed.group);
    let bytes = (*packed.scales).as_ref().len();
    if bytes != groups * packed.scale_type.bytes() {
        return Err(shape(
            OP,
            "bytes of int4 scales",
            bytes,
            groups * packed.scale_type.bytes(),
        ));
    }
    match &packed.zeros {
        Some(_) if rows => Err(KernelError::Unsupported(
            "zero points of INT4 packed by rows".into(),
        )),
        Some(zeros) if (**zeros).as_ref().len() != groups / 2 => Err(shape(
            OP,
            "bytes of int4 zero points",
            (**zeros).as_ref().len(),
            groups / 2,
        )),
        _ => Ok(()),
    }
}

/// Whether some scale is no F16 number: then all are kept as BF16, of which they then are.
fn needs_bf16(mut scales: impl Iterator<Item = f32>) -> bool {
    scales.any(|scale| half::f16::from_f32(scale).to_f32() != scale)
}

/// The bytes of plain values in this machine's order, which is the device's.
pub(crate) fn as_bytes<T: Copy>(values: &[T]) -> &[u8] {
    // SAFETY: plain numbers have no padding and any byte may be read.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

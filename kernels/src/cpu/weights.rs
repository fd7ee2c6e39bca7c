//! Weights as the CPU backend keeps them: in the stored format, lengths checked once.
//!
//! May touch: the bytes the loader gave, which stay where they are (a memory map, no copy). Must stay true: after
//! [`CpuLinear::new`] every row and every scale that a kernel computes from `out_features` and `in_features`
//! lies inside the data.

use std::sync::Arc;

use crate::backend::{ExpertsId, HostExpert, KernelError, LinearId, Result, VectorId};
use crate::cpu::check::{lookup, mismatch};
use crate::ops::experts::CpuExperts;
use crate::weight::{Bytes, HostLinear, HostWeight};

const OP: &str = "upload_linear";

/// Rows and columns of an FP8 scale block.
pub(crate) const FP8_BLOCK: usize = 128;
/// Inputs that are quantised together in front of an INT4 weight; groups divide it or are multiples of it.
pub(crate) const INT4_BLOCK: usize = 128;
/// Inputs in one lane of an INT4 block; groups are multiples of it.
pub(crate) const INT4_LANE: usize = 8;

/// A checked weight.
pub(crate) struct CpuLinear {
    pub(crate) out_features: usize,
    pub(crate) in_features: usize,
    bytes: Bytes,
    pub(crate) format: Format,
}

/// What the bytes mean.
#[derive(Clone)]
pub(crate) enum Format {
    F32,
    F16,
    Bf16,
    Fp8 {
        /// `[ceil(out / 128), ceil(in / 128)]`.
        scales: Arc<[f32]>,
    },
    Int4 {
        /// `[out, chunks, per_chunk]`.
        scales: Arc<[f32]>,
        /// The same, each zero in both halves of its i32; empty: all 8.
        zeros: Arc<[i32]>,
        /// Groups in a chunk of 128 inputs: 1, 2, 4, 8 or 16. A wider group is repeated.
        per_chunk: usize,
    },
}

impl CpuLinear {
    /// Takes over a weight. `Shape` if a length does not match, `Unsupported` for a group the kernels lack.
    pub(crate) fn new(weight: &HostLinear) -> Result<CpuLinear> {
        let (rows, columns) = (weight.out_features, weight.in_features);
        if rows == 0 || columns == 0 {
            return Err(mismatch(
                OP,
                "[out, in]",
                format!("[{rows}, {columns}]"),
                "no zero",
            ));
        }
        let (bytes, row_bytes, format) = match &weight.data {
            HostWeight::F32(bytes) => (bytes, columns.checked_mul(4), Format::F32),
            HostWeight::F16(bytes) => (bytes, columns.checked_mul(2), Format::F16),
            HostWeight::Bf16(bytes) => (bytes, columns.checked_mul(2), Format::Bf16),
            HostWeight::Fp8Block { data, scales } => {
                let blocks = (rows.div_ceil(FP8_BLOCK), columns.div_ceil(FP8_BLOCK));
                expect_len("FP8 scales", scales.len(), blocks.0.checked_mul(blocks.1))?;
                let scales = Arc::from(scales.as_slice());
                (data, Some(columns), Format::Fp8 { scales })
            }
            HostWeight::Int4(int4) => {
                let group = int4.group;
                let divides =
                    group != 0 && (INT4_BLOCK.is_multiple_of(group) || group.is_multiple_of(INT4_BLOCK));
                if !divides || !group.is_multiple_of(INT4_LANE) {
                    return Err(KernelError::Unsupported(format!(
                        "INT4 group size {group}: must be 8, 16, 32, 64 or a multiple of 128"
                    )));
                }
                if !columns.is_multiple_of(2) {
                    return Err(mismatch(
                        OP,
                        "INT4 in_features",
                        columns.to_string(),
                        "an even number",
                    ));
                }
                let groups = rows.checked_mul(columns.div_ceil(group));
                expect_len("INT4 scales", int4.scales.len(), groups)?;
                if let Some(zeros) = &int4.zeros {
                    expect_len("INT4 zeros", zeros.len(), groups)?;
                    if let Some(zero) = zeros.iter().find(|zero| **zero > 16) {
                        return Err(mismatch(OP, "INT4 zero", zero, "0 to 16"));
                    }
                }
                let format = Format::Int4 {
                    scales: per_chunk(&int4.scales, columns, group),
                    zeros: int4.zeros.as_deref().map_or(Arc::from([]), |zeros| {
                        let twice: Vec<i32> =
                            zeros.iter().map(|zero| i32::from(*zero) * 0x0001_0001).collect();
                        per_chunk(&twice, columns, group)
                    }),
                    per_chunk: groups_per_chunk(group),
                };
                (&int4.packed, Some(columns / 2), format)
            }
            HostWeight::Packed(packed) => {
                return Err(KernelError::Unsupported(format!(
                    "INT4 in the order {:?}: the CPU backend takes rows that were repacked",
                    packed.order
                )));
            }
        };
        let expected = row_bytes.and_then(|row| row.checked_mul(rows));
        expect_len("weight bytes", (**bytes).as_ref().len(), expected)?;
        Ok(CpuLinear {
            out_features: rows,
            in_features: columns,
            bytes: Arc::clone(bytes),
            format,
        })
    }

    /// The stored weight, `out_features` rows of [`CpuLinear::row_bytes`].
    pub(crate) fn bytes(&self) -> &[u8] {
        (*self.bytes).as_ref()
    }

    /// Bytes of one row of the data, without scales.
    pub(crate) fn row_bytes(&self) -> usize {
        match self.format {
            Format::F32 => self.in_features * 4,
            Format::F16 | Format::Bf16 => self.in_features * 2,
            Format::Fp8 { .. } => self.in_features,
            Format::Int4 { .. } => self.in_features / 2,
        }
    }

    /// Fails unless the weight is `[out, in]`.
    pub(crate) fn expect(
        &self,
        op: &'static str,
        what: &'static str,
        out: usize,
        input: usize,
    ) -> Result<()> {
        if (self.out_features, self.in_features) == (out, input) {
            return Ok(());
        }
        let found = format!("[{}, {}]", self.out_features, self.in_features);
        Err(mismatch(op, what, found, format!("[{out}, {input}]")))
    }
}

/// Groups in a chunk.
fn groups_per_chunk(group: usize) -> usize {
    (INT4_BLOCK / group).max(1)
}

/// `[out, in / group]` values as `[out, chunks, per_chunk]`: wider groups repeated, the last chunk filled up.
fn per_chunk<T: Copy>(values: &[T], columns: usize, group: usize) -> Arc<[T]> {
    let groups = columns.div_ceil(group);
    let places = columns.div_ceil(INT4_BLOCK) * groups_per_chunk(group);
    // Places per group, where a group is wider than a chunk.
    let wide = (group / INT4_BLOCK).max(1);
    let rows = values.chunks_exact(groups);
    rows.flat_map(|row| (0..places).map(|place| row[(place / wide).min(groups - 1)]))
        .collect()
}

/// All weights of a backend, by handle.
#[derive(Default)]
pub(crate) struct Weights {
    linears: Vec<CpuLinear>,
    vectors: Vec<Box<[f32]>>,
    experts: Vec<Option<CpuExperts>>,
}

impl Weights {
    pub(crate) fn check_linear(&self, weight: &HostLinear) -> Result<CpuLinear> {
        CpuLinear::new(weight)
    }

    pub(crate) fn push_linear(&mut self, weight: CpuLinear) -> LinearId {
        self.linears.push(weight);
        LinearId(self.linears.len() as u32 - 1)
    }

    pub(crate) fn push_vector(&mut self, values: &[f32]) -> VectorId {
        self.vectors.push(values.into());
        VectorId(self.vectors.len() as u32 - 1)
    }

    pub(crate) fn check_experts(&self, experts: &[HostExpert]) -> Result<CpuExperts> {
        CpuExperts::new(experts)
    }

    /// A dropped handle is given out again, so that placements may change for ever.
    pub(crate) fn push_experts(&mut self, experts: CpuExperts) -> ExpertsId {
        let free = self.experts.iter().position(Option::is_none);
        let at = free.unwrap_or(self.experts.len());
        if at == self.experts.len() {
            self.experts.push(None);
        }
        self.experts[at] = Some(experts);
        ExpertsId(at as u32)
    }

    pub(crate) fn drop_experts(&mut self, experts: ExpertsId) {
        if let Some(slot) = self.experts.get_mut(experts.0 as usize) {
            *slot = None;
        }
    }

    pub(crate) fn linear(&self, op: &'static str, what: &'static str, id: LinearId) -> Result<&CpuLinear> {
        lookup(op, what, &self.linears, id.0)
    }

    pub(crate) fn vector(&self, op: &'static str, what: &'static str, id: VectorId) -> Result<&[f32]> {
        lookup(op, what, &self.vectors, id.0).map(|vector| &vector[..])
    }

    pub(crate) fn experts(&self, op: &'static str, id: ExpertsId) -> Result<&CpuExperts> {
        let slot = lookup(op, "experts", &self.experts, id.0)?;
        slot.as_ref()
            .ok_or_else(|| mismatch(op, "experts", format!("handle {}, dropped", id.0), "one in use"))
    }
}

fn expect_len(what: &'static str, found: usize, expected: Option<usize>) -> Result<()> {
    match expected {
        Some(expected) if expected == found => Ok(()),
        Some(expected) => Err(mismatch(OP, what, found, expected)),
        None => Err(mismatch(
            OP,
            what,
            found.to_string(),
            "a product that fits into memory",
        )),
    }
}

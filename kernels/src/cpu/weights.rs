//! Weights as the CPU backend keeps them: in the stored format, lengths checked once.
//!
//! May touch: the bytes the loader gave, which stay where they are (a memory map, no copy). Must stay true: after
//! [`CpuLinear::new`] every row and every scale that a kernel computes from `out_features` and `in_features`
//! lies inside the data.

use std::sync::Arc;

use crate::backend::{KernelError, Result};
use crate::weight::{Bytes, HostLinear, HostWeight};

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
        /// `[out, in / group]`.
        scales: Arc<[f32]>,
        /// `[out, in / group]`; empty: all 8.
        zeros: Arc<[u8]>,
        group: usize,
    },
}

impl CpuLinear {
    /// Takes over a weight. `Shape` if a length does not match, `Unsupported` for a group the kernels lack.
    pub(crate) fn new(weight: &HostLinear) -> Result<CpuLinear> {
        let (rows, columns) = (weight.out_features, weight.in_features);
        if rows == 0 || columns == 0 {
            return Err(shape(
                "[out, in]",
                format!("[{rows}, {columns}]"),
                "no zero".into(),
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
                // A group may also be the whole row, in which case its size is of no consequence.
                let whole_row = group >= columns;
                if group == 0 || !(whole_row || divides && group.is_multiple_of(INT4_LANE)) {
                    return Err(KernelError::Unsupported(format!(
                        "INT4 group size {group}: must be 8, 16, 32, 64, a multiple of 128 or the whole row"
                    )));
                }
                if !columns.is_multiple_of(2) {
                    return Err(shape(
                        "INT4 in_features",
                        columns.to_string(),
                        "an even number".into(),
                    ));
                }
                let groups = rows.checked_mul(columns.div_ceil(group));
                expect_len("INT4 scales", int4.scales.len(), groups)?;
                if let Some(zeros) = &int4.zeros {
                    expect_len("INT4 zeros", zeros.len(), groups)?;
                    if let Some(zero) = zeros.iter().find(|zero| **zero > 16) {
                        return Err(shape("INT4 zero", zero.to_string(), "0 to 16".into()));
                    }
                }
                let format = Format::Int4 {
                    scales: Arc::from(int4.scales.as_slice()),
                    zeros: Arc::from(int4.zeros.as_deref().unwrap_or_default()),
                    group: if whole_row {
                        columns.next_multiple_of(INT4_BLOCK)
                    } else {
                        group
                    },
                };
                (&int4.packed, Some(columns / 2), format)
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
        Err(KernelError::Shape {
            op,
            what,
            found: format!("[{}, {}]", self.out_features, self.in_features),
            expected: format!("[{out}, {input}]"),
        })
    }
}

fn shape(what: &'static str, found: String, expected: String) -> KernelError {
    KernelError::Shape {
        op: "upload_linear",
        what,
        found,
        expected,
    }
}

fn expect_len(what: &'static str, found: usize, expected: Option<usize>) -> Result<()> {
    match expected {
        Some(expected) if expected == found => Ok(()),
        Some(expected) => Err(shape(what, found.to_string(), expected.to_string())),
        None => Err(shape(
            what,
            found.to_string(),
            "a product that fits into memory".into(),
        )),
    }
}

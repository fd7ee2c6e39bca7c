//! Weights of linear layers in the format the checkpoint stores them in. All are logical `[out, in]`, row-major.

use std::sync::Arc;

/// Bytes that live as long as the weight: a slice of a memory map, or memory of our own (dummy weights, repacked
/// INT4). Cheap to clone.
pub type Bytes = Arc<dyn Stored>;

/// Bytes that can be looked at where they are, or be copied elsewhere.
pub trait Stored: AsRef<[u8]> + Send + Sync {
    /// Fills `to` with the bytes from `offset` on, all inside. Part of a file reads it, which is faster than mapping every
    /// page for one look at it.
    fn read_at(&self, offset: usize, to: &mut [u8]) -> std::io::Result<()> {
        to.copy_from_slice(&self.as_ref()[offset..][..to.len()]);
        Ok(())
    }
}

impl Stored for Vec<u8> {}

/// A weight as the host has it, before a backend takes it over (`Backend::upload_linear`).
#[derive(Clone)]
pub struct HostLinear {
    pub out_features: usize,
    pub in_features: usize,
    pub data: HostWeight,
}

#[derive(Clone)]
pub enum HostWeight {
    /// `[out, in]` little-endian.
    F32(Bytes),
    Bf16(Bytes),
    F16(Bytes),
    /// `[out, in]` e4m3, and F32 scales `[ceil(out/128), ceil(in/128)]` that multiply.
    Fp8Block {
        data: Bytes,
        scales: Vec<f32>,
    },
    /// One layout for AWQ, GPTQ and compressed-tensors: repacked at load by the worker if the checkpoint's differs.
    Int4(HostInt4),
    /// As the checkpoint has it, for backends that repack by themselves (`Backend::takes_packed`).
    Packed(PackedInt4),
}

/// `w[o, i] = (q[o, i] - zero[o, i / group]) * scale[o, i / group]`.
#[derive(Clone)]
pub struct HostInt4 {
    /// `[out, in / 2]` bytes; the low nibble is the even input.
    pub packed: Bytes,
    /// `[out, in / group]`, as F32 (exact from F16 and BF16).
    pub scales: Vec<f32>,
    /// `[out, in / group]` values 0..=15 (or 16 for GPTQ's stored 15); `None`: all 8.
    pub zeros: Option<Vec<u8>>,
    pub group: usize,
}

/// The same values as [`HostInt4`]'s, in the order of a checkpoint's tensors.
#[derive(Clone)]
pub struct PackedInt4 {
    pub order: PackedOrder,
    /// Little-endian words of eight values.
    pub words: Bytes,
    pub scales: Bytes,
    pub scale_type: ScaleType,
    /// `[in / group, out / 8]` words, packed across outputs in both orders that have them; `None`: all 8.
    pub zeros: Option<Bytes>,
    /// What is added to a stored zero point.
    pub zeros_less: u8,
    pub group: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PackedOrder {
    /// compressed-tensors: words `[out, in / 8]`, scales `[out, in / group]`.
    Rows,
    /// GPTQ: words `[in / 8, out]`, scales `[in / group, out]`.
    Inputs,
    /// AWQ: words `[in, out / 8]`, nibble n is output 0, 2, 4, 6, 1, 3, 5, 7 of the eight; scales `[in / group, out]`.
    Outputs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleType {
    F32,
    F16,
    Bf16,
}

impl ScaleType {
    pub fn bytes(self) -> usize {
        match self {
            ScaleType::F32 => 4,
            ScaleType::F16 | ScaleType::Bf16 => 2,
        }
    }
}

impl HostLinear {
    /// Bytes that one use of the weight reads: data, scales and zeros.
    pub fn bytes(&self) -> usize {
        let len = |bytes: &Bytes| (**bytes).as_ref().len();
        match &self.data {
            HostWeight::F32(bytes) | HostWeight::Bf16(bytes) | HostWeight::F16(bytes) => len(bytes),
            HostWeight::Fp8Block { data, scales } => len(data) + scales.len() * 4,
            HostWeight::Int4(HostInt4 {
                packed,
                scales,
                zeros,
                ..
            }) => len(packed) + scales.len() * 4 + zeros.as_ref().map_or(0, |zeros| zeros.len() * 4),
            HostWeight::Packed(packed) => {
                len(&packed.words) + len(&packed.scales) + packed.zeros.as_ref().map_or(0, len)
            }
        }
    }
}
